"""DPPO's mathematics (arXiv:2409.00588), in the paper's order: the likelihood, the advantage, the two losses.

Every environment decision t is a chain of denoising steps k = K'-1 .. 0 with x_k ~ N(mean(x_{k+1}, k, obs), std²), so

    log π(x_k | x_{k+1}, obs)     mean or sum over the numbers that were executed, each clamped        `chunk_log_prob`
    Â(t, k) = γ_d^k Â(t)          Â(t) by GAE over decisions (`dprl.returns.gae`), normalised     `normalized_advantage`
    ε_k                           grows exponentially from the noisiest step to the last                  `clip_ranges`
    L = -E min(ρ Â, clip(ρ, 1 - ε_k, 1 + ε_k) Â),   ρ = π / π_old of one denoising step                   `policy_loss`
    L_V = E (V(s) - R)² / 2                                                                                `value_loss`

Shapes: B pairs of (decision, denoising step), K' tuned steps, H actions of a chunk, A action size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dprl.agents.dppo_config import DPPOConfig

LOG_PROB_RANGE = (-5.0, 2.0)
"""To which the log-density of a number that a Gaussian draws is clamped."""
MAX_LOG_RATIO = 20.0
"""Beyond it a ratio is beyond any clip, and of summed log-probs could be infinite."""


def over_chunk(values: Tensor, executed: Tensor | int, reduction: str = "mean") -> Tensor:
    """Average or sum over the numbers of the first `executed` actions: (B, H, A), (B,) -> (B,)."""
    counts = torch.arange(values.shape[1], device=values.device) < torch.as_tensor(executed).view(-1, 1)
    total = (values * counts[..., None]).sum(dim=(1, 2))
    return total if reduction == "sum" else total / (counts.sum(1) * values.shape[2])


def chunk_log_prob(
    log_prob: Tensor, executed: Tensor | int, reduction: str = "mean", limits: tuple[float, float] = LOG_PROB_RANGE
) -> Tensor:
    """Clamped log-densities of the actions that were executed, averaged or summed: (B, H, A), (B,) -> (B,)."""
    return over_chunk(log_prob.clamp(*limits), executed, reduction)


def clip_ranges(config: DPPOConfig) -> Tensor:
    """Clip of each tuned step k: (K',), growing from `clip_range_base` at K'-1 to `clip_range` at 0."""
    k = torch.arange(config.tuned_steps)
    progress = 1 - k / max(config.tuned_steps - 1, 1)
    growth = torch.expm1(config.clip_range_rate * progress) / math.expm1(config.clip_range_rate)
    return config.clip_range_base + (config.clip_range - config.clip_range_base) * growth


def clip_bounds(clip: Tensor, numbers: Tensor | int = 1) -> Tensor:
    """Least and largest ratio of pairs, (B,) -> (2, B); of sums of `numbers` (B,) log-probs, those of their mean."""
    return torch.stack([1 - clip, 1 + clip]) ** numbers


def normalized_advantage(advantage: Tensor, quantiles: tuple[float, ...] = (0.0, 1.0)) -> Tensor:
    """A minibatch's advantages (B,) with mean 0 and standard deviation 1, clipped to their quantiles."""
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    low, high = quantiles
    return advantage if (low, high) == (0, 1) else advantage.clamp(advantage.quantile(low), advantage.quantile(high))


def policy_loss(log_ratio: Tensor, advantage: Tensor, bounds: Tensor) -> Tensor:
    """PPO's clipped objective on pairs, (B,), bounds (2, B): the advantage of step k is γ_d^k times its decision's."""
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    return -torch.min(advantage * ratio, advantage * ratio.clamp(*bounds)).mean()


def value_loss(value: Tensor, returns: Tensor, old_value: Tensor | None = None, clip: float | None = None) -> Tensor:
    """Half the mean squared error of V, all (B,); flat where V has moved by more than `clip` and gained by it."""
    error = (value - returns) ** 2
    if clip is not None and old_value is not None:
        error = torch.max(error, (old_value + (value - old_value).clamp(-clip, clip) - returns) ** 2)
    return 0.5 * error.mean()
