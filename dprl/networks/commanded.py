"""A denoiser that can be told what shall come of a chunk, or nothing (classifier-free guidance, arXiv:2207.12598).

Shapes: B samples, O observation steps, F features of an observation step, C numbers of a command, H actions of a chunk,
A action size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dprl.networks.denoiser import Denoiser


class CommandedDenoiser(Denoiser):
    """Any denoiser, whose condition (B, O, F) may be followed by a command: (B, O, F + C + 1), see `commanded`.

    Without one it is told so: of F features, zeros and a flag of 0 are taken to follow.
    """

    def __init__(self, inner: Denoiser, feature_size: int, command_size: int) -> None:
        """Take a denoiser of F + C + 1 features.

        Args:
            inner: the denoiser.
            feature_size: F.
            command_size: C.
        """
        super().__init__()
        self.inner, self._feature_size, self._more = inner, feature_size, command_size + 1

    def embed(self, timestep: Tensor) -> Tensor:
        """See `Denoiser.embed`."""
        return self.inner.embed(timestep)

    def prepare(self, time: Tensor, condition: Tensor) -> Tensor:
        """See `Denoiser.prepare`."""
        return self.inner.prepare(time, self._whole(condition))

    def prepare_steps(self, timesteps: Tensor, condition: Tensor) -> Iterator[Tensor]:
        """See `Denoiser.prepare_steps`."""
        return self.inner.prepare_steps(timesteps, self._whole(condition))

    def _whole(self, condition: Tensor) -> Tensor:
        plain = condition.shape[-1] == self._feature_size
        return pad(condition, (0, self._more)) if plain else condition

    def denoise(self, noisy_actions: Tensor, prepared: Tensor) -> Tensor:
        """See `Denoiser.denoise`."""
        return self.inner.denoise(noisy_actions, prepared)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """See `Denoiser.compile`."""
        self.inner.compile(*args, **kwargs)


def commanded(condition: Tensor, command: Tensor, told: Tensor | None = None) -> Tensor:
    """Let a command (B, C) follow the condition (B, O, F), where `told` (B,) bool says so: (B, O, F + C + 1)."""
    flag = torch.ones_like(command[:, :1]) if told is None else told[:, None].to(command.dtype)
    more = torch.cat([command * flag, flag], dim=1)[:, None]
    return torch.cat([condition, more.expand(-1, condition.shape[1], -1)], dim=-1)
