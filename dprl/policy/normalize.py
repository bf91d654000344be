"""The one normaliser: ranges to [-1, 1]."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

CONSTANT = 1e-4
"""A smaller range is jitter, not information (as in Diffusion Policy's code)."""


class Normalizer(Protocol):
    """Between units and what networks see."""

    def normalize(self, values: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        ...

    def unnormalize(self, values: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        ...


class MinMaxNormalizer(nn.Module):
    """Maps [low, high] to [-1, 1], number by number.

    A number that varied by less than `CONSTANT` is only shifted.
    """

    low: Tensor
    high: Tensor
    _middle: Tensor
    _half: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("low", -torch.ones(size))
        self.register_buffer("high", torch.ones(size))
        self.register_buffer("_middle", torch.zeros(size), persistent=False)
        self.register_buffer("_half", torch.ones(size), persistent=False)
        self.register_load_state_dict_post_hook(self._refresh)  # type: ignore[no-untyped-call]

    def fit(self, values: Tensor) -> None:
        """Take the range of `values` (n, size)."""
        self.low.copy_(values.amin(0))
        self.high.copy_(values.amax(0))
        self._refresh()

    def normalize(self, values: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return (values - self._middle) / self._half

    def unnormalize(self, values: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return values * self._half + self._middle

    def _refresh(self, *_: Any) -> None:
        """Compute what follows from the range, once and not at every decision."""
        half = (self.high - self.low) / 2
        self._middle.copy_((self.high + self.low) / 2)
        self._half.copy_(torch.where(2 * half < CONSTANT, 1.0, half))
