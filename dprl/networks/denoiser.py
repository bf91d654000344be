"""What every denoiser is: a network in two parts, of which one does not see the noisy actions.

Shapes: B samples, O observation steps, F features of an observation step, H actions of a chunk, A action size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class Denoiser(nn.Module, ABC):
    """Predicts from noisy actions, a timestep and a condition.

    A sampler visits many timesteps with the same condition: it calls `prepare` once for all of them, and `denoise` at
    every step.
    """

    @abstractmethod
    def prepare(self, timestep: Tensor, condition: Tensor) -> Tensor:
        """Everything that does not depend on the noisy actions: (B,) or (1,), (B, O, F) -> (B, ...)."""

    @abstractmethod
    def denoise(self, noisy_actions: Tensor, prepared: Tensor) -> Tensor:
        """(B, H, A), what `prepare` returned -> (B, H, A)."""

    def forward(self, noisy_actions: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """(B, H, A), (B,) or (1,) for one timestep for all, (B, O, F) -> (B, H, A)."""
        return self.denoise(noisy_actions, self.prepare(timestep, condition))

    def prepare_steps(self, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Prepare n timesteps at once: (n,), (B, O, F) -> (n, B, ...)."""
        n, batch = len(timesteps), len(condition)
        every = condition.expand(n, *condition.shape).flatten(0, 1)
        prepared: Tensor = self.prepare(timesteps.repeat_interleave(batch), every).unflatten(0, (n, batch))
        return prepared

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile `denoise` with torch.compile, in place."""
        self.denoise = torch.compile(self.denoise, *args, **kwargs)  # type: ignore[method-assign]
