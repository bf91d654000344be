"""Minibatches of chunks: gathered on the device where the data fit there, else read by worker processes.

Which chunks make up a minibatch is decided by the caller, so a resumed run sees the same ones either way.

Shapes: B batch, O observation steps, D observation size, H actions of a chunk, A action size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dprl.data.episodes import Chunks, Episodes, OnDisk
from dprl.observations import TensorObservation, map_parts


class Batch(NamedTuple):
    """What one gradient step sees."""

    obs: TensorObservation
    """(B, O, D), or named parts; images uint8."""
    actions: Tensor
    """(B, H, A)."""
    valid: Tensor | None
    """(B, H) False where an action only fills its chunk up; None where none does."""


WORKERS = 2
"""Processes that read data where no number is asked for."""


def fits(data: Episodes, device: torch.device) -> bool:
    """Whether `device` should hold the data: what is on disk stays there, and half of a GPU's memory stays free."""
    if any(isinstance(array, OnDisk) for array in (data.observations, data.actions, *data.images.values())):
        return False
    if device.type != "cuda":
        return True
    size = sum(int(np.prod(images.shape)) for images in data.images.values()) + data.observations.nbytes
    return size <= torch.cuda.mem_get_info(device)[0] // 2


class ChunkBatches:
    """The chunks of some episodes as minibatches on a device."""

    def __init__(self, data: Episodes, chunks: Chunks, device: torch.device, *, num_workers: int | None = None) -> None:
        """Hold `data` on `device`, or leave them where they are for `num_workers` processes to read.

        Without a number there are workers only for data that `device` should not hold, see `fits`.
        """
        self.device = device
        if num_workers is None:
            num_workers = 0 if fits(data, device) else WORKERS
        self.num_workers = num_workers
        self._rows = ChunkRows(data, chunks)
        self._padded = not chunks.valid.all()
        if num_workers == 0:
            self._obs = map_parts(self._moved, data.observe(slice(None)))
            self._actions = self._moved(data.actions)
            self._index = [self._moved(a) for a in (chunks.observation_rows, chunks.action_rows, chunks.valid)]

    def __len__(self) -> int:
        """How many chunks there are."""
        return len(self._rows)

    def read(self, picks: Tensor) -> Iterator[Batch]:
        """Yield one minibatch for each row of `picks` (steps, B), indices of chunks, wherever they are."""
        if self.num_workers == 0:
            for rows in picks.to(self.device):
                yield self._gathered(rows)
            return
        loader: DataLoader[Any] = DataLoader(
            self._rows,
            batch_sampler=picks.tolist(),
            num_workers=self.num_workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # or it would draw its workers' seeds from the global one
            pin_memory=self.device.type == "cuda",
        )
        for obs, actions, valid in loader:
            moved = map_parts(lambda part: part.to(self.device, non_blocking=True), obs)
            yield Batch(moved, actions.to(self.device), valid.to(self.device) if self._padded else None)

    def _gathered(self, rows: Tensor) -> Batch:
        observation_rows, action_rows, valid = (index[rows] for index in self._index)
        obs = map_parts(lambda part: part[observation_rows], self._obs)
        return Batch(obs, self._actions[action_rows], valid if self._padded else None)

    def _moved(self, array: Any) -> Tensor:
        array = np.ascontiguousarray(array)
        return torch.as_tensor(array if array.flags.writeable else array.copy(), device=self.device)


class ChunkRows(Dataset[Any]):
    """One chunk at a time, for worker processes; arrays may be memory-mapped."""

    def __init__(self, data: Episodes, chunks: Chunks) -> None:
        self._data = data
        self._chunks = chunks

    def __len__(self) -> int:
        """How many chunks there are."""
        return len(self._chunks.valid)

    def __getitem__(self, i: int) -> Any:
        """Return the observations, actions and validity of chunk `i`."""
        chunks, data = self._chunks, self._data
        return data.observe(chunks.observation_rows[i]), data.actions[chunks.action_rows[i]], chunks.valid[i]


def _collate(rows: list[Any]) -> Any:
    observations, actions, valid = zip(*rows, strict=True)
    obs = map_parts(lambda *parts: torch.from_numpy(np.stack(parts)), *observations)
    return obs, torch.from_numpy(np.stack(actions)), torch.from_numpy(np.stack(valid))
