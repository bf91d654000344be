"""What chunks led to, learned from data: returns (Diffuser, arXiv:2205.09991, section 3.2) or success, as a classifier.

Every step of an episode begins a chunk; what it led to is

    return     R = Σ_i γ^i r_i                 over the rest of the episode
    success    y, whether the episode succeeded

and J(s, x_t, t) of the chunk, noised to t as the policy's own are while they are denoised, is learned by

    return     L = E (J - (R - mean R) / std R)²
    success    L = -E y log σ(J) + (1 - y) log σ(-J)          so that log σ(J) = log p(success | s, x_t)

A share of the chunks stays clean, so that the same networks score what the policy has drawn and guide its denoising by
a gradient at the clean chunk, too. What is used are averaged weights. The policy stays as it is.

The values are those of acting as the data do after the chunk: for acting better than that, learn critics (`IDQL`).

Shapes: S steps, B batch, O observation steps, H actions of a chunk, A action size, n networks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dprl import checkpoint
from dprl.agents.bc import require_like
from dprl.agents.prospects import StateValue, prospects
from dprl.config import validate
from dprl.data import Episodes
from dprl.data.loader import Batch, ChunkBatches
from dprl.data.transitions import returns_to_go
from dprl.errors import DatasetError, check, check_count
from dprl.networks import polyak_update
from dprl.policy import DiffusionPolicy, Policy
from dprl.policy.chunk_value import CLEAN_LEVEL, ChunkValue, ChunkValueConfig
from dprl.returns import explained_variance
from dprl.seeding import draw_uniform, seeded_init, torch_generator
from dprl.spec import FloatArray
from dprl.training import Agent, LoopConfig, train
from dprl.training.learner import Learner

VALIDATION_CHUNKS, VALIDATED_AT_ONCE = 4_096, 256


@dataclass(frozen=True)
class OutcomeConfig:
    """What is learned, and how."""

    of: Literal["return", "success"] = "return"
    """What chunks lead to: the discounted return, or success."""
    critic: ChunkValueConfig = field(default_factory=ChunkValueConfig)
    """The networks."""
    gamma: float = 0.997
    """Discount of one environment step."""
    termination_penalty: float = 0.0
    """What is taken from the last reward of an episode that terminated (100 in Diffuser on locomotion)."""
    clean_share: float = 0.25
    """Of the chunks of a minibatch that stay without noise, where others are noised."""
    batch_size: int = 256
    """Chunks per gradient step."""
    learning_rate: float = 3e-4
    """At first; it falls to nothing."""
    ema_decay: float = 0.995
    """Of the averaged weights, which are what is used and saved."""
    validation_share: float = 0.1
    """Share of the episodes that is held out; what is explained of their outcomes is logged."""
    validation_every: int = 10
    """Iterations between two looks at them."""
    steps_per_iteration: int = 100
    """Gradient steps between two chances to log or stop."""
    num_workers: int | None = None
    """Processes that read the data. Default: 0 for data that fit on the policy's device, else 2."""

    def __post_init__(self) -> None:
        counts = ("batch_size", "steps_per_iteration", "validation_every")
        least = {**dict.fromkeys(counts, 1), "num_workers": 0, "termination_penalty": 0}
        validate(self, at_least=least, above={"learning_rate": 0})
        for name in ("gamma", "clean_share"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must be from 0 to 1")
        for name in ("ema_decay", "validation_share"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "must be at least 0 and below 1")
        number = self.critic.worth == "number"
        check(number, "critic.worth", self.critic.worth, "must be left out: it follows from what is learned")
        noised = self.critic.noised or self.clean_share == OutcomeConfig.clean_share
        check(noised, "clean_share", self.clean_share, "must be left out where nothing is noised")
        fits = self.of == "return" or self.termination_penalty == 0
        check(fits, "termination_penalty", self.termination_penalty, "is of returns: leave it out for success")

    @property
    def networks(self) -> ChunkValueConfig:
        """The networks of what is learned."""
        return replace(self.critic, worth="log_probability" if self.of == "success" else "number")


class Outcome(Agent[Tensor]):
    """Learns what a diffusion policy's chunks lead to from data of any kind; the policy stays as it is."""

    name = "outcome"
    policy: DiffusionPolicy
    config: OutcomeConfig

    def __init__(
        self,
        policy: Policy,
        config: OutcomeConfig | None = None,
        *,
        critics: Policy | StateValue | None = None,
        seed: int = 0,
    ) -> None:
        """Prepare to learn.

        Args:
            policy: whose chunks are judged; its `scorer` becomes what is learned.
            config: the numbers.
            critics: V, or a policy whose critics say what follows a chunk, see `prospects`. Default: what followed in
                the data.
            seed: of the networks, the held-out episodes, minibatches and noise.

        Raises:
            ConfigError: a policy that does not denoise, or settings that critics leave no use for.
        """
        check(isinstance(policy, DiffusionPolicy), "policy", policy.name, "must be a diffusion policy or flow")
        assert isinstance(policy, DiffusionPolicy)
        self.policy, self.config, self.seed, self.timesteps = policy, config or OutcomeConfig(), seed, 0
        self._critics = critics
        for name in ("of", "gamma", "termination_penalty") if critics is not None else ():
            own, usual = getattr(self.config, name), getattr(OutcomeConfig, name)
            check(own == usual, name, own, "must be left out: critics have their own")
        drawn = policy.denoised_size == policy.chunk_size or not self.config.critic.noised
        check(drawn, "critic.noised", True, "must be False: the policy denoises a part of its chunks only")
        with seeded_init(seed, "outcome"):
            networks = self.config.networks
            self.critic, self.average = (ChunkValue.of(policy, networks).to(policy.device) for _ in range(2))
        self.average.load_state_dict(self.critic.state_dict())
        policy.scorer = self.average.requires_grad_(False)
        self._learner = Learner(self.critic, self.config.learning_rate)
        self._generator = torch_generator(seed, "outcome", device=policy.device)
        self._total_steps = 1
        self._held_out: _Chunks | None = None

    def fit(self, data: Episodes, steps: int, *, progress_bar: bool = False) -> ChunkValue:
        """Take `steps` more gradient steps on `data`; return what was learned, which is the policy's `scorer` too.

        Raises:
            ConfigError: no steps.
            DatasetError: the data do not fit the policy, or do not say what episodes led to.
        """
        check_count("steps", steps)
        total = self.timesteps + steps
        self.set_data(data, total)
        train(self, LoopConfig(total), progress_bar=progress_bar)
        return self.average

    def set_data(self, data: Episodes, total_steps: int) -> None:
        """Take `data` to learn from; `total_steps` shapes the learning rate's decay."""
        require_like(self.policy, data)
        self._total_steps = total_steps
        shown, held_out = data.split(self.config.validation_share, self.seed)
        outcomes = self._outcomes(shown)
        if outcomes.min() == outcomes.max():
            raise DatasetError(f"every {self.config.of} of the data is {outcomes[0]:g}: there is nothing to tell apart")
        if self.config.of == "return":
            for average in (self.critic, self.average):
                average.mean.fill_(float(outcomes.mean()))
                average.std.fill_(float(outcomes.std()))
        self._training = self._chunks(shown, outcomes)
        self._held_out = None if held_out is None else self._chunks(held_out, self._outcomes(held_out))

    def _outcomes(self, data: Episodes) -> FloatArray:
        """What every step led to: (S,)."""
        if self._critics is not None:
            return prospects(data, self.policy.config.horizon, self._critics)
        if self.config.of == "return":
            return returns_to_go(data, self.config.gamma, self.config.termination_penalty)
        if not data.success_known:
            raise DatasetError("the data do not say which episodes succeeded; learn from their return instead")
        return np.repeat(data.success, data.lengths).astype(np.float32)

    def _chunks(self, data: Episodes, outcomes: FloatArray) -> _Chunks:
        config, device = self.policy.config, self.policy.device
        cut = data.chunks(config.n_obs_steps, config.horizon, pad_after=config.horizon - 1)
        batches = ChunkBatches(self.policy.chunks_of(data), cut, device, num_workers=self.config.num_workers)
        return _Chunks(batches, torch.as_tensor(outcomes[cut.action_rows[:, 0]], device=device))

    def collect(self) -> Tensor:
        """Draw the minibatches of one iteration, with replacement: indices of chunks (steps, B)."""
        steps = min(self.config.steps_per_iteration, self._total_steps - self.timesteps)
        shape = (steps, self.config.batch_size)
        n, device = len(self._training.outcomes), self.policy.device
        return torch.randint(n, shape, generator=self._generator, device=device)

    def update(self, batch: Tensor) -> dict[str, float]:
        """Take one gradient step for each row of `batch` (steps, B)."""
        start = time.perf_counter()
        read = self._training.batches.read(batch)
        losses = [self.step(chunks, self._training.outcomes[rows]) for chunks, rows in zip(read, batch, strict=True)]
        taken = time.perf_counter() - start
        metrics = {
            f"{self.name}/loss": float(torch.stack(losses).mean()),
            "time/samples_per_s": batch.numel() / taken,
        }
        due = -(-self.timesteps // self.config.steps_per_iteration) % self.config.validation_every == 0
        return metrics | (self._validate() if due or self.timesteps >= self._total_steps else {})

    def step(self, chunks: Batch, outcomes: Tensor) -> Tensor:
        """Take one gradient step on chunks and their outcomes (B,); return the loss."""
        policy, critic, generator = self.policy, self.critic, self._generator
        self._learner.set_rate(1 - self.timesteps / self._total_steps)
        clean, levels = policy.chunk_normalizer.normalize(chunks.actions), self._levels(len(outcomes))
        noisy = critic.noised(policy.schedule, clean, levels, generator)
        seen = critic.see(chunks.obs, generator if policy.features.cameras else None)
        said = critic(seen, noisy, levels)
        loss = self._loss(said, outcomes.expand_as(said))
        self._learner.zero_grad()
        loss.backward()
        self._learner.step()
        self.timesteps += 1
        polyak_update(critic, self.average, 1 - self.config.ema_decay)
        return loss.detach()

    def _levels(self, n: int) -> Tensor:
        """Draw the noise of chunks: (n,)."""
        if not self.config.critic.noised:
            return torch.full((n,), CLEAN_LEVEL, device=self.policy.device)
        steps, draws = self.policy.config.num_train_timesteps, draw_uniform((2, n), self._generator, self.policy.device)
        noisy = 1 + (draws[1] * steps).long().clamp(max=steps - 1)
        return torch.where(draws[0] < self.config.clean_share, CLEAN_LEVEL, noisy)

    def _loss(self, said: Tensor, outcomes: Tensor) -> Tensor:
        if self.config.of == "success":
            return binary_cross_entropy_with_logits(said, outcomes)
        return ((said - (outcomes - self.critic.mean) / self.critic.std) ** 2).mean()

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """What is explained of the outcomes of held-out chunks, which are without noise and the same each time."""
        held = self._held_out
        if held is None:
            return {}
        n = min(len(held.outcomes), VALIDATION_CHUNKS)
        generator = torch_generator(self.seed, "validation", device=self.policy.device)
        picks = torch.randperm(len(held.outcomes), generator=generator, device=self.policy.device)[:n]
        parts = [next(iter(held.batches.read(rows[None]))) for rows in picks.split(VALIDATED_AT_ONCE)]
        said = torch.cat([self.average.score(part.obs, part.actions) for part in parts])
        said = said.exp() if self.config.of == "success" else said
        return {"validation/explained_variance": explained_variance(said, held.outcomes[picks])}

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs beside the policy."""
        return {
            "timesteps": self.timesteps,
            "critic": self.critic.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self._learner.state(),
            "generator": self._generator.get_state(),
        }

    def restore(self, state: checkpoint.StateTree) -> None:
        """Take up what `state` returned; the policy must be loaded."""
        self.timesteps = state["timesteps"]
        self.critic.load_state_dict(state["critic"])
        self.average.load_state_dict(state["average"])
        self._learner.restore(state.get("optimizer", {}))
        self._generator.set_state(state["generator"])


class _Chunks(NamedTuple):
    """Chunks and what they led to."""

    batches: ChunkBatches
    outcomes: Tensor
    """(chunks,)."""
