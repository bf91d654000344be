"""Residual MLPs: the denoiser and the critic of DPPO (arXiv:2409.00588, appendix on architectures)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from dprl.config import validate
from dprl.networks.denoiser import MAX_PREPARED, Denoiser
from dprl.networks.mish import mish
from dprl.networks.timestep import TimestepEmbedding, check_time_size

Activation = Literal["relu", "mish", "silu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "mish": mish, "silu": silu}


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
        check_time_size("time_size", self.time_size)


class ResidualBlock(nn.Module):
    """x + W2 act(W1 act(x))."""

    def __init__(self, size: int, activation: Activation) -> None:
        super().__init__()
        self.act = ACTIVATIONS[activation]
        self.l1 = nn.Linear(size, size)
        self.l2 = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, size) -> (B, size)."""
        act, l1, l2 = self.act, self.l1, self.l2  # a layer's call costs as much as a small batch's product
        return x + linear(act(linear(act(x), l1.weight, l1.bias)), l2.weight, l2.bias)


class ResidualMLP(nn.Sequential):
    """Linear, residual blocks, Linear: (B, n_inputs) -> (B, n_outputs)."""

    def __init__(self, n_inputs: int, n_outputs: int, hidden: int, n_blocks: int, activation: Activation) -> None:
        blocks = [ResidualBlock(hidden, activation) for _ in range(n_blocks)]
        super().__init__(nn.Linear(n_inputs, hidden), *blocks, nn.Linear(hidden, n_outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_inputs) -> (B, n_outputs). Of its own, because torch.compile leaves Sequential's as it is."""
        for layer in self:
            x = layer(x)
        return x


class FlatDenoiser(Denoiser):
    """Predicts from one vector, [flattened chunk, timestep embedding, condition]."""

    def __init__(self, n_numbers: int, time: nn.Module, time_size: int, net: nn.Sequential) -> None:
        """Take the networks.

        Args:
            n_numbers: H·A, of a chunk.
            time: embeds timesteps, (n,) -> (n, time_size).
            time_size: its size.
            net: Linear and what follows it.
        """
        super().__init__()
        self.n_numbers, self.time_size = n_numbers, time_size
        self.time, self.net = time, net

    def embed(self, timestep: Tensor) -> Tensor:
        """See `Denoiser.embed`."""
        return cast("Tensor", self.time(timestep))

    def prepare(self, time: Tensor, condition: Tensor) -> Tensor:
        """What timestep and condition add to the first layer: (B, time) or (1, time), (B, O, F) -> (B, hidden)."""
        first = cast("nn.Linear", self.net[0])
        known = torch.cat([time.expand(len(condition), -1), condition.flatten(1)], dim=-1)
        return linear(known, first.weight[:, self.n_numbers :], first.bias)

    def prepare_steps(self, timesteps: Tensor, condition: Tensor) -> Iterator[Tensor]:
        """See `Denoiser.prepare_steps`. The condition adds the same at every step, so it is multiplied once."""
        first = cast("nn.Linear", self.net[0])
        of_time, of_condition = first.weight[:, self.n_numbers :].tensor_split([self.time_size], dim=1)
        known, times = linear(condition.flatten(1), of_condition, first.bias), linear(self.embed(timesteps), of_time)
        if len(condition) * len(timesteps) <= MAX_PREPARED:
            return iter((known + times[:, None]).unbind(0))
        return (known + time for time in times)

    def denoise(self, noisy_actions: Tensor, prepared: Tensor) -> Tensor:
        """See `Denoiser.denoise`."""
        first, *rest = self.net
        flat, weight = noisy_actions.flatten(1), cast("nn.Linear", first).weight
        x = torch.addmm(prepared, flat, weight[:, : self.n_numbers].t())
        for layer in rest:
            x = layer(x)
        return x.view_as(noisy_actions)


class DenoisingMLP(FlatDenoiser):
    """A residual MLP."""

    def __init__(self, horizon: int, action_size: int, n_obs_steps: int, feature_size: int, config: MLPConfig) -> None:
        n_numbers, size = horizon * action_size, config.time_size
        n_inputs = n_numbers + size + n_obs_steps * feature_size
        super().__init__(
            n_numbers,
            TimestepEmbedding(size, 2 * size),
            size,
            ResidualMLP(n_inputs, n_numbers, config.hidden_size, config.n_blocks, config.activation),
        )


class ValueNet(nn.Module):
    """V(s): (B, O, F) -> (B,)."""

    def __init__(self, n_obs_steps: int, feature_size: int, hidden_size: int, activation: Activation) -> None:
        super().__init__()
        self.net = ResidualMLP(n_obs_steps * feature_size, 1, hidden_size, 1, activation)

    def forward(self, condition: Tensor) -> Tensor:
        """Return the value of each state."""
        return cast("Tensor", self.net(condition.flatten(1)).squeeze(-1))
