"""The energy of noisy actions, learned by contrast (CEP, arXiv:2304.12824). In the paper's order.

To draw from μ(a|s) exp(α Q(s, a)) instead of the policy μ, x_t is steered by the gradient of

    E_t(s, x_t) = log E[exp(α Q(s, a)) | x_t]

The expectation is of μ's own chunks. For each s, M of them are drawn once, a_1 ... a_M, and noised to one t, with a
noise each; then the energy f is what tells which of the noisy chunks is of a good one:

    L = -E Σ_i softmax_i(α Q(s, a_i)) log softmax_i(f(s, x_{i,t}, t))

whose least, as M grows, is at f = E_t, up to what does not depend on x_t. Regression, f to α Q(s, a_i), finds
E[α Q | x_t] instead, which is not E_t: where good chunks are rare among a policy's, it steers to too few of them.

The guide is `ValueGuide(energy, gradient="noisy", scaling="score")`. The policy stays as it is.

Shapes: B observations of a minibatch, M chunks of each, O observation steps, H actions of a chunk, A action size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dprl import checkpoint
from dprl.agents.bc import require_action_chunks, require_like
from dprl.config import validate
from dprl.data import Episodes
from dprl.data.loader import ChunkBatches
from dprl.errors import check, check_count
from dprl.observations import TensorObservation, batch_size, map_parts, repeated, take
from dprl.policy import DiffusionPolicy, Policy, Scorer
from dprl.policy.candidates import checked_scores
from dprl.policy.chunk_value import ChunkValue, ChunkValueConfig
from dprl.seeding import seeded_init, torch_generator
from dprl.training import Agent, LoopConfig, train
from dprl.training.learner import Learner

AT_ONCE = 16_384
"""Chunks that are drawn together; of what has images, a sixteenth."""


@dataclass(frozen=True)
class EnergyConfig:
    """How an energy is learned."""

    critic: ChunkValueConfig = field(default_factory=ChunkValueConfig)
    """Its networks."""
    inverse_temperature: float = 3.0
    """α: how much better chunks are preferred."""
    loss: Literal["contrast", "regression"] = "contrast"
    """`regression` is to compare with: it is of the mean of α Q, not of its exponential."""
    samples: int = 16
    """M, the policy's chunks of each observation."""
    observations: int = 10_000
    """For how many of the data's they are drawn, at most."""
    batch_size: int = 256
    """Observations per gradient step."""
    learning_rate: float = 3e-4
    """At first; it falls to nothing."""
    steps_per_iteration: int = 100
    """Gradient steps between two chances to log or stop."""

    def __post_init__(self) -> None:
        counts = ("observations", "batch_size", "steps_per_iteration")
        least = {**dict.fromkeys(counts, 1), "samples": 2}
        validate(self, at_least=least, above={"inverse_temperature": 0, "learning_rate": 0})
        check(self.critic.noised, "critic.noised", False, "must be True: an energy is of noisy chunks")
        number = self.critic.worth == "number"
        check(number, "critic.worth", self.critic.worth, "must be number: an energy is no probability")


