"""The inner loop of every pool: some of the environments, and the policy acting in them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from dprl.cores import one_thread
from dprl.errors import EnvActionError, EnvError, LocatedEnvError, check, check_count
from dprl.observations import Observation, map_parts, take, to_tensors
from dprl.rollout.pool import Actor, Rollout
from dprl.seeding import EpisodeNoise
from dprl.spec import BatchedEnv, ChunkStep, EnvSpec, EnvState, FloatArray, IntArray, build, env_seeds


@dataclass(frozen=True)
class Share:
    """Whole slices of a pool's environments, as plain data: enough to build them anywhere, and again."""

    spec: EnvSpec
    seed: int
    """Of the pool."""
    slice_size: int
    first_env: int
    n_envs: int
    num_threads: int = 0
    """Of the simulator; 0: every core."""

    def __post_init__(self) -> None:
        check_count("seed", self.seed, 0)

    def build(self) -> Collector:
        """Build the environments."""
        env = build(self.spec, env_seeds(self.seed, self.n_envs, self.first_env), self.num_threads)
        return Collector(env, self.seed, self.slice_size, self.first_env)

    def divided(self, n: int, field: str) -> list[Share]:
        """Return `n` shares of equal size.

        Raises:
            ConfigError: naming `field`, which asked for them: whole slices cannot be divided so.
        """
        check_count(field, n)
        slices = self.n_envs // self.slice_size
        check(slices % n == 0, field, n, "must divide the number of slices: "
              f"{self.n_envs} environments / slice_size {self.slice_size} = {slices}")  # fmt: skip
        size = self.n_envs // n
        return [replace(self, first_env=self.first_env + i * size, n_envs=size) for i in range(n)]

    def __str__(self) -> str:
        return f"environments {self.first_env} to {self.first_env + self.n_envs - 1} of {self.spec.id}"


class Collector:
    """Acts in a batched environment, slice by slice."""

    def __init__(self, env: BatchedEnv, seed: int, slice_size: int, first_env: int = 0) -> None:
        self.env = env
        self._first_env = first_env
        self.indices = np.arange(first_env, first_env + env.n_envs)
        self._slices = [slice(i, i + slice_size) for i in range(0, env.n_envs, slice_size)]
        self._noise = EpisodeNoise(seed, "noise")
        self._observation: Observation | None = None
        self._episodes = self._steps = np.zeros(env.n_envs, np.int64)

    @property
    def observation(self) -> Observation:
        """(N, O, D) what the next decision sees."""
        return self.reset() if self._observation is None else self._observation

    def reset(self) -> Observation:
        """See `RolloutPool.reset`."""
        self._observation = None  # what is interrupted is begun anew
        with self._own_indices():
            observation = self.env.reset()
        self._observe(observation, self.env.state())
        return observation

    def step_chunk(self, actions: FloatArray) -> ChunkStep:
        """See `RolloutPool.step_chunk`."""
        if self._observation is None:
            raise EnvError("step_chunk before reset: an episode must be open")
        try:
            with self._own_indices():
                step = self.env.step_chunk(actions)
        except EnvActionError:  # nothing was executed
            raise
        except BaseException:
            self._observation = None  # nobody knows how far it came: new episodes begin
            raise
        self._observation = step.observation
        self._episodes = self._episodes + step.ended
        self._steps = np.where(step.ended, 0, step.episode_length)
        return step

    def decide(self, actor: Actor) -> Decision:
        """Decide what the latest observations call for."""
        observation = self.observation
        noise = self._noise.draw(actor.noise_shape, self.indices, self._episodes, self._steps)
        start = time.perf_counter()
        with one_thread():
            # in memory of their own: strides and neighbours decide which of torch's kernels, and so how it rounds
            chains = [
                actor.sample(to_tensors(take(observation, rows)), noise=torch.from_numpy(noise[:, rows].copy()))
                for rows in self._slices
            ]
        steps, log_probs, actions = (
            torch.cat([getattr(chain, name) for chain in chains]).cpu().numpy()
            for name in ("steps", "log_probs", "actions")
        )
        return Decision(observation, steps, log_probs, actions[:, : actor.n_action_steps], time.perf_counter() - start)

    def collect(self, actor: Actor, n_steps: int) -> Rollout:
        """See `RolloutPool.collect`."""
        record = Record(self.indices)
        for _ in range(n_steps):
            decision = self.decide(actor)
            record.begin(decision)
            record.end(self.step_chunk(decision.actions))
        return record.rollout()

    def state(self) -> EnvState:
        """See `RolloutPool.state`."""
        return self.env.state()

    def restore(self, state: EnvState) -> None:
        """Take up `state`; the environments must be freshly built, or be able to go back."""
        self._observation = None
        with self._own_indices():
            observation = self.env.restore(state)
        if (state.episodes >= 0).all():
            self._observe(observation, self.env.state())

    def dispose(self) -> None:
        """Close what may have failed, and may not close either."""
        with suppress(Exception):  # an environment that was handed in may be anything
            self.env.close()

    def _observe(self, observation: Observation, state: EnvState) -> None:
        self._observation, self._episodes, self._steps = observation, state.episodes, state.lengths

    @contextmanager
    def _own_indices(self) -> Iterator[None]:
        """Name the environment of a fault as the pool counts it."""
        try:
            yield
        except LocatedEnvError as error:
            raise error.counted_from(self._first_env) from error


class Decision(NamedTuple):
    """What every environment saw, and what was decided."""

    observation: Observation
    """(N, O, D)."""
    chains: FloatArray
    """(N, K'+1, H, A)."""
    log_probs: FloatArray
    """(N, K', H, A)."""
    actions: FloatArray
    """(N, E, A), to be executed."""
    seconds: float
    """How long it took."""


class Record:
    """The rows of a rollout."""

    def __init__(self, environments: IntArray) -> None:
        self._environments = environments
        self._decisions: list[Decision] = []
        self._steps: list[ChunkStep] = []

    def begin(self, decision: Decision) -> None:
        """Add a decision."""
        self._decisions.append(decision)

    def end(self, step: ChunkStep) -> None:
        """Add what came of it."""
        self._steps.append(step)

    def rollout(self) -> Rollout:
        """Stack them."""
        decisions, steps = self._decisions, self._steps
        return Rollout(
            observations=map_parts(lambda *arrays: np.stack(arrays), *(d.observation for d in decisions)),
            chains=np.stack([d.chains for d in decisions]),
            log_probs=np.stack([d.log_probs for d in decisions]),
            step_rewards=np.stack([s.step_rewards for s in steps]),
            terminated=np.stack([s.terminated for s in steps]),
            truncated=np.stack([s.truncated for s in steps]),
            success=np.stack([s.success for s in steps]),
            n_steps=np.stack([s.n_steps for s in steps]),
            final_observations=map_parts(lambda *arrays: np.stack(arrays), *(s.final_observation for s in steps)),
            episode_returns=np.stack([s.episode_return for s in steps]),
            episode_lengths=np.stack([s.episode_length for s in steps]),
            environments=self._environments,
            inference_s=sum(d.seconds for d in decisions),
        )
