"""Diagonal Gaussians, number by number: what every density, every divergence and every ratio here is made of."""

from __future__ import annotations

import math

from torch import Tensor

LOG_SQRT_2PI = math.log(math.sqrt(2 * math.pi))


def normal_log_prob(x: Tensor, mean: Tensor | float, std: Tensor) -> Tensor:
    """Log N(x; mean, std²) of each number; the shapes broadcast."""
    return -0.5 * ((x - mean) / std) ** 2 - std.log() - LOG_SQRT_2PI


def normal_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """KL(N(mean, std²) || N(other_mean, other_std²)) of each number."""
    return (other_std / std).log() + (std**2 + (mean - other_mean) ** 2) / (2 * other_std**2) - 0.5


def normal_w2(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """The squared 2-Wasserstein distance between two Gaussians, of each number."""
    return (mean - other_mean) ** 2 + (std - other_std) ** 2
