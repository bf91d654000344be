"""Residual MLPs: the denoiser and the critic of DPPO (arXiv:2409.00588, appendix on architectures)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from dprl.config import validate
from dprl.errors import check

Activation = Literal["relu", "mish"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "mish": nn.Mish}


@dataclass(frozen=True)
class MLPConfig:
    """A residual MLP denoiser."""

    hidden_size: int = 256
    """Width of every layer."""
    n_blocks: int = 1
    """Residual blocks of two layers each."""
    activation: Activation = "relu"
    time_size: int = 16
    """Size of the timestep embedding."""

    def __post_init__(self) -> None:
        validate(self, at_least={"hidden_size": 1, "n_blocks": 1})
        even = self.time_size >= 4 and self.time_size % 2 == 0
        check(even, "time_size", self.time_size, "must be an even number of at least 4")


class ResidualBlock(nn.Module):
    """x + W2 act(W1 act(x))."""

    def __init__(self, size: int, activation: Activation) -> None:
        super().__init__()
        self.act = _ACTIVATIONS[activation]()
        self.l1 = nn.Linear(size, size)
        self.l2 = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, size) -> (B, size)."""
        return cast("Tensor", x + self.l2(self.act(self.l1(self.act(x)))))


class ResidualMLP(nn.Sequential):
    """Linear, residual blocks, Linear: (B, n_inputs) -> (B, n_outputs)."""

    def __init__(self, n_inputs: int, n_outputs: int, hidden: int, n_blocks: int, activation: Activation) -> None:
        blocks = [ResidualBlock(hidden, activation) for _ in range(n_blocks)]
        super().__init__(nn.Linear(n_inputs, hidden), *blocks, nn.Linear(hidden, n_outputs))


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep, Linear, Mish, Linear: (B,) -> (B, size)."""

    frequencies: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(size, 2 * size), nn.Mish(), nn.Linear(2 * size, size))
        half = size // 2
        frequencies = torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed integer timesteps."""
        angle = timestep[:, None] * self.frequencies
        return cast("Tensor", self.net(torch.cat([angle.sin(), angle.cos()], dim=-1)))


class DenoisingMLP(nn.Module):
    """Predicts the noise in a chunk from [flattened chunk, timestep embedding, condition]."""

    def __init__(self, horizon: int, action_size: int, condition_size: int, config: MLPConfig) -> None:
        super().__init__()
        n_inputs = horizon * action_size + config.time_size + condition_size
        self.time = TimestepEmbedding(config.time_size)
        self.net = ResidualMLP(n_inputs, horizon * action_size, config.hidden_size, config.n_blocks, config.activation)

    def forward(self, noisy_actions: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """(B, H, A), (B,) or (1,) for one timestep for all, (B, C) -> (B, H, A)."""
        time = self.time(timestep).expand(len(noisy_actions), -1)
        prediction = self.net(torch.cat([noisy_actions.flatten(1), time, condition], dim=-1))
        return cast("Tensor", prediction.view_as(noisy_actions))


class ValueNet(nn.Module):
    """V(s): (B, C) -> (B,)."""

    def __init__(self, condition_size: int, hidden_size: int, activation: Activation) -> None:
        super().__init__()
        self.net = ResidualMLP(condition_size, 1, hidden_size, 1, activation)

    def forward(self, condition: Tensor) -> Tensor:
        """Return the value of each state."""
        return cast("Tensor", self.net(condition).squeeze(-1))
