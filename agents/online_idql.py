"""IDQL that goes on in an environment (arXiv:2304.10573, section 5.3).

Every iteration takes decisions in every environment, each chosen among samples of the behaviour policy, and puts them
into a replay buffer. Then critics learn as they did from data, of minibatches that are mixed from buffer and data. The
behaviour policy stays as it is, and the best sample is taken; or it goes on being cloned from the same mixture, and
samples are drawn by their implicit weights.

Shapes: T decisions, N environments, B decisions of a minibatch, O observation steps, H actions of a chunk of which the
first E are executed, A action size, M candidates.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from dprl import checkpoint
from dprl.agents.idql import IDQL, IDQLConfig, metrics_of
from dprl.agents.on_policy import pool_state, restore_pool
from dprl.config import validate
from dprl.data import Episodes
from dprl.data.loader import DecisionBatch
from dprl.data.replay import ReplayBuffer
from dprl.data.transitions import chunk_return
from dprl.errors import DatasetError, check
from dprl.mdp import Chain
from dprl.observations import Observation, TensorObservation, batch_size, map_parts
from dprl.policy import DiffusionPolicy
from dprl.policy.candidates import Selection, best_of
from dprl.policy.critic import ValueTerms
from dprl.rollout import Rollout, RolloutPool, as_pool
from dprl.rollout.pool import require_fit
from dprl.seeding import torch_generator
from dprl.spec import BatchedEnv
from dprl.training import Agent, LoopConfig, train


@dataclass(frozen=True)
class OnlineIDQLConfig:
    """How IDQL acts and learns in an environment."""

    learner: IDQLConfig = field(default_factory=IDQLConfig)
    """How critics, and a behaviour policy that goes on, learn: the latter at a constant `bc.learning_rate`. Where the
    policy has critics, `critic`, `gamma`, `bootstrap_truncated` and the scale of the rewards are theirs. Without, the
    default of `bootstrap_truncated` is: unless the environment's reward is sparse."""
    actor: Literal["frozen", "continues"] = "frozen"
    """Whether the behaviour policy stays as it is, or goes on being cloned."""
    candidates: int = 64
    """M, samples of which one is executed."""
    selection: Selection | None = None
    """How it is chosen, see `InferenceConfig`. Default: argmax of a frozen policy, implicit of one that goes on."""
    temperature: float = 1.0
    """Of the samples' noise, see `InferenceConfig`."""
    n_steps: int = 25
    """T, decisions per environment and iteration."""
    updates_per_decision: float = 1.0
    """Gradient steps for each decision that was taken."""
    start_decisions: int = 1_000
    """No updates before so many are in the buffer."""
    capacity: int = 200_000
    """Of the buffer, in decisions."""
    data_share: float = 0.5
    """Share of each minibatch that comes from the data, where there are any."""

    def __post_init__(self) -> None:
        counts = ("candidates", "n_steps", "start_decisions", "capacity")
        validate(self, at_least={**dict.fromkeys(counts, 1), "temperature": 0}, above={"updates_per_decision": 0})
        check(0 <= self.data_share < 1, "data_share", self.data_share, "must be at least 0 and below 1")
        fits = self.start_decisions <= self.capacity
        check(fits, "start_decisions", self.start_decisions, f"must be at most capacity, which is {self.capacity}")
        check(
            self.candidates > 1 or self.selection is None, "selection", self.selection, "needs candidates, more than 1"
        )
        objective, clones = self.learner.actor_objective, self.actor == "continues"
        check(clones or objective == "bc", "learner.actor_objective", objective,
              "must be bc: a frozen policy is not cloned; actor = continues")  # fmt: skip

    @property
    def chosen_by(self) -> Selection:
        """`selection`, or its default."""
        return self.selection or ("argmax" if self.actor == "frozen" else "implicit")


