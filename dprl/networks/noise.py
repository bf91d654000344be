"""Exploration noise whose size is learned: a standard deviation for each denoising step (ReinFlow), or DDIM's η.

Shapes: B samples, O observation steps, F features of an observation step, H actions of a chunk, A action size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dprl.config import validate
from dprl.errors import check
from dprl.networks.timestep import SinusoidalEmbedding

TIME_SIZE = 16
LEAST_STD = 0.054
"""Below e^-2 / √(2π) a density peaks above the clamp of log-probs at 2, and its gradient is lost."""


@dataclass(frozen=True)
class LearnedNoiseConfig:
    """How much noise is learned, and within which bounds."""

    what: Literal["none", "std", "eta"] = "none"
    """`none` is learned; `std`: each tuned step's standard deviation, from observation and timestep (arXiv:2505.22094);
    `eta`: DDIM's η, which scales the solver's own (arXiv:2409.00588, appendix)."""
    low: float = 0.1
    """Least std, in normalised units, or least η."""
    high: float | None = None
    """Largest std or η. Default: 0.24 for a std, 1 for η, which cannot be larger."""
    start: float = 0.5
    """Where between the two it begins, in (0, 1)."""
    per_state: bool = True
    """Whether η depends on the observation; a std always does."""
    per_action: bool = True
    """Whether η is another for every number of an action; a std always is, and for every action of the chunk."""
    hidden_size: int = 64
    """Width of the two layers."""

    def __post_init__(self) -> None:
        validate(self, at_least={"hidden_size": 1}, above={"low": 0})
        check(self.low < self.highest, "high", self.highest, f"must be above low, which is {self.low}")
        check(0 < self.start < 1, "start", self.start, "must be between 0 and 1")
        if self.what == "std":
            check(self.low >= LEAST_STD, "low", self.low, f"of a std must be at least {LEAST_STD}")
        if self.what == "eta":
            check(self.highest <= 1, "high", self.highest, "of eta must be at most 1")

    @property
    def highest(self) -> float:
        """`high`, or its default."""
        return self.high if self.high is not None else (1.0 if self.what == "eta" else 0.24)


class Bounded(nn.Module):
    """A perceptron whose outputs lie in (low, high), and begin at `start` of the way whatever it sees."""

    def __init__(self, n_inputs: int, n_outputs: int, config: LearnedNoiseConfig) -> None:
        super().__init__()
        self.low, self.high, hidden = config.low, config.highest, config.hidden_size
        last = nn.Linear(hidden, n_outputs)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(config.start / (1 - config.start)))
        self.net = nn.Sequential(nn.Linear(n_inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), last)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_inputs) -> (B, n_outputs)."""
        return self.low + (self.high - self.low) * torch.sigmoid(self.net(x))


class NoiseStd(nn.Module):
    """σ(obs, t) of ReinFlow (arXiv:2505.22094, eq. 9): (B, O, F), timesteps (B,) or (1,) -> (B, H, A)."""

    def __init__(self, condition_size: int, horizon: int, action_size: int, config: LearnedNoiseConfig) -> None:
        super().__init__()
        self.shape = horizon, action_size
        self.time = SinusoidalEmbedding(TIME_SIZE)
        self.net = Bounded(condition_size + TIME_SIZE, horizon * action_size, config)

    def forward(self, condition: Tensor, timestep: Tensor) -> Tensor:
        """Return each number's standard deviation."""
        time = self.time(timestep).expand(len(condition), -1)
        std: Tensor = self.net(torch.cat([condition.flatten(1), time], dim=1)).unflatten(1, self.shape)
        return std


class Eta(nn.Module):
    """DDIM's η (arXiv:2010.02502, eq. 16): (B, O, F) -> (B, 1, A or 1)."""

    def __init__(self, condition_size: int, action_size: int, config: LearnedNoiseConfig) -> None:
        super().__init__()
        self.per_state = config.per_state
        self.net = Bounded(condition_size, action_size if config.per_action else 1, config)

    def forward(self, condition: Tensor) -> Tensor:
        """Return each chunk's η."""
        seen = condition.flatten(1)
        eta: Tensor = self.net(seen if self.per_state else torch.zeros_like(seen))[:, None]
        return eta
