"""A diffusion policy whose chunks are plans: what it will do and where that leads (arXiv:2205.09991, 2211.15657).

A plan is of rows [a_i, s_i], the action and the state that it is taken in; the first state is the present one, which
stands in the plan while the rest is denoised. Either whole rows are denoised (Diffuser), or the states alone, and
a_i = f(s_i, s_{i+1}) by an inverse dynamics model (Decision Diffuser).

Shapes: B samples, D observation size, A action size, H rows of a plan, C numbers of a command.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from dprl.config import validate
from dprl.diffusion.schedule import PredictionType
from dprl.errors import check
from dprl.networks import Denoiser, DenoiserConfig, GivenState, UNetConfig, build_denoiser, with_state
from dprl.networks.mlp import ResidualMLP
from dprl.observations import TensorObservation
from dprl.policy.base import masked_mean
from dprl.policy.control import InferenceConfig
from dprl.policy.diffusion import DiffusionConfig, DiffusionPolicy
from dprl.policy.normalize import Normalizer

if TYPE_CHECKING:
    from dprl.data import Episodes


@dataclass(frozen=True)
class PlannerConfig(DiffusionConfig):
    """A diffusion policy that plans."""

    horizon: int = 32
    """H, rows of a plan."""
    n_action_steps: int | None = 8
    """E, how many actions of a plan are executed before the next one is made. The papers' planners make one each
    step."""
    num_train_timesteps: int = 20
    prediction_type: PredictionType = "sample"
    """As in Diffuser. After a few thousand steps the states of a plan come out apart from each other by `epsilon`."""
    denoiser: DenoiserConfig = field(default_factory=UNetConfig)
    """The network. One that looks at a few neighbouring rows at once, as a U-Net does, can put together what no episode
    of the data shows as a whole."""
    denoised: Literal["rows", "states"] = "rows"
    """Actions and states (Diffuser), or states alone, of which the actions follow (Decision Diffuser)."""
    first_action_weight: float = 10.0
    """How much the error of a plan's first action counts beside others; of `rows`."""
    inverse_size: int = 256
    """Width of the inverse dynamics model; of `states`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self, at_least={"inverse_size": 1}, above={"first_action_weight": 0})
        check(self.n_obs_steps == 1, "n_obs_steps", self.n_obs_steps, "must be 1: plans begin with the present state")
        check(self.horizon >= 2, "horizon", self.horizon, "must be at least 2: a plan leads somewhere")
        idle = "first_action_weight" if self.denoised == "states" else "inverse_size"
        other = "rows" if self.denoised == "states" else "states"
        same = getattr(self, idle) == getattr(PlannerConfig, idle)
        check(same, idle, getattr(self, idle), f"is of denoised = {other} only")
        most = self.horizon - 1
        fits = self.denoised == "rows" or (self.n_action_steps or self.horizon) <= most
        check(fits, "n_action_steps", self.n_action_steps, f"must be at most {most}: actions lead from state to state")


@dataclass(frozen=True)
class RowNormalizer:
    """Of rows [a, s]."""

    action: Normalizer
    state: Normalizer
    action_size: int

    def normalize(self, values: Tensor) -> Tensor:
        """(..., A + D) -> (..., A + D)."""
        action, state = values[..., : self.action_size], values[..., self.action_size :]
        return torch.cat([self.action.normalize(action), self.state.normalize(state)], dim=-1)

    def unnormalize(self, values: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        action, state = values[..., : self.action_size], values[..., self.action_size :]
        return torch.cat([self.action.unnormalize(action), self.state.unnormalize(state)], dim=-1)


class Planner(DiffusionPolicy):
    """Plans what it does and where that leads; acts by the plan's first actions.

    Its chunks, what `sample` returns and guides and scorers see, are rows [a, s] (B, H, A + D) in the environment's
    units; `act` takes the actions out of them.
    """

    name = "planner"
    weighs_samples = False
    config_class = PlannerConfig
    config: PlannerConfig

    def _build(self, feature_size: int) -> None:
        cameras = [camera.name for camera in self.features.cameras]
        check(not cameras, "cameras", cameras, "must be none: a planner plans states, which are vectors")
        super()._build(feature_size)
        self.inverse: ResidualMLP | None = None
        if self.config.denoised == "states":
            sizes = (2 * self.features.observation_size, self.features.action_size)
            self.inverse = ResidualMLP(*sizes, self.config.inverse_size, 1, "relu")

    def _network(self, width: int) -> Denoiser:
        config, size = self.config, self.features.observation_size
        others = max(1, width - size)  # networks of no condition at all are given a zero
        inner = build_denoiser(config.denoiser, config.horizon, self.denoised_size, 1, others)
        return GivenState(inner, size, others)

    @property
    def chunk_size(self) -> int:
        """A + D."""
        return self.features.action_size + self.features.observation_size

    @property
    def denoised_size(self) -> int:
        """A + D, or D."""
        return self.chunk_size if self.config.denoised == "rows" else self.features.observation_size

    @property
    def chunk_normalizer(self) -> Normalizer:
        """Of rows."""
        return RowNormalizer(self.action_normalizer, self.observation_normalizer, self.features.action_size)

    def chunks_of(self, data: Episodes) -> Episodes:
        """Return `data` with rows in place of the actions; in memory."""
        rows = np.concatenate([np.asarray(data.actions), np.asarray(data.observations)], axis=1)
        return replace(data, actions=rows)

    def act(self, chunks: Tensor) -> Tensor:
        """Return the actions of plans (B, H, A + D): (B, H, A)."""
        return chunks[..., : self.features.action_size]

    def loss(
        self,
        obs: TensorObservation,
        actions: Tensor,
        *,
        valid: Tensor | None = None,
        generator: torch.Generator,
        command: Tensor | None = None,
    ) -> Tensor:
        """See `DiffusionPolicy.loss`; of `states` with the loss of the inverse dynamics.

        Plans that reach their episode's end stay there: what fills them up is learned, for it is denoised as well.
        """
        loss = super().loss(obs, actions, generator=generator, command=command)
        return loss if self.inverse is None else loss + self.inverse_loss(actions, valid)

    def tune_below(self, timestep: int) -> None:
        """See `DiffusionPolicy.tune_below`; there is no such way for plans."""
        check(False, "policy", self.name, "cannot be tuned by reward: the states of a plan are no actions")

    def check_inference(self, inference: InferenceConfig) -> None:
        """See `Policy.check_inference`."""
        super().check_inference(inference)
        ensembling = inference.temporal_ensembling
        check(ensembling is None, "temporal_ensembling", ensembling, "must be left out: a planner's plans differ")

    def inverse_loss(self, chunks: Tensor, valid: Tensor | None) -> Tensor:
        """Squared error of f(s_i, s_{i+1}), normalised (arXiv:2211.15657 eq. 8): rows (B, H, A + D), valid (B, H)."""
        normalized = self.chunk_normalizer.normalize(chunks)
        actions, states = self.act(normalized), self._part(normalized)
        error = (self._between(states) - actions[:, :-1]) ** 2
        return masked_mean(error, None if valid is None else valid[:, 1:])

    def _between(self, states: Tensor) -> Tensor:
        """The actions that lead from state to state, all normalised: (B, H, D) -> (B, H - 1, A)."""
        assert self.inverse is not None
        pairs = torch.cat([states[:, :-1], states[:, 1:]], dim=-1)
        actions: Tensor = self.inverse(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2])
        return actions

    def _part(self, chunks: Tensor) -> Tensor:
        return chunks if self.config.denoised == "rows" else chunks[..., self.features.action_size :]

    def _whole(self, clean: Tensor) -> Tensor:
        if self.config.denoised == "states":
            actions = self._between(clean).clamp(-1, 1)  # the range of the data's
            actions = torch.cat([actions, actions[:, -1:]], dim=1)  # what follows the last state is not planned
            clean = torch.cat([actions, clean], dim=-1)
        return super()._whole(clean)

    def _given(self, obs: TensorObservation) -> Callable[[Tensor], Tensor]:
        return with_state(self.condition(obs)[:, 0])

    def _kept(self, noisy: Tensor, moved: Tensor) -> Tensor:
        return with_state(noisy[:, 0, -self.features.observation_size :])(moved)

    def _weights(self) -> Tensor:
        weights = torch.ones(self._chunk_shape, device=self.device)
        if self.config.denoised == "rows":
            weights[0, : self.features.action_size] = self.config.first_action_weight
        weights[0, -self.features.observation_size :] = 0.0
        return weights
