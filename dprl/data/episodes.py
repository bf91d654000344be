"""Episodes in memory, and the chunks cut from them.

Shapes: S steps over all episodes, D observation size, A action size, O observation steps, H actions of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dprl.errors import DatasetError
from dprl.spec import BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class Episodes:
    """Demonstrations: arrays over the steps of all episodes, one after the other."""

    observations: FloatArray
    """(S, D) what each action saw."""
    actions: FloatArray
    """(S, A)."""
    rewards: FloatArray
    """(S,)."""
    final_observations: FloatArray
    """(episodes, D) what the last action of each led to."""
    ends: IntArray
    """(episodes,) index after each episode's last step."""
    terminated: BoolArray
    """(episodes,) whether it terminated; else it was truncated."""
    success: BoolArray
    """(episodes,) whether it succeeded."""
    seeds: IntArray
    """(episodes,) seed of the environment it was played in."""
    env_id: str | None = None
    """The environment, if known."""

    def __post_init__(self) -> None:
        if len(self.ends) == 0:
            raise DatasetError("the data set has no episodes")

    @property
    def n_episodes(self) -> int:
        """How many."""
        return len(self.ends)

    @property
    def starts(self) -> IntArray:
        """(episodes,) index of each episode's first step."""
        return np.concatenate([[0], self.ends[:-1]])

    @property
    def lengths(self) -> IntArray:
        """(episodes,) steps of each."""
        lengths: IntArray = self.ends - self.starts
        return lengths

    @property
    def success_rate(self) -> float:
        """Share of the episodes that succeeded."""
        return float(self.success.mean())

    def chunk_indices(self, n_obs_steps: int, horizon: int) -> tuple[IntArray, IntArray]:
        """Return the steps of every chunk: observations (chunks, O) and actions (chunks, H).

        A chunk never crosses an episode's end. Before an episode's start its first observation is repeated, as the
        environments do.

        Raises:
            DatasetError: no episode is as long as `horizon`.
        """
        observation_rows, action_rows = [], []
        for start, end in zip(self.starts, self.ends, strict=True):
            first = np.arange(start, end - horizon + 1)[:, None]
            observation_rows.append(np.maximum(first + np.arange(1 - n_obs_steps, 1), start))
            action_rows.append(first + np.arange(horizon))
        chunks = np.concatenate(action_rows)
        if len(chunks) == 0:
            raise DatasetError(
                f"no episode is as long as the horizon of {horizon}: the longest has {self.lengths.max()} steps"
            )
        return np.concatenate(observation_rows), chunks