class Energy(Agent[Tensor]):
    """Learns the energy of a policy's noisy chunks from what a scorer says of its clean ones; the policy stays."""

    name = "energy"
    policy: DiffusionPolicy
    config: EnergyConfig

    def __init__(
        self, policy: Policy, scorer: Scorer | None = None, config: EnergyConfig | None = None, *, seed: int = 0
    ) -> None:
        """Prepare to learn.

        Args:
            policy: whose denoising shall be steered; its `scorer` becomes the energy.
            scorer: Q, any. Default: the policy's own critics.
            config: the numbers.
            seed: of the networks, the policy's chunks, minibatches and noise.

        Raises:
            ConfigError: a policy that does not denoise, or nothing says what chunks are worth.
        """
        check(isinstance(policy, DiffusionPolicy), "policy", policy.name, "must be a diffusion policy or flow")
        assert isinstance(policy, DiffusionPolicy)
        require_action_chunks(policy)
        scorer = scorer or policy.scorer
        check(scorer is not None, "scorer", None, "must be given: the policy has no critics")
        assert scorer is not None
        self.policy, self.teacher, self.config = policy, scorer, config or EnergyConfig()
        self.seed, self.timesteps, self._total_steps = seed, 0, 1
        with seeded_init(seed, "energy"):
            self.critic = ChunkValue.of(policy, self.config.critic).to(policy.device)
        policy.scorer = self.critic
        self._learner = Learner(self.critic, self.config.learning_rate)
        self._generator = torch_generator(seed, "energy", device=policy.device)

    def fit(self, data: Episodes, steps: int, *, progress_bar: bool = False) -> ChunkValue:
        """Take `steps` more gradient steps at the observations of `data`; return the energy, the policy's `scorer`.

        Raises:
            ConfigError: no steps.
            DatasetError: the data do not fit the policy.
        """
        check_count("steps", steps)
        total = self.timesteps + steps
        self.set_data(data, total)
        train(self, LoopConfig(total), progress_bar=progress_bar)
        return self.critic

    def set_data(self, data: Episodes, total_steps: int, on_progress: Callable[[int], None] | None = None) -> None:
        """Take the observations of `data`, and draw the policy's chunks at them; `total_steps` shapes the rate's decay.

        Which are drawn follows from the seed alone. `on_progress` is told after each part how many came to it.
        """
        require_like(self.policy, data)
        self._total_steps = total_steps
        config, device = self.policy.config, self.policy.device
        generator = torch_generator(self.seed, "energy/support", device=device)
        cut = data.chunks(config.n_obs_steps, config.horizon, pad_after=config.horizon - 1)
        picks = torch.randperm(len(cut), generator=generator, device=device)[: self.config.observations]
        batches, parts = ChunkBatches(data, cut, device), []
        at_once = AT_ONCE // (16 if self.policy.features.cameras else 1)
        for rows in picks.split(max(1, at_once // self.config.samples)):
            (chunks,) = batches.read(rows[None])
            parts.append(self._drawn(chunks.obs, generator))
            if on_progress is not None:
                on_progress(len(rows))
        obs = map_parts(lambda *part: torch.cat(part), *(part.obs for part in parts))
        self._support = _Support(
            obs, *(torch.cat(column) for column in zip(*(part[1:] for part in parts), strict=True))
        )
        worth = self._support.worth
        told = bool((worth != worth[:, :1]).any())
        check(told, "scorer", float(worth.flatten()[0]), "says the same of every chunk: there is nothing to tell apart")

    @torch.no_grad()
    def _drawn(self, obs: TensorObservation, generator: torch.Generator) -> _Support:
        """The policy's chunks at observations, and what they are worth."""
        m, n = self.config.samples, batch_size(obs)
        every = repeated(obs, m)
        actions = self.policy.sample(every, generator=generator)
        worth = self.config.inverse_temperature * checked_scores(self.teacher.score(every, actions), actions)
        return _Support(obs, self.policy.action_normalizer.normalize(actions).unflatten(0, (n, m)), worth.view(n, m))

    def collect(self) -> Tensor:
        """Draw the minibatches of one iteration, with replacement: rows of the observations (steps, B)."""
        steps = min(self.config.steps_per_iteration, self._total_steps - self.timesteps)
        shape, device = (steps, self.config.batch_size), self.policy.device
        return torch.randint(len(self._support.worth), shape, generator=self._generator, device=device)

    def update(self, batch: Tensor) -> dict[str, float]:
        """Take one gradient step for each row of `batch` (steps, B)."""
        start = time.perf_counter()
        loss = float(torch.stack([self.step(rows) for rows in batch]).mean())
        return {f"{self.name}/loss": loss, "time/samples_per_s": batch.numel() / (time.perf_counter() - start)}

    def step(self, rows: Tensor) -> Tensor:
        """Take one gradient step on the observations `rows` (B,); return the loss."""
        obs, chunks, worth = take(self._support.obs, rows), self._support.chunks[rows], self._support.worth[rows]
        self._learner.set_rate(1 - self.timesteps / self._total_steps)
        b, m = worth.shape
        levels = torch.randint(
            self.policy.config.num_train_timesteps + 1, (b,), generator=self._generator, device=worth.device
        ).repeat_interleave(m)
        noisy = self.critic.noised(self.policy.schedule, chunks.flatten(0, 1), levels, self._generator)
        seen = self.critic.see(obs).repeat_interleave(m, dim=0)
        energy = self.critic(seen, noisy, levels).unflatten(1, (b, m))
        loss = contrast(energy, worth) if self.config.loss == "contrast" else ((energy - worth) ** 2).mean()
        self._learner.zero_grad()
        loss.backward()
        self._learner.step()
        self.timesteps += 1
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs beside the policy; the chunks are drawn again."""
        return {
            "timesteps": self.timesteps,
            "critic": self.critic.state_dict(),
            "optimizer": self._learner.state(),
            "generator": self._generator.get_state(),
        }

    def restore(self, state: checkpoint.StateTree) -> None:
        """Take up what `state` returned; the policy must be loaded."""
        self.timesteps = state["timesteps"]
        self.critic.load_state_dict(state["critic"])
        self._learner.restore(state.get("optimizer", {}))
        self._generator.set_state(state["generator"])


class _Support(NamedTuple):
    """A policy's chunks, and what they are worth."""

    obs: TensorObservation
    """(n, O, D), or named parts."""
    chunks: Tensor
    """(n, M, H, A) normalised."""
    worth: Tensor
    """(n, M), α Q."""


def contrast(energy: Tensor, worth: Tensor) -> Tensor:
    """L of energies f (..., B, M) and α Q (B, M): a scalar."""
    return -(worth.softmax(-1) * energy.log_softmax(-1)).sum(-1).mean()
