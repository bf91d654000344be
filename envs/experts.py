"""Experts: anything that maps what it sees to actions and is worth imitating.

An expert may see more than a policy: where a simulator offers a privileged state (`dprl.envs.chunked.Privileged`), its
experts act on that, else on the latest state.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import numpy.typing as npt

from dprl.envs import avoid, catalogue, maze, pusht
from dprl.errors import EnvError, did_you_mean
from dprl.spec import FloatArray, load


class Expert(Protocol):
    """Acts on the latest state of each environment, or on what its simulator shows to experts."""

    def act(self, observation: npt.NDArray[Any]) -> FloatArray:
        """Return actions (n, A) for states (n, D), or privileged states (n, P)."""
        ...


# name -> {environment it knows: the function `env_id -> Expert`}
EXPERTS: dict[str, dict[str, str]] = {
    "scripted": {
        **dict.fromkeys(avoid.IDS, "dprl.envs.avoid:scripted"),
        **dict.fromkeys(maze.IDS, "dprl.envs.maze:scripted"),
        **dict.fromkeys(pusht.IDS, "dprl.envs.pusht:scripted"),
        **dict.fromkeys(catalogue.METAWORLD, "dprl.envs.metaworld:scripted"),
        **dict.fromkeys(catalogue.METAWORLD_PIXELS, "dprl.envs.metaworld:scripted"),
    },
}


SAVED_EXPERT = "dprl.interop.sb3_experts:expert"
"""Builds the expert in a .zip of stable-baselines3."""


def make_expert(name: str, env_id: str) -> Expert:
    """Build the expert `name`, or the one that stable-baselines3 saved in the .zip of that name, for `env_id`.

    Raises:
        EnvError: no such expert, or it does not know this environment.
    """
    if name.endswith(".zip"):
        return cast("Expert", load(SAVED_EXPERT)(name, env_id))
    if name not in EXPERTS:
        raise EnvError(f"unknown expert '{name}'.{did_you_mean(name, EXPERTS)} 'dprl list experts' shows the names.")
    builders = EXPERTS[name]
    if env_id not in builders:
        raise EnvError(f"the expert '{name}' does not know '{env_id}'.{did_you_mean(env_id, builders)}")
    return cast("Expert", load(builders[env_id])(env_id))
