"""Embeddings of the diffusion timestep, the same in every denoiser."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from dprl.errors import check


def check_time_size(field: str, size: int) -> None:
    """Raise ConfigError naming `field` unless `size` can be that of a sinusoidal embedding."""
    check(size >= 4 and size % 2 == 0, field, size, "must be an even number of at least 4")


class SinusoidalEmbedding(nn.Module):
    """Half sines, half cosines of the timestep at frequencies from 1 down to 1/10000: (B,) -> (B, size).

    The positions of arXiv:1706.03762, section 3.5, with the exponent over (size / 2 - 1), as DDPM's code has it.

    Raises:
        ConfigError: `size` is odd or below 4.
    """

    frequencies: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        check_time_size("size", size)
        half = size // 2
        frequencies = torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed timesteps of any integer or float dtype, in the dtype of the module."""
        angle = timestep[:, None].to(self.frequencies.dtype) * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep, Linear, Mish, Linear: (B,) -> (B, size). `hidden` is the width between the two."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.sinusoid = SinusoidalEmbedding(size)
        self.net = nn.Sequential(nn.Linear(size, hidden), nn.Mish(), nn.Linear(hidden, size))

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed integer or float timesteps."""
        return cast("Tensor", self.net(self.sinusoid(timestep)))
