"""What a worker must know of the process that started it to build the same environments."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from dprl.errors import EnvError, MissingDependencyError
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
        """Those of this process, for the environments of `spec`.

        Raises:
            EnvError: what registers them cannot be pickled.
        """
        try:
            preparation = cloudpickle.dumps(to_carry(spec))
        except Exception as error:  # whatever a script has registered may refuse in any way
            raise EnvError(
                f"{spec.id}: what registers it cannot be sent to Ray workers ({error}); register it in a module, and "
                f"name that: 'module:{spec.id}'"
            ) from error
        return cls(tuple(sys.path), preparation)

    def enter(self) -> None:
        """Let them be this process's too, behind what it has already."""
        sys.path.extend(place for place in self.search_path if place not in sys.path)
        with suppress(Exception):  # what is missing here is told when an environment is made
            cloudpickle.loads(self.preparation)()
