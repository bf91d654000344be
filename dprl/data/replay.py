"""The latest decisions that were made in environments, to learn from again.

Shapes: C capacity, B decisions, O observation steps, E executed actions, A action size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dprl.data.load import physical_memory
from dprl.data.loader import DecisionBatch
from dprl.errors import DatasetError, check, check_count
from dprl.observations import STATE, TensorObservation, map_parts, put, take

NUMBERS = ("actions", "reward", "discount", "n_steps")


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return physical_memory()


class ReplayBuffer:
    """A ring of the latest `capacity` decisions, on a device."""

    def __init__(
        self, capacity: int, blank: TensorObservation, n_action_steps: int, action_size: int, device: torch.device
    ) -> None:
        """Reserve the memory.

        Args:
            capacity: C.
            blank: one observation (1, O, D), or named parts, of the right shapes and types.
            n_action_steps: E.
            action_size: A.
            device: where it lies.

        Raises:
            ConfigError: that is more than half of the memory there.
        """
        check_count("capacity", capacity)
        parts = blank.values() if isinstance(blank, Mapping) else [blank]
        row = 2 * sum(int(part.nbytes) for part in parts) + 4 * n_action_steps * action_size
        room_for = memory_of(device) // 2 // row
        check(capacity <= room_for, "capacity", capacity,
              f"must be at most {room_for:,}: decisions of {row:,} bytes may fill half of the memory")  # fmt: skip

        def room(part: Tensor) -> Tensor:
            return torch.zeros(capacity, *part.shape[1:], dtype=part.dtype, device=device)

        actions = torch.zeros(capacity, n_action_steps, action_size, device=device)
        reward, discount = (torch.zeros(capacity, device=device) for _ in range(2))
        n_steps = torch.zeros(capacity, dtype=torch.long, device=device)
        self._rows = DecisionBatch(map_parts(room, blank), actions, map_parts(room, blank), reward, discount, n_steps)
        self._capacity, self._next, self._size = capacity, 0, 0

    def __len__(self) -> int:
        """How many decisions it holds."""
        return self._size

    def add(self, batch: DecisionBatch) -> None:
        """Take in decisions; the oldest make room."""
        n = len(batch.reward)
        check(n <= self._capacity, "capacity", self._capacity, f"must be at least the {n} decisions that come at once")
        at = (self._next + torch.arange(n, device=self._rows.reward.device)) % self._capacity
        for ours, theirs in zip(self._rows, batch, strict=True):
            put(ours, at, theirs)
        self._next, self._size = (self._next + n) % self._capacity, min(self._size + n, self._capacity)

    def sample(self, n: int, generator: torch.Generator) -> DecisionBatch:
        """Draw n decisions with replacement.

        Raises:
            DatasetError: it is empty.
        """
        if self._size == 0:
            raise DatasetError("the replay buffer is empty")
        rows = torch.randint(self._size, (n,), generator=generator, device=generator.device)
        rows = rows.to(self._rows.reward.device)
        return DecisionBatch(*(take(part, rows) for part in self._rows))

    def state(self) -> dict[str, Any]:
        """Return what it holds."""
        held = {name: getattr(self._rows, name)[: self._size] for name in NUMBERS}
        for name in ("obs", "next_obs"):
            part = take(getattr(self._rows, name), slice(self._size))
            held |= {
                f"{name}.{key}": value for key, value in (part if isinstance(part, dict) else {STATE: part}).items()
            }
        return {"next": self._next, "size": self._size, "rows": held}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned, of a buffer of the same capacity and observations."""
        self._next, self._size = int(state["next"]), int(state["size"])
        rows = {"n_steps": torch.tensor(self._rows.actions.shape[1])} | state["rows"]  # earlier versions kept none
        for name in NUMBERS:
            getattr(self._rows, name)[: self._size] = rows[name]
        for name in ("obs", "next_obs"):
            ours = getattr(self._rows, name)
            for key, part in (ours if isinstance(ours, dict) else {STATE: ours}).items():
                part[: self._size] = state["rows"][f"{name}.{key}"]
