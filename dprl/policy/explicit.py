"""Explicit policies, which output actions or a density over them: mean squared error, Gaussian, mixture, LSTM mixture.

The competitors of arXiv:2303.04137, section V, after robomimic (arXiv:2108.03298). A chunk is one vector to them: a
mixture component spans all of its actions.

Shapes: B samples, O observation steps, F features of an observation step, H actions of a chunk, A action size, M modes.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dprl.config import validate
from dprl.diffusion import normal_log_prob
from dprl.errors import check
from dprl.networks.mlp import Activation, ResidualMLP
from dprl.observations import TensorObservation
from dprl.policy.base import Policy, PolicyConfig, masked_mean
from dprl.policy.control import InferenceConfig, check_temperature
from dprl.seeding import draw_normal, draw_uniform

MAX_STD = 2.0


@dataclass(frozen=True)
class ExplicitConfig(PolicyConfig):
    """A residual MLP on the observations."""

    hidden_size: int = 256
    """Width of every layer."""
    n_blocks: int = 2
    """Residual blocks of two layers each."""
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self, at_least={"hidden_size": 1, "n_blocks": 1})


@dataclass(frozen=True)
class MSEConfig(ExplicitConfig):
    """Regression on the actions: the mean of what was demonstrated, between the modes where there are several."""


@dataclass(frozen=True)
class GaussianConfig(ExplicitConfig):
    """A Gaussian whose mean and standard deviation depend on the observation."""

    min_std: float = 0.01
    """Floor of the standard deviation, in normalised units."""

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self, above={"min_std": 0})
        check(self.min_std < MAX_STD, "min_std", self.min_std, f"must be below {MAX_STD}")


@dataclass(frozen=True)
class MixtureConfig(PolicyConfig):
    """A mixture of Gaussians on whatever network."""

    min_std: float = 0.01
    """Floor of the standard deviations, in normalised units."""
    n_modes: int = 5
    """M."""
    low_noise_sampling: bool = True
    """Sample a mode and return its mean, as robomimic evaluates; otherwise sample the mode's Gaussian too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self, at_least={"n_modes": 1}, above={"min_std": 0})
        check(self.min_std < MAX_STD, "min_std", self.min_std, f"must be below {MAX_STD}")


@dataclass(frozen=True)
class GMMConfig(MixtureConfig, ExplicitConfig):
    """A mixture of Gaussians on a residual MLP."""


@dataclass(frozen=True)
class LSTMGMMConfig(MixtureConfig):
    """A mixture on top of an LSTM that reads the observation history (robomimic's BC-RNN)."""

    horizon: int = 1
    """H, actions in a predicted chunk."""
    n_obs_steps: int = 10
    """O, length of the history."""
    hidden_size: int = 256
    """Width of the LSTM."""
    n_layers: int = 2
    """Layers of the LSTM."""

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self, at_least={"hidden_size": 1, "n_layers": 1})


class Explicit(Policy):
    """A trunk from observations to `n_outputs` numbers."""

    @abstractmethod
    def _n_outputs(self) -> int:
        """How many numbers the trunk gives."""

    @abstractmethod
    def _of_condition(self, condition: Tensor) -> Tensor:
        """(B, O, F) -> (B, n_outputs)."""

    def _outputs(self, obs: TensorObservation, generator: torch.Generator | None = None) -> Tensor:
        """(B, n_outputs). A generator augments images, in training."""
        return self._of_condition(self.condition(obs, generator if self.training else None))

    @property
    def _chunk_size(self) -> int:
        return self.config.horizon * self.features.action_size

    def _chunk(self, values: Tensor) -> Tensor:
        """(..., H·A) -> (..., H, A)."""
        chunk: Tensor = values.unflatten(-1, (self.config.horizon, self.features.action_size))
        return chunk


class ExplicitMLP(Explicit):
    """The trunk is a residual MLP on the observations, flat."""

    config: ExplicitConfig

    def _build(self, feature_size: int) -> None:
        config = self.config
        n_inputs = config.n_obs_steps * feature_size
        self.net = ResidualMLP(n_inputs, self._n_outputs(), config.hidden_size, config.n_blocks, config.activation)

    def _of_condition(self, condition: Tensor) -> Tensor:
        return cast("Tensor", self.net(condition.flatten(1)))


