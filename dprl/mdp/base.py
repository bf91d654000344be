"""What is tuned: a policy whose decisions are chains of actions with known densities.

Shapes: B decisions, K' tuned steps, O observation steps, F features, H actions of a chunk, A action size. All x are
normalised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from dprl.config import validate
from dprl.cuda_graphs import Replayed
from dprl.errors import check
from dprl.networks.noise import LEAST_STD, LearnedNoiseConfig
from dprl.observations import TensorObservation, batch_size
from dprl.policy import Policy
from dprl.schedules import Anneal


@dataclass(frozen=True)
class ExplorationConfig:
    """How the chain explores while it collects."""

    min_sampling_std: float = 0.1
    """Floor of every step's standard deviation while sampling, frozen steps included; normalised units."""
    min_log_prob_std: float = 0.1
    """Floor of the standard deviation in the density, where that of sampling is not higher."""
    noise_clip: float = 3.0
    """Noise draws of the denoising steps are clamped to this many standard deviations."""
    anneal: Anneal = field(default_factory=Anneal)
    """Of `min_sampling_std`, over iterations."""
    learned: LearnedNoiseConfig = field(default_factory=LearnedNoiseConfig)
    """Learn how much noise the tuned steps make. A learned std has no floors; η has."""

    def __post_init__(self) -> None:
        validate(self, at_least={"min_log_prob_std": LEAST_STD}, above={"min_sampling_std": 0, "noise_clip": 0})
        anneal = self.anneal
        fits = anneal.iterations == 0 or anneal.final > 0
        check(fits, "anneal.final", anneal.final, "must be above 0, as min_sampling_std")


@dataclass(frozen=True)
class Chain:
    """The denoising trajectory of B decisions."""

    steps: Tensor
    """(B, K'+1, H, A): what the first tuned step starts from, then what each tuned step made, x_0 last."""
    log_probs: Tensor
    """(B, K', H, A): the log-density of each of them, number by number."""
    actions: Tensor
    """(B, H, A) in the environment's units."""


class Gaussian(NamedTuple):
    """What a step draws from, number by number: (B, H, A) each, or shapes that broadcast to it."""

    mean: Tensor
    std: Tensor


class PolicyMDP(ABC):
    """A policy whose decisions are chains of `tuned_steps` actions of known density, to be trained. See `Chain`."""

    policy: Policy
    tuned_steps: int
    """K'."""
    is_gaussian = True
    """Whether a step draws from one Gaussian, see `gaussian`."""
    is_replayable = True
    """Whether chains can be recorded, see `Replayed`."""

    @property
    @abstractmethod
    def noise_shape(self) -> tuple[int, int, int]:
        """(draws, H, A), the normal draws of one decision."""

    @property
    def n_action_steps(self) -> int:
        """E, how many actions of a chunk are executed."""
        return self.policy.n_action_steps

    @cached_property
    def _make(self) -> Callable[..., dict[str, Tensor]]:
        return Replayed(self._chain_of) if self.is_replayable else self._chain_of

    def _chain_of(self, condition: Tensor, frozen: Tensor, draws: Tensor) -> dict[str, Tensor]:
        chain = self.chain(condition, draws, frozen=frozen)
        return {"steps": chain.steps, "log_probs": chain.log_probs, "actions": chain.actions}

    def compile(self) -> None:
        """Let torch.compile make chains faster from now on, on a CPU: a GPU replays them. A copy is not compiled.

        A few decisions at a time then take half as long; many, of which the matrix products are most, little less than
        before. The first chain of each batch size compiles, one of 20 steps for half a minute.
        """
        if self.is_replayable and self.policy.device.type == "cpu":
            self._make = torch.compile(self._chain_of, dynamic=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_make"}  # bound to this one's weights

    @abstractmethod
    def trainable(self) -> nn.Module:
        """Return what is trained."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs and the policy does not hold."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` returned."""

    @abstractmethod
    def begin_iteration(self, iteration: int) -> None:
        """Explore as the schedules have it in this iteration, counted from 0."""

    def condition(
        self, obs: TensorObservation, generator: torch.Generator | None = None, *, pretrained: bool = False
    ) -> Tensor:
        """Return what tuned steps see: (B, O, D), or named parts, -> (B, O, F); see `Policy.condition`."""
        return self.policy.condition(obs, generator)

    def conditions(self, obs: TensorObservation) -> tuple[Tensor, Tensor]:
        """Return what tuned and frozen steps see, (B, O, F) each, to sample with."""
        condition = self.condition(obs)
        return condition, condition

    @abstractmethod
    def chain(
        self, condition: Tensor, draws: Tensor, *, frozen: Tensor | None = None, pretrained: bool = False
    ) -> Chain:
        """Make chains of normal draws, for what tuned steps see, and `frozen` ones if they see another thing."""

    @torch.no_grad()
    def sample(
        self,
        obs: TensorObservation,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        pretrained: bool = False,
    ) -> Chain:
        """Draw a chain for each observation, exploring.

        Args:
            obs: (B, O, D), or named parts; not normalised.
            noise: (draws, B, H, A), every normal draw in the order of its use. Replays a chain exactly.
            generator: draws the noise where `noise` is not given. Default: torch's own.
            pretrained: what the policy would have drawn before it was tuned.

        Raises:
            ConfigError: an observation or noise that does not fit, or is not finite.
        """
        obs = self.policy.checked(obs)
        n_draws, *chunk = self.noise_shape
        draws = self.policy.drawn((n_draws, batch_size(obs), *chunk), noise, generator)
        if pretrained:
            return self.chain(self.condition(obs, pretrained=True), draws, pretrained=True)
        return Chain(**self._make(*self.conditions(obs), draws))

    @abstractmethod
    def log_prob(self, condition: Tensor, x: Tensor, x_next: Tensor, k: Tensor) -> Tensor:
        """Log-density of tuned steps, number by number.

        Args:
            condition: (B, O, F), see `condition`.
            x: (B, H, A) before the step.
            x_next: (B, H, A) after it.
            k: (B,) which step, from K'-1 (noisiest) to 0.

        Returns:
            (B, H, A).
        """

    @abstractmethod
    def gaussian(self, condition: Tensor, x: Tensor, k: Tensor, *, pretrained: bool = False) -> Gaussian:
        """Return what tuned steps draw from, now or before the policy was tuned; see `log_prob`."""

    @abstractmethod
    def cpu(self) -> Self:
        """Return this, or a copy of it on the CPU, for workers without an accelerator."""
