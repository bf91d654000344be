"""D4RL's legacy HDF5 files (arXiv:2004.07219): all steps one after the other, and where episodes end.

    observations (S, D), actions (S, A), rewards, terminals (S,), and perhaps timeouts (S,), next_observations (S, D)

An episode ends with a terminal or a timeout, where the next observation is not what the action led to, and the last
with the file. A file without both, as D4RL's first version has them, does not say where an episode was cut off, and is
refused unless its last step is a terminal, as those of all episodes then must be. There is a warning where episodes end
that the file's timeouts say nothing of.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np

from dprl.data.formats.hdf5 import HDF5Source, top_level
from dprl.data.source import Episode, flags, numbers, one_each
from dprl.errors import DatasetError
from dprl.spec import BoolArray

NEEDED = ("observations", "actions", "rewards", "terminals")
ROWS_AT_ONCE = 100_000
SAME = 1e-5
"""How near, absolutely or relatively, an observation is to what the action led to; of float16, as near as it can be."""
MOST_BREAKS = 0.5
"""Of the rows, that may end an episode by next_observations alone."""


class D4RL(HDF5Source):
    """One file."""

    format: ClassVar[str] = "a D4RL file"

    def open(self) -> None:
        """See `Source.open`."""
        super().open()
        known = (*NEEDED, "timeouts", "next_observations")
        self._arrays = {name: self.h5[name] for name in known if name in self.h5}  # kept, as their caches of chunks are
        self._closing.callback(self._arrays.clear)
        steps = len(self._arrays["actions"])
        for name, array in self._arrays.items():
            if not hasattr(array, "shape") or len(array) != steps:
                rows = len(array) if hasattr(array, "shape") else "no"
                raise DatasetError(f"'{self.path}': {name} has {rows} rows, actions have {steps}")
        self._require_alike()
        if steps == 0:
            raise DatasetError(f"'{self.path}' has no episodes")
        self._terminals = self._flags("terminals", steps)
        told = "timeouts" in self._arrays or "next_observations" in self._arrays
        if not told and not self._terminals[-1]:
            raise DatasetError(f"'{self.path}' has neither timeouts nor next_observations: nothing says where an "
                               "episode was cut off. D4RL's later files (v1, v2) have timeouts")  # fmt: skip
        said, breaks = self._terminals.copy(), self._breaks(steps)
        if "timeouts" in self._arrays:
            said |= self._flags("timeouts", steps)
        said[-1] = True
        self._compare(said, breaks)
        ends = said | breaks
        self._ends = np.flatnonzero(ends) + 1
        self._starts = np.concatenate([[0], self._ends[:-1]])
        self.lengths = (self._ends - self._starts).tolist()

    def _require_alike(self) -> None:
        """Raise DatasetError unless observations are numbers, and next_observations as many."""
        seen = self._arrays["observations"]
        for name in ("observations", "next_observations"):
            array = self._arrays.get(name, seen)
            if array.dtype.kind not in "fiub" or array.ndim != 2 or array.shape != seen.shape:
                raise DatasetError(f"'{self.path}': {name} are {array.dtype} {array.shape}; they must be numbers "
                                   f"(steps, size), observations and next_observations alike")  # fmt: skip

    @staticmethod
    def detects(path: Path) -> bool:
        """See `Source.detects`."""
        return set(NEEDED) <= top_level(path).keys()

    def _read(self, index: int) -> Episode:
        first, end = int(self._starts[index]), int(self._ends[index])
        where, steps = f"'{self.path}', episode {index} (from row {first})", end - first
        observations, actions = (
            numbers(self._arrays[name][first:end], name, steps, 2, where) for name in ("observations", "actions")
        )
        rewards = one_each(self._arrays["rewards"][first:end], "rewards", steps, where)
        if "next_observations" in self._arrays:
            led_to = numbers(self._arrays["next_observations"][first:end], "next_observations", steps, 2, where)
            observations = np.concatenate([observations, led_to[-1:]])
        terminated = bool(self._terminals[end - 1])
        return Episode(where, observations, actions, rewards, terminated=terminated, success=None)

    def _flags(self, name: str, steps: int) -> BoolArray:
        return flags(self._arrays[name][()], name, steps, f"'{self.path}'", unit="row")

    def _compare(self, said: BoolArray, breaks: BoolArray) -> None:
        """Say where only next_observations tell of an end; refuse them where they hardly ever fit."""
        found = np.flatnonzero(breaks & ~said)
        if len(found) > len(said) * MOST_BREAKS:
            raise DatasetError(f"'{self.path}': in {len(found)} of {len(said)} rows next_observations is not the "
                               f"observation that follows (first in row {found[0]}): nothing says which rows are one "
                               "episode. Leave next_observations out if they are inexact")  # fmt: skip
        if len(found) and "timeouts" in self._arrays:
            warnings.warn(
                f"'{self.path}': {len(found)} episodes end where next_observations say so and timeouts do not (first "
                f"at row {found[0]}): right if timeouts are not complete, wrong if they are in other rows or "
                "next_observations inexact", stacklevel=2,
            )  # fmt: skip

    def _breaks(self, steps: int) -> BoolArray:
        """Where an observation is not what the action before it led to."""
        ends = np.zeros(steps, np.bool_)
        if "next_observations" not in self._arrays:
            return ends
        after, before = self._arrays["next_observations"], self._arrays["observations"]
        same = max(SAME, *(2 * float(np.finfo(a.dtype).eps) for a in (after, before) if a.dtype.kind == "f"), 0.0)
        for first in range(0, steps - 1, ROWS_AT_ONCE):
            end = min(first + ROWS_AT_ONCE, steps - 1)
            led_to, seen = after[first:end], before[first + 1 : end + 1]
            fits = np.isclose(led_to, seen, rtol=same, atol=same) | ~np.isfinite(led_to) | ~np.isfinite(seen)
            ends[first:end] = ~fits.all(axis=1)  # what is not finite is refused where its episode is read
        return ends
