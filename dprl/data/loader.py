"""Minibatches of chunks: gathered on the device where the data fit there, else read by worker processes.

Which chunks make up a minibatch is decided by the caller, so a resumed run sees the same ones either way.

Shapes: B batch, O observation steps, D observation size, H actions of a chunk, A action size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dprl.data.episodes import Chunks, Episodes, OnDisk
from dprl.data.transitions import Decisions
from dprl.observations import TensorObservation, map_parts, put
from dprl.spec import FloatArray


class Batch(NamedTuple):
    """What one gradient step sees."""

    obs: TensorObservation
    """(B, O, D), or named parts; images uint8."""
    actions: Tensor
    """(B, H, A)."""
    valid: Tensor | None
    """(B, H) False where an action only fills its chunk up; None where none does."""
    command: Tensor | None = None
    """(B, C) what a policy that can be told is told of each chunk; None of others."""


AnyBatch = TypeVar("AnyBatch")
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


class RowBatches(ABC, Generic[AnyBatch]):
    """Minibatches of something that is cut out of episodes, on a device."""

    def __init__(
        self, rows: Dataset[Any], n: int, data: Episodes, device: torch.device, num_workers: int | None
    ) -> None:
        """Let workers read `rows`, or a subclass hold them on the device, where `self.num_workers` is 0.

        Without a number there are workers only for data that `device` should not hold, see `fits`.
        """
        self.device, self._rows, self._n = device, rows, n
        self.num_workers = num_workers if num_workers is not None else (0 if fits(data, device) else WORKERS)

    @abstractmethod
    def _gathered(self, rows: Tensor) -> AnyBatch:
        """Return the minibatch `rows` of what is on the device."""

    @abstractmethod
    def _batch(self, columns: list[Any]) -> AnyBatch:
        """Return the minibatch of what workers have read, column by column."""

    def __len__(self) -> int:
        """How many rows there are."""
        return self._n

    def read(self, picks: Tensor) -> Iterator[AnyBatch]:
        """Yield one minibatch for each row of `picks` (steps, B), indices of rows, wherever they are."""
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
        for columns in loader:
            yield self._batch([map_parts(self._sent, column) for column in columns])

    def _sent(self, part: Tensor) -> Tensor:
        return part.to(self.device, non_blocking=True)

    def _moved(self, array: Any) -> Tensor:
        array = np.ascontiguousarray(array)
        return torch.as_tensor(array if array.flags.writeable else array.copy(), device=self.device)


class ChunkBatches(RowBatches[Batch]):
    """The chunks of some episodes."""

    def __init__(
        self,
        data: Episodes,
        chunks: Chunks,
        device: torch.device,
        *,
        num_workers: int | None = None,
        commands: FloatArray | None = None,
    ) -> None:
        """See `RowBatches`; `commands` (S, C) are of the steps of `data`."""
        commands = np.zeros((int(data.ends[-1]), 0), np.float32) if commands is None else commands
        super().__init__(ChunkRows(data, chunks, commands), len(chunks), data, device, num_workers)
        self._padded, self._told = not chunks.valid.all(), commands.shape[1] > 0
        if self.num_workers == 0:
            self._obs = map_parts(self._moved, data.observe(slice(None)))
            self._actions = self._moved(data.actions)
            self._index = [self._moved(a) for a in (chunks.observation_rows, chunks.action_rows, chunks.valid)]
            self._commands = self._moved(commands)

    def _gathered(self, rows: Tensor) -> Batch:
        observation_rows, action_rows, valid = (index[rows] for index in self._index)
        obs = map_parts(lambda part: part[observation_rows], self._obs)
        command = self._commands[action_rows[:, 0]] if self._told else None
        return Batch(obs, self._actions[action_rows], valid if self._padded else None, command)

    def _batch(self, columns: list[Any]) -> Batch:
        obs, actions, valid, command = columns
        return Batch(obs, actions, valid if self._padded else None, command if self._told else None)


class DecisionBatch(NamedTuple):
    """What one gradient step of a critic sees."""

    obs: TensorObservation
    """(B, O, D), or named parts."""
    actions: Tensor
    """(B, E, A) in the environment's units."""
    next_obs: TensorObservation
    """(B, O, D), or named parts."""
    reward: Tensor
    """(B,)."""
    discount: Tensor
    """(B,) of what follows."""
    n_steps: Tensor
    """(B,) how many actions of the chunk were executed; the others repeat the last of them."""

    def chunks(self) -> Batch:
        """What was executed, to be cloned."""
        valid = torch.arange(self.actions.shape[1], device=self.n_steps.device) < self.n_steps[:, None]
        return Batch(self.obs, self.actions, valid)