class CandidateActor:
    """Acts in a pool: draws candidates for each decision and executes one. Chains are the chunks alone."""

    def __init__(self, policy: DiffusionPolicy, candidates: int, selection: Selection, temperature: float) -> None:
        self.policy, self.candidates, self.selection, self.temperature = policy, candidates, selection, temperature

    @property
    def n_action_steps(self) -> int:
        """E, how many actions of a chunk are executed."""
        return self.policy.n_action_steps

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(draws, H, A): all of each candidate, and one whose first number makes the choice."""
        shape = self.policy.config.horizon, self.policy.features.action_size
        return self.policy.n_draws() * self.candidates + 1, *shape

    @torch.no_grad()
    def sample(self, obs: TensorObservation, *, noise: Tensor) -> Chain:
        """Return a chunk for each observation (B, O, D), of `noise` (draws, B, H, A)."""
        policy, m, n = self.policy, self.candidates, batch_size(obs)
        noise = noise.to(policy.device)
        draws = noise[:-1].unflatten(0, (policy.n_draws(), m)).transpose(1, 2).flatten(1, 2)

        def draw(every: TensorObservation) -> Tensor:
            return policy.sample(every, noise=draws, temperature=self.temperature)

        if m == 1:
            actions = draw(obs)
        else:
            uniform = torch.special.ndtr(noise[-1, :, 0, 0])
            actions = best_of(draw, policy.checked(obs), m, policy.scorer, selection=self.selection, uniform=uniform)
        return Chain(actions[:, None], torch.zeros(n, 1, 1, 1), actions)

    def cpu(self) -> Self:
        """Return the same on the CPU."""
        on_cpu = self.policy.device.type == "cpu"
        policy = self.policy if on_cpu else copy.deepcopy(self.policy).cpu()
        return self if on_cpu else type(self)(policy, self.candidates, self.selection, self.temperature)


class OnlineIDQL(Agent[Rollout]):
    """Lets a policy and its critics, learned from data, go on learning in an environment."""

    name = "online-idql"
    config: OnlineIDQLConfig

    def __init__(
        self,
        policy: DiffusionPolicy,
        env: BatchedEnv | RolloutPool,
        config: OnlineIDQLConfig | None = None,
        *,
        data: Episodes | None = None,
        seed: int = 0,
    ) -> None:
        """Prepare to go on.

        Args:
            policy: the behaviour policy, with the critics that `IDQL` gave it, or without.
            env: where it acts; a batched environment is put in a pool.
            config: the numbers.
            data: what it was learned from, to be mixed in.
            seed: of minibatches and noise.

        Raises:
            ConfigError: a policy that is no diffusion policy or flow, or settings at odds.
            EnvError: the policy does not fit the environment.
            DatasetError: the data have no rewards, or do not fit the policy.
        """
        config = config or OnlineIDQLConfig()
        bc = config.learner.bc
        learner = replace(config.learner, bc=replace(bc, final_learning_rate=bc.learning_rate))  # a run has no end yet
        known = isinstance(policy, DiffusionPolicy)
        check(known, "policy", type(policy).__name__, "must be a diffusion policy or flow, whose noise can be replayed")
        whole = policy.n_action_steps == policy.config.horizon
        check(config.actor == "frozen" or whole, "actor", config.actor,
              "must be frozen: only what was executed can be cloned, and this policy plans further")  # fmt: skip
        told = policy.config.command
        check(config.actor == "frozen" or told is None, "actor", config.actor,
              f"must be frozen: nobody says what {told} would be commanded online")  # fmt: skip
        self.pool = as_pool(env, seed)
        require_fit(policy, self.pool.spec)
        at_once = self.pool.n_envs * config.n_steps
        check(config.capacity >= at_once, "capacity", config.capacity,
              f"must be at least {at_once}: n_steps of every environment come at once")  # fmt: skip
        self.seed, self.timesteps = seed, 0
        self.policy = policy
        self.learner = IDQL(policy, learner, seed=seed)
        self.config = replace(config, learner=self.learner.config)
        self._terms = self._learn_values_of(data)
        self._has_data = data is not None and self.config.data_share > 0
        self._actor = CandidateActor(policy, self.config.candidates, self.config.chosen_by, self.config.temperature)
        self._buffer = ReplayBuffer(
            self.config.capacity, policy.blank_observation(1), policy.n_action_steps, policy.features.action_size,
            policy.device,
        )  # fmt: skip
        self._generator = torch_generator(seed, "online", device=policy.device)

    def _learn_values_of(self, data: Episodes | None) -> ValueTerms:
        """Settle what values are of, for data and buffer alike."""
        learner, target = self.learner, self.learner.target
        asked, scaled = learner.config.bootstrap_truncated, learner.config.return_range
        terms = target.terms
        if terms is None:
            check(scaled is None or data is not None, "learner.return_range", scaled, "must be None: there are no data")
            bootstraps = self.pool.spec.reward != "sparse" if asked is None else asked
            scale = 1.0 if data is None else learner.scale_of(learner.shown(data))
            terms = ValueTerms(learner.config.gamma, scale, bootstraps, scaled, self.pool.spec.reward)
        if data is not None and data.rewards_from == "success" and self.pool.spec.reward == "dense":
            raise DatasetError("the data's rewards were made of success, 1 or 0, and the environment's are dense: "
                               "values are of one kind. Take its sparse reward, or leave the data out")  # fmt: skip
        here, kinds = self.pool.spec.reward, {"critics": terms.reward_kind, "data": data and data.reward_kind}
        for what, kind in kinds.items():
            check(
                kind in (None, here), "reward", here, f"must be {kind}, as the {what} have it: values are of one kind"
            )
        target.terms = terms
        if data is not None:
            learner.set_data(data, 1, terms)
        return terms

    def learn(self, total_timesteps: int, *, progress_bar: bool = False) -> Self:
        """Collect and update for `total_timesteps` more environment steps, as stable-baselines3 does."""
        train(self, LoopConfig(self.timesteps + total_timesteps), progress_bar=progress_bar)
        return self

    def collect(self) -> Rollout:
        """Take `n_steps` decisions in every environment."""
        rollout = self.pool.collect(self._actor, self.config.n_steps)
        self.timesteps += int(rollout.n_steps.sum())
        return rollout

    def update(self, batch: Rollout) -> dict[str, float]:
        """Put the decisions into the buffer and learn from the mixture."""
        start = time.perf_counter()
        self._buffer.add(self._decisions(batch))
        metrics = batch.episode_metrics() | {
            "idql/buffer": float(len(self._buffer)),
            "time/inference_s": batch.inference_s,
        }
        if len(self._buffer) < self.config.start_decisions:
            return metrics
        n = max(1, round(self.config.updates_per_decision * batch.rewards.size))
        figures, losses = [], []
        for minibatch in self._mixed(n):
            figures.append(self.learner.update_critic(minibatch))
            if self.config.actor == "continues":
                losses.append(self.learner.update_actor(minibatch.chunks()))
        metrics |= metrics_of(figures) | {
            "time/samples_per_s": n * self.config.learner.batch_size / (time.perf_counter() - start)
        }
        return metrics | ({"bc/loss": float(torch.stack(losses).mean())} if losses else {})

    def _decisions(self, rollout: Rollout) -> DecisionBatch:
        """A rollout (T, N, ...) as decisions (T·N, ...)."""
        device, terms = self.policy.device, self._terms
        over = rollout.terminated if terms.bootstrap_truncated else rollout.ended
        discount = np.where(over, 0.0, terms.gamma**rollout.n_steps).astype(np.float32)

        def rows(part: Any) -> Tensor:
            return torch.as_tensor(part, device=device).flatten(0, 1)

        def seen(observation: Observation) -> TensorObservation:
            moved: TensorObservation = map_parts(rows, observation)
            return moved

        n_steps, planned = rows(rollout.n_steps), rows(rollout.chains[:, :, 0])[:, : self.policy.n_action_steps]
        which = torch.arange(planned.shape[1], device=device).clamp(max=n_steps[:, None] - 1)  # the last one repeats
        return DecisionBatch(
            seen(rollout.observations),
            planned.gather(1, which[..., None].expand_as(planned)),
            seen(rollout.final_observations),
            terms.reward_scale * rows(chunk_return(rollout.step_rewards, terms.gamma)),
            rows(discount),
            n_steps,
        )

    def _mixed(self, n: int) -> Iterator[DecisionBatch]:
        """Yield n minibatches."""
        size = self.config.learner.batch_size
        from_data = round(self.config.data_share * size) if self._has_data else 0
        if not from_data:
            for _ in range(n):
                yield self._buffer.sample(size, self._generator)
            return
        batches = self.learner.decisions
        picks = torch.randint(len(batches), (n, from_data), generator=self._generator, device=self.policy.device)
        for old in batches.read(picks):
            new = self._buffer.sample(size - from_data, self._generator)
            yield DecisionBatch(
                *(map_parts(lambda a, b: torch.cat([a, b]), a, b) for a, b in zip(old, new, strict=True))
            )

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs beside the policy."""
        return {
            "timesteps": self.timesteps,
            "learner": self.learner.state(),
            "buffer": self._buffer.state(),
            "generator": self._generator.get_state(),
            "pool": pool_state(self.pool),
        }

    def restore(self, state: checkpoint.StateTree) -> None:
        """Take up what `state` returned; the pool must be freshly built, and the policy loaded."""
        self.timesteps = state["timesteps"]
        self.learner.restore(state["learner"])
        self._buffer.restore(state["buffer"])
        self._generator.set_state(state["generator"])
        restore_pool(self.pool, state["pool"])
