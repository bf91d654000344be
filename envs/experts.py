"""Experts: anything that maps observations to actions and is worth imitating."""

from __future__ import annotations

from typing import Any, Protocol, cast

import numpy.typing as npt

from dprl.envs import catalogue
from dprl.errors import EnvError, did_you_mean
from dprl.spec import FloatArray, load


class Expert(Protocol):
    """Acts on the latest observation of each environment."""

    def act(self, observation: npt.NDArray[Any]) -> FloatArray:
        """Return actions (n, A) for observations (n, D)."""
        ...


# name -> (the environments it knows, the function `env_id -> Expert`)
EXPERTS: dict[str, tuple[tuple[str, ...], str]] = {
    "scripted": (catalogue.METAWORLD, "dprl.envs.metaworld:scripted"),
}


def make_expert(name: str, env_id: str) -> Expert:
    """Build the expert `name` for the environment `env_id`.

    Raises:
        EnvError: no such expert, or it does not know this environment.
    """
    if name not in EXPERTS:
        raise EnvError(f"unknown expert '{name}'.{did_you_mean(name, EXPERTS)} 'dprl list experts' shows the names.")
    env_ids, builder = EXPERTS[name]
    if env_id not in env_ids:
        raise EnvError(f"the expert '{name}' does not know '{env_id}'.{did_you_mean(env_id, env_ids)}")
    return cast("Expert", load(builder)(env_id))
