"""N environments behind collect and close.

Environments are grouped in slices of fixed size. Inference runs slice by slice, on one thread, and each slice draws
its noise from its own stream: a row's result can depend on the batch and the threads it is computed with, so this is
what makes rollouts the same however the slices are spread over workers.

Shapes: T decisions, N environments, K' tuned steps, H actions of a chunk, E executed, A action size, O observation
steps, D observation size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from dprl.errors import ConfigError, EnvError, check
from dprl.mdp import Chain
from dprl.observations import Observation, TensorObservation, map_parts, take, to_tensors
from dprl.seeding import torch_generator
from dprl.spec import BatchedEnv, BoolArray, EnvSpec, EnvState, FloatArray, IntArray, build, env_seeds

MAX_SLICE = 32


class Actor(Protocol):
    """Acts in a pool; a `DenoisingMDP` is one."""

    def sample(self, obs: TensorObservation, generator: torch.Generator) -> Chain:
        """Draw a chain for each observation (B, O, D)."""
        ...

    def cpu(self) -> Self:
        """Return the same on the CPU."""
        ...


@dataclass(frozen=True)
class Rollout:
    """What one collection brought. All arrays are (T, N, ...)."""

    observations: Observation
    """(T, N, O, D) what each decision saw."""
    chains: FloatArray
    """(T, N, K'+1, H, A)."""
    rewards: FloatArray
    """Summed over the chunk."""
    terminated: BoolArray
    truncated: BoolArray
    success: BoolArray
    n_steps: IntArray
    """Environment steps executed by each decision."""
    final_observations: Observation
    """(T, N, O, D) what each decision led to, before any reset."""
    episode_returns: FloatArray
    """Reward of the episode up to and including the decision."""
    episode_lengths: IntArray
    """Environment steps of the episode up to and including the decision."""

    @property
    def ended(self) -> BoolArray:
        """(T, N) terminated or truncated."""
        ended: BoolArray = self.terminated | self.truncated
        return ended

    def episode_metrics(self) -> dict[str, float]:
        """Return success rate, mean return and length of the episodes that ended; none, where none did."""
        ended = self.ended
        if not ended.any():
            return {}
        return {
            "rollout/success_rate": float(self.success[ended].mean()),
            "rollout/return_mean": float(self.episode_returns[ended].mean()),
            "rollout/episode_length_mean": float(self.episode_lengths[ended].mean()),
            "rollout/episodes": float(ended.sum()),
        }

    @staticmethod
    def concatenate(parts: Sequence[Rollout]) -> Rollout:
        """Join the rollouts of several workers along the environments."""
        return Rollout(
            **{
                f.name: map_parts(lambda *arrays: np.concatenate(arrays, axis=1), *(getattr(p, f.name) for p in parts))
                for f in fields(Rollout)
            }
        )


@dataclass(frozen=True)
class PoolState:
    """All that brings a pool back exactly."""

    env: EnvState
    generators: Tensor
    """(slices, bytes) uint8 states of the noise streams."""

    @staticmethod
    def concatenate(parts: Sequence[PoolState]) -> PoolState:
        """Join the states of several workers."""
        env = EnvState(**{f.name: np.concatenate([getattr(p.env, f.name) for p in parts]) for f in fields(EnvState)})
        return PoolState(env, torch.cat([p.generators for p in parts]))

    def part(self, first_env: int, n_envs: int, slice_size: int) -> PoolState:
        """Return the state of `n_envs` environments from `first_env` on."""
        envs = slice(first_env, first_env + n_envs)
        ends = np.concatenate([[0], np.cumsum(self.env.lengths)])
        actions = self.env.actions[ends[envs.start] : ends[envs.stop]]
        slices = slice(envs.start // slice_size, envs.stop // slice_size)
        return PoolState(EnvState(self.env.episodes[envs], self.env.lengths[envs], actions), self.generators[slices])


class RolloutPool(ABC):
    """N environments that a policy acts in. A context manager."""

    spec: EnvSpec
    """The task."""
    n_envs: int
    """N."""

    @abstractmethod
    def collect(self, actor: Actor, n_action_steps: int, n_steps: int) -> Rollout:
        """Take `n_steps` decisions in every environment, executing `n_action_steps` of each chunk.

        Episodes go on from where the last collection left them.
        """

    @abstractmethod
    def state(self) -> PoolState:
        """Return all that brings this pool back exactly."""

    @abstractmethod
    def restore(self, state: PoolState) -> None:
        """Take up `state`; this pool must be freshly built."""

    @abstractmethod
    def close(self) -> None:
        """End the environments and whatever runs them."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Collector:
    """The inner loop of every pool: some slices of the environments, and the streams that belong to them."""

    def __init__(self, env: BatchedEnv, seed: int, slice_size: int, first_slice: int = 0) -> None:
        self.env = env
        self._slices = [slice(i, i + slice_size) for i in range(0, env.n_envs, slice_size)]
        self._generators = [torch_generator(seed, "noise", first_slice + i) for i in range(len(self._slices))]
        self._observation: Observation | None = None

    def collect(self, actor: Actor, n_action_steps: int, n_steps: int) -> Rollout:
        """See `RolloutPool.collect`."""
        observation = self.env.reset() if self._observation is None else self._observation
        rows = []
        for _ in range(n_steps):
            with one_thread():
                chains = [
                    actor.sample(to_tensors(take(observation, s)), generator)
                    for s, generator in zip(self._slices, self._generators, strict=True)
                ]
            actions = torch.cat([chain.actions for chain in chains]).cpu().numpy()
            step = self.env.step_chunk(actions[:, :n_action_steps])
            rows.append((observation, torch.cat([chain.steps for chain in chains]).cpu().numpy(), step))
            observation = step.observation
        self._observation = observation
        observations, chains_, steps = zip(*rows, strict=True)
        return Rollout(
            observations=map_parts(lambda *arrays: np.stack(arrays), *observations),
            chains=np.stack(chains_),
            rewards=np.stack([s.reward for s in steps]),
            terminated=np.stack([s.terminated for s in steps]),
            truncated=np.stack([s.truncated for s in steps]),
            success=np.stack([s.success for s in steps]),
            n_steps=np.stack([s.n_steps for s in steps]),
            final_observations=map_parts(lambda *arrays: np.stack(arrays), *(s.final_observation for s in steps)),
            episode_returns=np.stack([s.episode_return for s in steps]),
            episode_lengths=np.stack([s.episode_length for s in steps]),
        )

    def state(self) -> PoolState:
        """See `RolloutPool.state`."""
        return PoolState(self.env.state(), torch.stack([g.get_state() for g in self._generators]))

    def restore(self, state: PoolState) -> None:
        """Take up `state`; the environments must be freshly built."""
        if len(state.env.episodes) != self.env.n_envs or len(state.generators) != len(self._slices):
            raise ConfigError(
                f"the saved state is of {len(state.env.episodes)} environments in {len(state.generators)} slices, "
                f"here are {self.env.n_envs} in {len(self._slices)}"
            )
        for generator, saved in zip(self._generators, state.generators, strict=True):
            generator.set_state(saved.clone())
        observation = self.env.restore(state.env)
        self._observation = observation if (state.env.episodes >= 0).all() else None


class InProcessPool(RolloutPool):
    """All environments in this process."""

    def __init__(
        self, env: BatchedEnv | EnvSpec, n_envs: int | None = None, *, seed: int = 0, slice_size: int | None = None
    ) -> None:
        """Take a batched environment, or build `n_envs` from a spec.

        Args:
            env: the environments, or what to build.
            n_envs: how many to build; only with a spec.
            seed: of the environments built and of the exploration noise.
            slice_size: environments per inference batch; must divide their number. Default: at most 32.
        """
        if isinstance(env, EnvSpec):
            if n_envs is None:
                raise ConfigError("n_envs = None: state how many environments to build from a spec")
            checked_slice_size(n_envs, slice_size)
            env = build(env, env_seeds(seed, n_envs))
        self.slice_size = checked_slice_size(env.n_envs, slice_size)
        self.spec, self.n_envs = env.spec, env.n_envs
        self._collector = Collector(env, seed, self.slice_size)

    def collect(self, actor: Actor, n_action_steps: int, n_steps: int) -> Rollout:
        """See `RolloutPool.collect`."""
        return self._collector.collect(actor, n_action_steps, n_steps)

    def state(self) -> PoolState:
        """See `RolloutPool.state`."""
        return self._collector.state()

    def restore(self, state: PoolState) -> None:
        """See `RolloutPool.restore`."""
        self._collector.restore(state)

    def close(self) -> None:
        """See `RolloutPool.close`."""
        self._collector.env.close()


def as_pool(env: BatchedEnv | RolloutPool, seed: int) -> RolloutPool:
    """Return `env` if it is a pool already, else a pool around it.

    Raises:
        EnvError: it is neither.
    """
    if not hasattr(env, "spec"):
        raise EnvError(f"{type(env).__name__} {env!r} is no batched environment: take dprl.make(id, n_envs=...)")
    return env if isinstance(env, RolloutPool) else InProcessPool(env, seed=seed)


def checked_slice_size(n_envs: int, slice_size: int | None) -> int:
    """Return `slice_size`, or the largest divisor of `n_envs` up to 32.

    Raises:
        ConfigError: it does not divide `n_envs`.
    """
    check(n_envs >= 1, "n_envs", n_envs, "must be at least 1")
    if slice_size is None:
        return max(size for size in range(1, min(n_envs, MAX_SLICE) + 1) if n_envs % size == 0)
    fits = 1 <= slice_size <= n_envs and n_envs % slice_size == 0
    check(fits, "slice_size", slice_size, f"must divide n_envs, which is {n_envs}")
    return slice_size


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: small batches are faster so, and the result does not depend on the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
