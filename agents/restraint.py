"""What holds a policy near the one it was tuned from, less the bonus for the entropy of learned noise.

Shapes: B pairs of (decision, denoising step), H actions of a chunk, A action size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dprl.agents.dppo_config import DPPOConfig
from dprl.agents.objective import over_chunk
from dprl.agents.targets import Pairs, Targets
from dprl.diffusion import normal_kl, normal_w2
from dprl.errors import check
from dprl.mdp import PolicyMDP
from dprl.observations import TensorObservation, take
from dprl.seeding import draw_normal
from dprl.training.figures import UpdateFigures


class Restraint:
    """A term of the actor's loss, at the observations of the rollout, whose images are not augmented."""

    def __init__(
        self,
        mdp: PolicyMDP,
        config: DPPOConfig,
        chunk_log_prob: Callable[[Tensor, Tensor], Tensor],
        generator: torch.Generator,
    ) -> None:
        """Take the policy's decision process, its density of chunks, and a generator for the pretrained policy's draws.

        Raises:
            ConfigError: a divergence of a policy that draws from no one Gaussian.
        """
        closed = config.regularizer not in ("kl", "w2") or mdp.is_gaussian
        remedy = "must be bc or none: what this policy draws from is no one Gaussian"
        check(closed, "regularizer", config.regularizer, remedy)
        self._mdp, self._config, self._chunk_log_prob, self._generator = mdp, config, chunk_log_prob, generator

    def __call__(self, targets: Targets, pairs: Pairs, figures: UpdateFigures) -> Tensor:
        """Return it for pairs (B,): a scalar, 0 where nothing is asked for."""
        config, loss = self._config, torch.zeros((), device=pairs.k.device)
        if config.regularizer != "none":
            distance = (self._cloning if config.regularizer == "bc" else self._divergence)(targets, pairs)
            figures.add(config.regularizer, distance)
            loss = loss + config.regularizer_coef * distance
        if config.entropy_coef > 0:
            entropy = self._log_std(targets, pairs)
            figures.add("log_std", entropy)
            loss = loss - config.entropy_coef * entropy
        return loss

    def _divergence(self, targets: Targets, pairs: Pairs) -> Tensor:
        """KL or squared 2-Wasserstein distance of each step's Gaussian from the pretrained policy's."""
        obs, x = take(targets.observation, pairs.decision), targets.x(pairs)
        tuned = self._mdp.gaussian(self._mdp.condition(obs), x, pairs.k)
        with torch.no_grad():
            before = self._mdp.condition(obs, pretrained=True)
            pretrained = self._mdp.gaussian(before, x, pairs.k, pretrained=True)
        divergence = {"kl": normal_kl, "w2": normal_w2}[self._config.regularizer](*tuned, *pretrained)
        return self._mean(divergence, targets, pairs)

    def _cloning(self, targets: Targets, pairs: Pairs) -> Tensor:
        """Minus the log-prob of step k of chains that the pretrained policy draws (arXiv:2403.03949, eq. 2)."""
        obs: TensorObservation = take(targets.observation, pairs.decision)
        n_draws, *chunk = self._mdp.noise_shape
        draws = draw_normal((n_draws, len(pairs.k), *chunk), self._generator, pairs.k.device)
        with torch.no_grad():
            chains = self._mdp.chain(self._mdp.condition(obs, pretrained=True), draws, pretrained=True).steps
        rows, position = torch.arange(len(pairs.k), device=pairs.k.device), self._config.tuned_steps - pairs.k
        x, x_next = chains[rows, position - 1], chains[rows, position]
        log_prob = self._mdp.log_prob(self._mdp.condition(obs), x, x_next, pairs.k)
        return -self._chunk_log_prob(log_prob, targets.executed[pairs.decision]).mean()

    def _log_std(self, targets: Targets, pairs: Pairs) -> Tensor:
        """What a Gaussian's entropy is but for a constant."""
        condition, x = self._mdp.condition(take(targets.observation, pairs.decision)), targets.x(pairs)
        return self._mean(self._mdp.gaussian(condition, x, pairs.k).std.log().expand_as(x), targets, pairs)

    def _mean(self, values: Tensor, targets: Targets, pairs: Pairs) -> Tensor:
        return over_chunk(values, targets.executed[pairs.decision], self._config.log_prob_reduction).mean()
