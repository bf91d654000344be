"""What chunks are worth: a network of observation and chunk, clean or noisy, that scores samples and steers them.

Shapes: B samples, O observation steps, F features of an observation step, H actions of a chunk, A action size,
n networks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from dprl import checkpoint
from dprl.config import from_json, to_json, validate
from dprl.errors import CheckpointError, ConfigError
from dprl.networks.ensemble import EnsembleMLP
from dprl.networks.mlp import Activation
from dprl.networks.timestep import SinusoidalEmbedding, check_time_size
from dprl.observations import TensorObservation
from dprl.seeding import draw_normal

if TYPE_CHECKING:
    from dprl.diffusion import NoiseSchedule
    from dprl.policy.base import Policy

CONFIG_FILE, MODEL_FILE = "value.json", "value.safetensors"
CLEAN_LEVEL = 0
"""Of chunks without noise; those at the training timestep t are of the level t + 1."""


@dataclass(frozen=True)
class ChunkValueConfig:
    """The networks."""

    hidden_size: int = 256
    n_layers: int = 3
    activation: Activation = "silu"
    time_size: int = 16
    """Size of the embedding of a chunk's noise."""
    n_networks: int = 2
    """Their mean counts; where data are few, they disagree."""
    noised: bool = True
    """Whether they also learn what noisy chunks are worth, for guides whose gradient is `noisy`."""
    worth: Literal["number", "log_probability"] = "number"
    """What they say: a number, or the logarithm of the probability of success."""

    def __post_init__(self) -> None:
        validate(self, at_least={"hidden_size": 1, "n_layers": 1, "n_networks": 1})
        check_time_size("time_size", self.time_size)


class ChunkValue(nn.Module):
    """J(s, chunk) of what a policy observes and draws; with an image encoder of its own.

    It is a `dprl.guidance.Value` and a `Scorer`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, policy: Policy, config: ChunkValueConfig) -> None:
        """Make networks; `ChunkValue.of` makes those that know noise."""
        super().__init__()
        self.config, self._condition, self._normalize = config, policy.condition, policy.chunk_normalizer.normalize
        self.encoder = copy.deepcopy(policy.encoder)
        seen = policy.config.n_obs_steps * policy.feature_size
        chunk = policy.config.horizon * policy.chunk_size
        self.time = SinusoidalEmbedding(config.time_size)
        self.net = EnsembleMLP(
            config.n_networks,
            seen + chunk + config.time_size,
            config.hidden_size,
            config.n_layers,
            config.activation,
        )
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    @staticmethod
    def of(policy: Policy, config: ChunkValueConfig) -> ChunkValue:
        """Make networks for what `policy` observes and draws."""
        return (NoisyChunkValue if config.noised else ChunkValue)(policy, config)

    @property
    def sees_as(self) -> nn.Module:
        """The policy by whose normalisation it sees."""
        policy: nn.Module = cast("Any", self._condition).__self__
        return policy

    def see(self, obs: TensorObservation, generator: torch.Generator | None = None) -> Tensor:
        """Normalise and encode: (B, O, D), or named parts, -> (B, O·F). A generator augments images."""
        return self._condition(obs, generator, encoder=self.encoder).flatten(1)

    @staticmethod
    def noised(schedule: NoiseSchedule, clean: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
        """Add the noise of `levels` (B,) to normalised chunks (B, H, A), as the policy's own have it."""
        noise = draw_normal(clean.shape, generator, clean.device)
        noisy = schedule.add_noise(clean, noise, (levels - 1).clamp(min=0))
        return torch.where((levels == CLEAN_LEVEL)[:, None, None], clean, noisy)

    def forward(self, seen: Tensor, chunks: Tensor, levels: Tensor) -> Tensor:
        """What the networks say, in units of `std` around `mean`, or as logits.

        (B, O·F) of `see`, chunks (B, H, A) in normalised units, (B,) levels of noise, `CLEAN_LEVEL` or t + 1 -> (n, B).
        """
        value: Tensor = self.net(torch.cat([seen, chunks.flatten(1), self.time(levels)], dim=1))
        return value

    def worths(self, seen: Tensor, chunks: Tensor, level: int = CLEAN_LEVEL) -> Tensor:
        """What each network takes chunks to be worth: as `forward`, -> (n, B)."""
        said = self(seen, chunks, torch.full((len(chunks),), level, device=chunks.device))
        return logsigmoid(said) if self.config.worth == "log_probability" else self.mean + self.std * said

    def at(self, obs: TensorObservation) -> Callable[[Tensor], Tensor]:
        """See `dprl.guidance.Value`: the mean of the networks'."""
        seen = self.see(obs)
        return lambda actions: self.worths(seen, self._normalize(actions)).mean(0)

    @torch.no_grad()
    def score(self, obs: TensorObservation, actions: Tensor) -> Tensor:
        """See `Scorer.score`."""
        return self.at(obs)(actions)

    @torch.no_grad()
    def each(self, obs: TensorObservation, actions: Tensor) -> Tensor:
        """What each network says of chunks (B, H, A): (n, B)."""
        return self.worths(self.see(obs), self._normalize(actions))

    def write(self, folder: Path) -> None:
        """Write value.json and value.safetensors into an existing folder."""
        checkpoint.write_json(folder / CONFIG_FILE, to_json(self.config))
        checkpoint.save_tensors(folder / MODEL_FILE, self.state_dict())

    @staticmethod
    def load(policy: Policy, folder: Path) -> ChunkValue | None:
        """Read what `write` wrote for `policy`; None where there is none.

        Raises:
            CheckpointError: damaged, or of another policy.
        """
        if not (folder / CONFIG_FILE).is_file():
            return None
        file = folder / CONFIG_FILE
        try:
            value = ChunkValue.of(policy, from_json(ChunkValueConfig, checkpoint.read_json(file), str(file)))
            value.load_state_dict(checkpoint.load_tensors(folder / MODEL_FILE))
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        except RuntimeError as error:
            raise CheckpointError(f"'{folder / MODEL_FILE}' does not fit its policy and config: {error}") from error
        return value.eval().requires_grad_(False)


class NoisyChunkValue(ChunkValue):
    """The same of noisy chunks, too: also a `dprl.guidance.NoisyValue`."""

    def noisy_at(self, obs: TensorObservation) -> Callable[[Tensor, int], Tensor]:
        """See `dprl.guidance.NoisyValue`."""
        seen = self.see(obs)
        return lambda noisy, t: self.worths(seen, noisy, t + 1).mean(0)
