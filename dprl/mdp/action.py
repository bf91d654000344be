"""An explicit policy as a decision process of one step: the chunk is a single draw of known density.

So the loop that tunes denoising steps is plain PPO (arXiv:1707.06347) here, the baseline of arXiv:2409.00588.

Shapes: B decisions, M modes, O observation steps, F features, H actions of a chunk, E executed, A action size.
"""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor, nn

from dprl.diffusion import normal_log_prob
from dprl.errors import ConfigError, check
from dprl.mdp.base import Chain, ExplorationConfig, Gaussian, PolicyMDP
from dprl.observations import TensorObservation
from dprl.policy import GaussianPolicy, GMMPolicy, LSTMGMMPolicy

ExplicitDensity = GaussianPolicy | GMMPolicy | LSTMGMMPolicy


class ActionMDP(PolicyMDP):
    """A Gaussian or a mixture of them; K' = 1, x_1 is nothing (zeros), x_0 the chunk."""

    policy: ExplicitDensity
    tuned_steps = 1

    def __init__(self, policy: ExplicitDensity, exploration: ExplorationConfig) -> None:
        """Take the policy, which is trained in place.

        Raises:
            ConfigError: learned noise: the spread of such a policy is learned anyway.
        """
        learned = exploration.learned
        check(
            learned.what == "none",
            "exploration.learned.what",
            learned.what,
            f"must be none: a {policy.name} policy learns its spread anyway",
        )
        self.policy = policy
        self.exploration = exploration
        self._floor = torch.tensor(exploration.min_sampling_std, device=policy.device)
        self.is_gaussian = isinstance(policy, GaussianPolicy)
        self._pretrained = copy.deepcopy(policy)

    def trainable(self) -> nn.Module:
        """See `PolicyMDP.trainable`."""
        return self.policy

    def state(self) -> dict[str, Tensor]:
        """See `PolicyMDP.state`: what the policy was."""
        return self._pretrained.state_dict()

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `PolicyMDP.restore`."""
        self._pretrained.load_state_dict(state)

    def begin_iteration(self, iteration: int) -> None:
        """See `PolicyMDP.begin_iteration`."""
        self._floor.fill_(self.exploration.anneal.at(iteration, self.exploration.min_sampling_std))

    def cpu(self) -> Self:
        """See `PolicyMDP.cpu`."""
        if self.policy.device.type == "cpu":
            return self
        copied = type(self)(copy.deepcopy(self.policy).cpu(), self.exploration)
        copied._floor.copy_(self._floor)
        return copied

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(2, H, A): the chunk's draws, and one whose first number picks the mode."""
        return 2, self.policy.config.horizon, self.policy.features.action_size

    def condition(
        self, obs: TensorObservation, generator: torch.Generator | None = None, *, pretrained: bool = False
    ) -> Tensor:
        """See `PolicyMDP.condition`."""
        return (self._pretrained if pretrained else self.policy).condition(obs, generator)

    @torch.no_grad()
    def chain(
        self, condition: Tensor, draws: Tensor, *, frozen: Tensor | None = None, pretrained: bool = False
    ) -> Chain:
        """See `PolicyMDP.chain`; draws (2, B, H, A)."""
        policy = self._pretrained if pretrained else self.policy
        log_weight, mean, std = policy.mixture(condition)
        uniform = torch.special.ndtr(draws[1][:, 0, 0])[:, None]
        mode = (log_weight.exp().cumsum(1) < uniform).sum(1).clamp(max=log_weight.shape[1] - 1)
        rows = torch.arange(len(mode), device=mode.device)
        z = draws[0].clamp(-self.exploration.noise_clip, self.exploration.noise_clip)
        x = mean[rows, mode] + std[rows, mode].clamp(min=self._floor) * z
        nothing = torch.zeros_like(x)
        log_prob = self._log_prob(policy, condition, x)
        steps = torch.stack([nothing, x], dim=1)
        return Chain(steps, log_prob[:, None], policy.action_normalizer.unnormalize(x))

    def log_prob(self, condition: Tensor, x: Tensor, x_next: Tensor, k: Tensor) -> Tensor:
        """Log-density of chunks `x_next`, see `PolicyMDP.log_prob`.

        A mixture's does not fall apart into numbers: each of the executed actions' gets the same share of it.
        """
        return self._log_prob(self.policy, condition, x_next)

    def _log_prob(self, policy: ExplicitDensity, condition: Tensor, x_next: Tensor) -> Tensor:
        log_weight, mean, std = policy.mixture(condition)
        log_prob = normal_log_prob(x_next[:, None], mean, std.clamp(min=self._density_floor))
        if log_weight.shape[1] == 1:
            return log_prob[:, 0]
        executed = log_prob[:, :, : self.n_action_steps]
        joint = torch.logsumexp(log_weight + executed.sum((2, 3)), dim=1)
        return (joint / executed[0, 0].numel())[:, None, None].expand_as(x_next)

    def gaussian(self, condition: Tensor, x: Tensor, k: Tensor, *, pretrained: bool = False) -> Gaussian:
        """See `PolicyMDP.gaussian`.

        Raises:
            ConfigError: the policy is a mixture.
        """
        log_weight, mean, std = (self._pretrained if pretrained else self.policy).mixture(condition)
        if log_weight.shape[1] != 1:
            raise ConfigError(f"a {self.policy.name} policy is a mixture: no divergence of it has a closed form")
        return Gaussian(mean[:, 0], std[:, 0].clamp(min=self._density_floor))

    @property
    def _density_floor(self) -> Tensor:
        return self._floor.clamp(min=self.exploration.min_log_prob_std)
