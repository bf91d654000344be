"""Returns and advantages: the one GAE, the one reward scaler.

Shapes: T decisions, N environments. A decision is one action chunk; `gamma` discounts per decision.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    ended: Tensor,
    gamma: Tensor | float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16), correct across resets.

    Args:
        reward: (T, N).
        value: (T, N), V of the observation each decision saw.
        next_value: (T, N), V of the observation it led to, taken before any reset.
        terminated: (T, N) bool; the future is worth nothing.
        ended: (T, N) bool; terminated or truncated. A truncated decision bootstraps from `next_value`, but no trace
            crosses the reset that follows it.
        gamma: discount of what follows a decision; one, or (T, N).
        gae_lambda: decay of the trace.

    Returns:
        Advantages (T, N).
    """
    delta = reward + gamma * next_value * ~terminated - value
    decay = gamma * gae_lambda * (~ended).to(delta.dtype)
    trace, advantage = torch.zeros_like(delta[0]), []
    for now, kept in zip(delta.flip(0).unbind(), decay.flip(0).unbind(), strict=True):
        trace = now + kept * trace
        advantage.append(trace)
    return torch.stack(advantage).flip(0)


def explained_variance(prediction: Tensor, target: Tensor) -> float:
    """Return 1 - Var(target - prediction) / Var(target); NaN where the targets do not vary."""
    variance = target.var()
    return float("nan") if variance == 0 else float(1 - (target - prediction).var() / variance)


class RunningReturnStd:
    """Divides rewards by the running standard deviation of the discounted return, clipped to ±`clip`.

    Per environment, R <- gamma R + r, from 0 at the start of every episode; one variance over all of them, by
    Chan's parallel update. The same gamma as training's.
    """

    def __init__(self, n_envs: int, gamma: float, clip: float = 10.0) -> None:
        self._gamma = gamma
        self._clip = clip
        self._returns = torch.zeros(n_envs, dtype=torch.float64)
        self._moments = torch.zeros(3, dtype=torch.float64)  # count, mean, sum of squared deviations

    @property
    def std(self) -> float:
        """The current divisor; 1 until two returns that differ have been seen."""
        count, _, squares = self._moments.tolist()
        variance = squares / count if count > 1 else 0.0
        return float(variance**0.5) if variance > 1e-12 else 1.0

    def __call__(self, reward: Tensor, ended: Tensor, environments: Tensor | None = None) -> Tensor:
        """Take in rewards (T, N) and episode ends (T, N); return the scaled rewards (T, N).

        `environments` (N,) are their indices where some are missing (default: none is); the missing start anew.
        """
        rows = torch.arange(len(self._returns)) if environments is None else environments
        running, returns = self._returns[rows], []
        for now, over in zip(reward.cpu().double(), ended.cpu(), strict=True):
            returns.append(running * self._gamma + now)
            running = returns[-1].masked_fill(over, 0.0)
        self._observe(torch.stack(returns))
        self._returns = torch.zeros_like(self._returns).index_put((rows,), running)
        return (reward / self.std).clamp(-self._clip, self._clip)

    def state(self) -> dict[str, Tensor]:
        """Return all that a resumed run needs."""
        return {"returns": self._returns, "moments": self._moments}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` returned."""
        self._returns, self._moments = state["returns"].clone(), state["moments"].clone()

    def _observe(self, batch: Tensor) -> None:
        count, mean, squares = self._moments
        n, batch_mean = batch.numel(), batch.mean()
        delta, total = batch_mean - mean, count + n
        squares = squares + ((batch - batch_mean) ** 2).sum() + delta**2 * count * n / total
        self._moments = torch.stack([total, mean + delta * n / total, squares])
