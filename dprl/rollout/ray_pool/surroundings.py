"""What a worker must know of the process that started it to build the same environments."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from dprl.errors import MissingDependencyError
from dprl.spec import EnvSpec, to_carry

try:
    from ray import cloudpickle
except ImportError as error:
    raise MissingDependencyError("ray", "ray", "a Ray rollout pool") from error


@dataclass(frozen=True)
class Surroundings:
    """Where modules are searched, and what must be done before the environments can be built (`dprl.spec.to_carry`)."""

    search_path: tuple[str, ...]
    preparation: bytes
    """A function, pickled (what a script defines, by value)."""

    @classmethod
    def here(cls, spec: EnvSpec) -> Self:
        """Those of this process, for the environments of `spec`."""
        return cls(tuple(sys.path), cloudpickle.dumps(to_carry(spec)))

    def enter(self) -> None:
        """Let them be this process's too, behind what it has already."""
        sys.path.extend(place for place in self.search_path if place not in sys.path)
        with suppress(Exception):  # what is missing here is told when an environment is made
            cloudpickle.loads(self.preparation)()