class MSEPolicy(ExplicitMLP):
    """Outputs the chunk."""

    name = "mse"
    config_class = MSEConfig

    def _n_outputs(self) -> int:
        return self._chunk_size

    def loss(
        self, obs: TensorObservation, actions: Tensor, *, valid: Tensor | None = None, generator: torch.Generator
    ) -> Tensor:
        """Return the mean squared error of normalised actions, see `Policy.loss`."""
        target = self.targets(obs, actions, valid)
        return masked_mean((self._chunk(self._outputs(obs, generator)) - target) ** 2, valid)

    @torch.no_grad()
    def sample(
        self, obs: TensorObservation, *, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Return the one chunk there is, see `Policy.sample`."""
        check_temperature(temperature)
        return self.action_normalizer.unnormalize(self._chunk(self._outputs(self.checked(obs))))

    def check_inference(self, inference: InferenceConfig) -> None:
        """See `Policy.check_inference`."""
        super().check_inference(inference)
        check(inference.temperature == 1, "temperature", inference.temperature, "policies of type mse draw nothing")


class _Mixture(Explicit):
    """Outputs logits, means and standard deviations of M modes."""

    config: MixtureConfig | GaussianConfig

    @property
    def _modes(self) -> int:
        return self.config.n_modes if isinstance(self.config, MixtureConfig) else 1

    @property
    def _low_noise(self) -> bool:
        return isinstance(self.config, MixtureConfig) and self.config.low_noise_sampling

    def _n_outputs(self) -> int:
        return self._modes * (1 + 2 * self._chunk_size)

    def mixture(self, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights (B, M), means and stds (B, M, H, A), normalised, of conditions (B, O, F)."""
        return self._split(self._of_condition(condition))

    def _mixture(self, obs: TensorObservation, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        return self._split(self._outputs(obs, generator))

    def _split(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        modes, size = self._modes, self._chunk_size
        weight, mean, spread = outputs.split([modes, modes * size, modes * size], dim=-1)
        std = self.config.min_std + (MAX_STD - self.config.min_std) * torch.sigmoid(spread - 2.0)
        return (
            weight.log_softmax(-1),
            self._chunk(mean.unflatten(-1, (modes, size))),
            self._chunk(std.unflatten(-1, (modes, size))),
        )

    def loss(
        self, obs: TensorObservation, actions: Tensor, *, valid: Tensor | None = None, generator: torch.Generator
    ) -> Tensor:
        """Return the negative log-likelihood per number of the chunk, see `Policy.loss`."""
        target = self.targets(obs, actions, valid)[:, None]
        log_weight, mean, std = self._mixture(obs, generator)
        log_prob = normal_log_prob(target, mean, std).sum(-1)
        if valid is None:
            valid = torch.ones(log_prob.shape[0], log_prob.shape[2], device=log_prob.device)
        per_chunk = torch.logsumexp(log_weight + (log_prob * valid[:, None]).sum(-1), dim=-1)
        return -per_chunk.sum() / (valid.sum().clamp(min=1) * self.features.action_size)

    @torch.no_grad()
    def sample(
        self, obs: TensorObservation, *, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Draw a mode and a chunk from it; at temperature 0 the likeliest mode's mean. See `Policy.sample`."""
        log_weight, mean, std = self._mixture(self.checked(obs))
        mode = draw_category(log_weight, temperature, generator)
        rows = torch.arange(len(mode), device=mode.device)
        chunk = mean[rows, mode]
        if not self._low_noise:
            chunk = chunk + temperature * std[rows, mode] * draw_normal(chunk.shape, generator, chunk.device)
        return self.action_normalizer.unnormalize(chunk)


class GaussianPolicy(_Mixture, ExplicitMLP):
    """One mode, sampled with its spread."""

    name = "gaussian"
    config_class = GaussianConfig
    config: GaussianConfig


class GMMPolicy(_Mixture, ExplicitMLP):
    """M modes."""

    name = "gmm"
    weighs_samples = False
    config_class = GMMConfig
    config: GMMConfig


class LSTMGMMPolicy(_Mixture):
    """M modes from an LSTM's last output."""

    name = "lstm_gmm"
    weighs_samples = False
    config_class = LSTMGMMConfig
    config: LSTMGMMConfig

    def _build(self, feature_size: int) -> None:
        config = self.config
        self.lstm = nn.LSTM(feature_size, config.hidden_size, config.n_layers, batch_first=True)
        self.net = nn.Linear(config.hidden_size, self._n_outputs())

    def _of_condition(self, condition: Tensor) -> Tensor:
        with torch.autocast(condition.device.type, enabled=False):  # many CPUs have no LSTM in bfloat16
            read, _ = self.lstm(condition.float())
        return cast("Tensor", self.net(read[:, -1]))


def draw_category(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Draw from softmax(logits / temperature): (..., n) -> (...). Temperature 0 takes the largest."""
    check_temperature(temperature)
    if temperature == 0:
        return logits.argmax(-1)
    uniform = draw_uniform(logits.shape, generator, logits.device)
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
    return (logits / temperature + gumbel).argmax(-1)
