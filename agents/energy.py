"""The energy of noisy actions, learned by contrast (CEP, arXiv:2304.12824). In the paper's order.

To draw from μ(a|s) exp(α Q(s, a)) instead of the policy μ, x_t is steered by the gradient of

    E_t(s, x_t) = log E[exp(α Q(s, a)) | x_t]

The expectation is of μ's own chunks. For each s, M of them are drawn once, a_1 ... a_M, and noised to one t, with a
noise each; then the energy f is what tells which of the noisy chunks is of a good one:

    L = -E Σ_i softmax_i(α Q(s, a_i)) log softmax_i(f(s, x_{i,t}, t))

whose least, as M grows, is at f = E_t, up to what does not depend on x_t. Regression, f to α Q(s, a_i), finds
E[α Q | x_t] instead, which is not E_t: where good chunks are rare among a policy's, it steers to too few of them.

The guide is `ValueGuide(energy, gradient="noisy", scaling="score")`.

Shapes: B observations of a minibatch, M chunks of each, O observation steps, H actions of a chunk, A action size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dprl.config import validate
from dprl.errors import check, check_count
from dprl.observations import TensorObservation, batch_size, map_parts, take
from dprl.policy import DiffusionPolicy, Scorer
from dprl.policy.noisy_critic import NoisyCritic, NoisyCriticConfig
from dprl.seeding import draw_normal, seeded_init, torch_generator
from dprl.training.learner import Learner


@dataclass(frozen=True)
class EnergyConfig:
    """How an energy is learned."""

    critic: NoisyCriticConfig = field(default_factory=NoisyCriticConfig)
    """Its network."""
    inverse_temperature: float = 3.0
    """α: how much better chunks are preferred."""
    loss: Literal["contrast", "regression"] = "contrast"
    """`regression` is to compare with: it is of the mean of α Q, not of its exponential."""
    samples: int = 16
    """M, the policy's chunks of each observation."""
    batch_size: int = 256
    """Observations per gradient step."""
    learning_rate: float = 3e-4
    """At first; it falls to nothing."""

    def __post_init__(self) -> None:
        validate(self, at_least={"samples": 2, "batch_size": 1}, above={"inverse_temperature": 0, "learning_rate": 0})


class Energy:
    """Learns the energy of a policy's noisy chunks from what a scorer says of its clean ones; the policy stays."""

    def __init__(
        self,
        policy: DiffusionPolicy,
        scorer: Scorer | None = None,
        config: EnergyConfig | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Prepare to learn.

        Args:
            policy: whose denoising shall be steered.
            scorer: Q, any. Default: the policy's own critics.
            config: the numbers.
            seed: of the network, the policy's chunks, minibatches and noise.

        Raises:
            ConfigError: nothing says what chunks are worth.
        """
        scorer = scorer or policy.scorer
        check(scorer is not None, "scorer", None, "must be given: the policy has no critics")
        assert scorer is not None
        self.policy, self.scorer, self.config = policy, scorer, config or EnergyConfig()
        with seeded_init(seed, "energy"):
            self.critic = NoisyCritic(policy, self.config.critic).to(policy.device)
        self._learner = Learner(self.critic, self.config.learning_rate)
        self._generator = torch_generator(seed, "energy", device=policy.device)

    def fit(self, obs: TensorObservation, steps: int) -> NoisyCritic:
        """Draw the policy's chunks at observations (n, O, D), or named parts, and take gradient steps on them."""
        check_count("steps", steps)
        chunks, worth = self.support(obs)
        for step in range(steps):
            self._learner.set_rate(1 - step / steps)
            size = (self.config.batch_size,)
            rows = torch.randint(len(chunks), size, generator=self._generator, device=chunks.device)
            self.update(take(obs, rows), chunks[rows], worth[rows])
        return self.critic

    @torch.no_grad()
    def support(self, obs: TensorObservation) -> tuple[Tensor, Tensor]:
        """The policy's chunks (n, M, H, A) at `obs`, normalised, and α Q of each (n, M)."""
        m, n = self.config.samples, batch_size(obs)
        every = map_parts(lambda part: part.repeat_interleave(m, dim=0), obs)
        actions = self.policy.sample(every, generator=self._generator)
        worth = self.config.inverse_temperature * self.scorer.score(every, actions)
        return self.policy.action_normalizer.normalize(actions).unflatten(0, (n, m)), worth.view(n, m)

    def update(self, obs: TensorObservation, chunks: Tensor, worth: Tensor) -> Tensor:
        """One gradient step on what `support` returned of a minibatch; return the loss."""
        schedule, (b, m) = self.policy.schedule, worth.shape
        steps = self.policy.config.num_train_timesteps
        timesteps = torch.randint(steps, (b,), generator=self._generator, device=worth.device).repeat_interleave(m)
        clean = chunks.flatten(0, 1)
        noisy = schedule.add_noise(clean, draw_normal(clean.shape, self._generator, clean.device), timesteps)
        seen = self.critic.see(obs).repeat_interleave(m, dim=0)
        energy = self.critic(seen, noisy, timesteps).view(b, m)
        loss = contrast(energy, worth) if self.config.loss == "contrast" else ((energy - worth) ** 2).mean()
        self._learner.zero_grad()
        loss.backward()
        self._learner.step()
        return loss.detach()


def contrast(energy: Tensor, worth: Tensor) -> Tensor:
    """L of energies f and α Q, (B, M) each: a scalar."""
    return -(worth.softmax(1) * energy.log_softmax(1)).sum(1).mean()
