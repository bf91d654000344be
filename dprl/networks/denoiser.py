"""What every denoiser is: a network in two parts, of which one does not see the noisy actions.

Shapes: B samples, O observation steps, F features of an observation step, H actions of a chunk, A action size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

MAX_PREPARED = 4_096
"""Pairs of timestep and condition that are prepared at once, to bound the memory."""


class Denoiser(nn.Module, ABC):
    """Predicts from noisy actions, a timestep and a condition.

    A sampler visits many timesteps with the same condition: it calls `prepare` once for all of them, and `denoise` at
    every step. Training visits few timesteps many times: it calls `embed` once for each.
    """

    @abstractmethod
    def embed(self, timestep: Tensor) -> Tensor:
        """Everything that depends on the timestep alone: (n,) -> (n, time)."""

    @abstractmethod
    def prepare(self, time: Tensor, condition: Tensor) -> Tensor:
        """Everything that does not depend on the noisy actions: (B, time) or (1, time), (B, O, F) -> (B, ...)."""

    @abstractmethod
    def denoise(self, noisy_actions: Tensor, prepared: Tensor) -> Tensor:
        """(B, H, A), what `prepare` returned -> (B, H, A)."""

    def forward(self, noisy_actions: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """(B, H, A), (B,) or (1,) for one timestep for all, (B, O, F) -> (B, H, A)."""
        return self.denoise(noisy_actions, self.prepare(self.embed(timestep), condition))

    def prepare_steps(self, timesteps: Tensor, condition: Tensor) -> Iterator[Tensor]:
        """Prepare n timesteps, many at once: (n,), (B, O, F) -> n times (B, ...)."""
        batch = len(condition)
        for part in self.embed(timesteps).split(max(1, MAX_PREPARED // max(batch, 1))):
            every = condition.expand(len(part), *condition.shape).flatten(0, 1)
            yield from self.prepare(part.repeat_interleave(batch, 0), every).unflatten(0, (len(part), batch))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile `denoise` with torch.compile, in place. A copy of the network is not compiled."""
        self.denoise = torch.compile(self.denoise, *args, **kwargs)  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {name: value for name, value in state.items() if name != "denoise"}  # bound to this network's weights
