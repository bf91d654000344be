"""IDQL's denoiser, a residual MLP with layer norm and dropout (arXiv:2304.10573, section 5 and appendix)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dprl.config import validate
from dprl.errors import check
from dprl.networks.mlp import ACTIVATIONS, Activation, FlatDenoiser

FREQUENCY_STD = 0.2
"""Of the initial frequencies."""


@dataclass(frozen=True)
class LNResNetConfig:
    """The authors' sizes."""

    hidden_size: int = 256
    """Width of the residual stream."""
    n_blocks: int = 3
    expansion: int = 4
    """Width within a block, over `hidden_size`."""
    dropout: float = 0.1
    """Share of each block's inputs that is dropped in training."""
    activation: Activation = "mish"
    n_frequencies: int = 32
    """Learned frequencies of the timestep, a sine and a cosine each."""
    time_size: int = 128
    """Size of the timestep embedding."""

    def __post_init__(self) -> None:
        counts = ("hidden_size", "n_blocks", "expansion", "n_frequencies", "time_size")
        validate(self, at_least=dict.fromkeys(counts, 1))
        check(0 <= self.dropout < 1, "dropout", self.dropout, "must be at least 0 and below 1")


class LNResNetBlock(nn.Module):
    """x + W2 act(W1 norm(dropout(x)))."""

    def __init__(self, config: LNResNetConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.act = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(size)
        self.l1 = nn.Linear(size, config.expansion * size)
        self.l2 = nn.Linear(config.expansion * size, size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, size) -> (B, size)."""
        return x + cast("Tensor", self.l2(self.act(self.l1(self.norm(self.dropout(x))))))


class Head(nn.Module):
    """W act(x): the activation before the last layer matters."""

    def __init__(self, n_outputs: int, config: LNResNetConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.activation]
        self.linear = nn.Linear(config.hidden_size, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, size) -> (B, n_outputs)."""
        return linear(self.act(x), self.linear.weight, self.linear.bias)


class FourierEmbedding(nn.Module):
    """Cosines and sines of the timestep at learned frequencies, then two layers: (B,) -> (B, time_size)."""

    def __init__(self, config: LNResNetConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.activation]
        self.frequencies = nn.Parameter(FREQUENCY_STD * torch.randn(config.n_frequencies))
        self.l1 = nn.Linear(2 * config.n_frequencies, config.time_size)
        self.l2 = nn.Linear(config.time_size, config.time_size)

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed integer or float timesteps."""
        angle = 2 * math.pi * timestep[:, None].to(self.frequencies.dtype) * self.frequencies
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return cast("Tensor", self.l2(self.act(self.l1(waves))))


class DenoisingLNResNet(FlatDenoiser):
    """Predicts from [flattened chunk, timestep embedding, condition]."""

    def __init__(
        self, horizon: int, action_size: int, n_obs_steps: int, feature_size: int, config: LNResNetConfig
    ) -> None:
        n_numbers = horizon * action_size
        n_inputs = n_numbers + config.time_size + n_obs_steps * feature_size
        blocks = [LNResNetBlock(config) for _ in range(config.n_blocks)]
        net = nn.Sequential(nn.Linear(n_inputs, config.hidden_size), *blocks, Head(n_numbers, config))
        super().__init__(n_numbers, FourierEmbedding(config), config.time_size, net)