class DecisionBatches(RowBatches[DecisionBatch]):
    """The decisions of some episodes."""

    def __init__(
        self, data: Episodes, decisions: Decisions, device: torch.device, *, num_workers: int | None = None
    ) -> None:
        """See `RowBatches`."""
        super().__init__(DecisionRows(data, decisions), len(decisions), data, device, num_workers)
        if self.num_workers == 0:
            finals = int(data.ends[-1]) + np.arange(data.n_episodes)
            self._obs = map_parts(self._moved, data.observe(slice(None)))
            self._final = map_parts(self._moved, data.observe_outcomes(finals))
            self._n_steps = int(data.ends[-1])
            self._actions = self._moved(data.actions)
            cut = (decisions.observation_rows, decisions.action_rows, decisions.next_rows)
            self._index = [self._moved(column) for column in cut]
            numbers = (decisions.rewards, decisions.discounts, decisions.n_steps)
            self._numbers = [self._moved(column) for column in numbers]

    def _gathered(self, rows: Tensor) -> DecisionBatch:
        seen, did, following = (index[rows] for index in self._index)
        is_final = following >= self._n_steps
        obs = map_parts(lambda part: part[seen], self._obs)
        next_obs = map_parts(lambda part: part[following.clamp(max=self._n_steps - 1)], self._obs)
        put(next_obs, is_final, map_parts(lambda part: part[following[is_final] - self._n_steps], self._final))
        reward, discount, n_steps = (column[rows] for column in self._numbers)
        return DecisionBatch(obs, self._actions[did], next_obs, reward, discount, n_steps)

    def _batch(self, columns: list[Any]) -> DecisionBatch:
        return DecisionBatch(*columns)


class ChunkRows(Dataset[Any]):
    """One chunk at a time, for worker processes; arrays may be on disk."""

    def __init__(self, data: Episodes, chunks: Chunks, commands: FloatArray) -> None:
        self._data = data
        self._chunks = chunks
        self._commands = commands

    def __len__(self) -> int:
        """How many chunks there are."""
        return len(self._chunks.valid)

    def __getitem__(self, i: int) -> Any:
        """Return the observations, actions, validity and command of chunk `i`."""
        chunks, data = self._chunks, self._data
        seen, did = data.observe(chunks.observation_rows[i]), data.actions[chunks.action_rows[i]]
        return seen, did, chunks.valid[i], self._commands[chunks.action_rows[i, 0]]


class DecisionRows(Dataset[Any]):
    """One decision at a time, for worker processes."""

    def __init__(self, data: Episodes, decisions: Decisions) -> None:
        self._data, self._decisions = data, decisions

    def __len__(self) -> int:
        """How many decisions there are."""
        return len(self._decisions)

    def __getitem__(self, i: int) -> Any:
        """Return what decision `i` saw, did, led to and earned, the discount of what follows, and how long it took."""
        data, cut = self._data, self._decisions
        seen, following = data.observe(cut.observation_rows[i]), data.observe_outcomes(cut.next_rows[i])
        return seen, data.actions[cut.action_rows[i]], following, cut.rewards[i], cut.discounts[i], cut.n_steps[i]


def _collate(rows: list[Any]) -> list[Any]:
    """Stack what workers read, column by column."""
    return [map_parts(lambda *parts: torch.from_numpy(np.stack(parts)), *column) for column in zip(*rows, strict=True)]
