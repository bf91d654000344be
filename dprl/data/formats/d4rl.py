"""D4RL's legacy HDF5 files (arXiv:2004.07219): all steps one after the other, and where episodes end.

    observations (S, D), actions (S, A), rewards, terminals (S,), and perhaps timeouts (S,), next_observations (S, D)

An episode ends with a terminal or a timeout, where the next observation is not what the action led to, and the last
with the file. A file without both, as D4RL's first version has them, does
not say where an episode was cut off, and is refused unless its last step is a terminal, as those of all episodes then
must be.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from dprl.data.formats.hdf5 import HDF5Source, top_level
from dprl.data.source import Episode, flags, numbers
from dprl.errors import DatasetError
from dprl.spec import BoolArray

NEEDED = ("observations", "actions", "rewards", "terminals")
ROWS_AT_ONCE = 100_000
SAME = 1e-5
"""How near, absolutely or relatively, an observation is to what the action led to."""


class D4RL(HDF5Source):
    """One file."""

    format: ClassVar[str] = "a D4RL file"

    def open(self) -> None:
        """See `Source.open`."""
        super().open()
        steps = len(self.h5["actions"])
        for name in (*NEEDED, "timeouts", "next_observations"):
            rows = len(self.h5[name]) if name in self.h5 else steps
            if rows != steps:
                raise DatasetError(f"'{self.path}': {name} has {rows} rows, actions have {steps}")
        if steps == 0:
            raise DatasetError(f"'{self.path}' has no episodes")
        self._terminals = self._flags("terminals", steps)
        told = "timeouts" in self.h5 or "next_observations" in self.h5
        if not told and not self._terminals[-1]:
            raise DatasetError(f"'{self.path}' has neither timeouts nor next_observations: nothing says where an "
                               "episode was cut off. D4RL's later files (v1, v2) have timeouts")  # fmt: skip
        ends = self._terminals | self._breaks(steps)
        if "timeouts" in self.h5:
            ends |= self._flags("timeouts", steps)
        ends[-1] = True
        self._ends = np.flatnonzero(ends) + 1
        self._starts = np.concatenate([[0], self._ends[:-1]])
        self.lengths = (self._ends - self._starts).tolist()

    @staticmethod
    def detects(path: Path) -> bool:
        """See `Source.detects`."""
        return set(NEEDED) <= top_level(path)

    def _read(self, index: int) -> Episode:
        first, end = int(self._starts[index]), int(self._ends[index])
        where, steps = f"'{self.path}', episode {index} (from row {first})", end - first
        observations, actions, rewards = (
            numbers(self.h5[name][first:end], name, steps, ndim, where)
            for name, ndim in (("observations", 2), ("actions", 2), ("rewards", None))
        )
        if rewards.size != steps:
            raise DatasetError(f"{where}: rewards have the shape {rewards.shape}; {steps} actions need one each")
        if "next_observations" in self.h5:
            last = numbers(self.h5["next_observations"][end - 1 : end], "next_observations", 1, 2, where)
            observations = np.concatenate([observations, last])
        terminated = bool(self._terminals[end - 1])
        return Episode(where, observations, actions, rewards.reshape(steps), terminated=terminated, success=None)

    def _flags(self, name: str, steps: int) -> BoolArray:
        return flags(self.h5[name][()], name, steps, f"'{self.path}'")

    def _breaks(self, steps: int) -> BoolArray:
        """Where an observation is not what the action before it led to."""
        ends = np.zeros(steps, np.bool_)
        for first in range(0, steps - 1, ROWS_AT_ONCE) if "next_observations" in self.h5 else ():
            end = min(first + ROWS_AT_ONCE, steps - 1)
            led_to, seen = self.h5["next_observations"][first:end], self.h5["observations"][first + 1 : end + 1]
            ends[first:end] = ~np.isclose(led_to, seen, rtol=SAME, atol=SAME).all(axis=1)
        return ends
