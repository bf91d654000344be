"""What noisy chunks are worth: a network of observation, x_t and t, whose gradient steers denoising.

Shapes: B samples, O observation steps, F features of an observation step, H actions of a chunk, A action size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dprl.config import validate
from dprl.networks.ensemble import EnsembleMLP
from dprl.networks.mlp import Activation
from dprl.networks.timestep import SinusoidalEmbedding, check_time_size
from dprl.observations import TensorObservation

if TYPE_CHECKING:
    from dprl.policy.diffusion import DiffusionPolicy


@dataclass(frozen=True)
class NoisyCriticConfig:
    """The network."""

    hidden_size: int = 256
    n_layers: int = 4
    activation: Activation = "silu"
    time_size: int = 16
    """Size of the timestep embedding."""

    def __post_init__(self) -> None:
        validate(self, at_least={"hidden_size": 1, "n_layers": 1})
        check_time_size("time_size", self.time_size)


class NoisyCritic(nn.Module):
    """f(s, x_t, t) of what a diffusion policy observes and denoises; with an image encoder of its own.

    It is a `dprl.guidance.NoisyValue`.
    """

    def __init__(self, policy: DiffusionPolicy, config: NoisyCriticConfig) -> None:
        super().__init__()
        self.config, self._condition = config, policy.condition
        self.encoder = copy.deepcopy(policy.encoder)
        seen = policy.config.n_obs_steps * policy.feature_size
        chunk = policy.config.horizon * policy.features.action_size
        self.time = SinusoidalEmbedding(config.time_size)
        self.net = EnsembleMLP(
            1, seen + chunk + config.time_size, config.hidden_size, config.n_layers, config.activation
        )

    def see(self, obs: TensorObservation) -> Tensor:
        """Normalise and encode: (B, O, D), or named parts, -> (B, O·F)."""
        return self._condition(obs, encoder=self.encoder).flatten(1)

    def forward(self, seen: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """(B, O·F) of `see`, x_t (B, H, A) in normalised units, (B,) -> (B,)."""
        value: Tensor = self.net(torch.cat([seen, noisy.flatten(1), self.time(timesteps)], dim=1))
        return value[0]

    def noisy_at(self, obs: TensorObservation) -> Callable[[Tensor, int], Tensor]:
        """See `dprl.guidance.NoisyValue`."""
        seen = self.see(obs)
        return lambda noisy, t: self(seen, noisy, torch.full((len(noisy),), t, device=noisy.device))
