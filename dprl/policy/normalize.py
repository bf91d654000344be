"""The one normaliser: ranges to [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MinMaxNormalizer(nn.Module):
    """Maps [low, high] to [-1, 1], number by number; a number that never varied is only shifted."""

    low: Tensor
    high: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("low", -torch.ones(size))
        self.register_buffer("high", torch.ones(size))

    def fit(self, values: Tensor) -> None:
        """Take the range of `values` (n, size)."""
        self.low.copy_(values.amin(0))
        self.high.copy_(values.amax(0))

    def normalize(self, values: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return (values - self._middle) / self._half

    def unnormalize(self, values: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return values * self._half + self._middle

    @property
    def _middle(self) -> Tensor:
        return (self.high + self.low) / 2

    @property
    def _half(self) -> Tensor:
        half = (self.high - self.low) / 2
        return torch.where(half < 1e-6, torch.ones_like(half), half)
