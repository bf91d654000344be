"""Episodes step by step, for whoever wants to look: drawn trajectories, videos, shares of modes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from dprl.observations import Observation, map_parts, put, take
from dprl.spec import BatchedEnv, ChunkStep, EnvSpec, EnvState, FloatArray, IntArray


@dataclass
class Trajectory:
    """One episode of T steps."""

    observations: list[Observation] = field(default_factory=list)
    """T+1 of (D,), or named parts."""
    actions: list[FloatArray] = field(default_factory=list)
    """T of (A,), as the policy chose them."""
    rewards: list[float] = field(default_factory=list)
    success: bool = False

    def states(self) -> FloatArray:
        """(T+1, D) of a task whose observation is a plain array."""
        return np.stack([np.asarray(observation) for observation in self.observations])


def visited(trajectories: Sequence[Trajectory], n_obs_steps: int, at_most: int) -> Observation:
    """Return what a policy saw on its way, evenly over all steps: (B, O, D), or named parts, of at most `at_most`."""
    seen = [
        map_parts(
            lambda *parts: np.stack(parts),
            *(t.observations[max(i, 0)] for i in range(step - n_obs_steps + 1, step + 1)),
        )
        for t in trajectories
        for step in range(len(t.actions))
    ]
    kept = [seen[i] for i in np.linspace(0, len(seen) - 1, min(at_most, len(seen))).astype(int)]
    together: Observation = map_parts(lambda *parts: np.stack(parts), *kept)
    return together


class Recorder:
    """A batched environment that executes chunks action by action and writes down what happened."""

    def __init__(self, env: BatchedEnv) -> None:
        self._env = env
        self.trajectories: list[list[Trajectory]] = [[] for _ in range(env.n_envs)]
        """The episodes of each environment, the open one last."""

    @property
    def spec(self) -> EnvSpec:
        """The task."""
        return self._env.spec

    @property
    def n_envs(self) -> int:
        """N."""
        return self._env.n_envs

    def reset(self, indices: IntArray | None = None) -> Observation:
        """See `BatchedEnv.reset`."""
        observation = self._env.reset(indices)
        for row, index in enumerate(range(self.n_envs) if indices is None else indices):
            self.trajectories[index].append(Trajectory([_latest(observation, row)]))
        return observation

    def step_chunk(self, actions: FloatArray, indices: IntArray | None = None, *, autoreset: bool = True) -> ChunkStep:
        """See `BatchedEnv.step_chunk`; without automatic resets only."""
        assert not autoreset, "episodes that follow each other unseen cannot be recorded"
        indices = np.arange(self.n_envs) if indices is None else np.asarray(indices)
        whole: ChunkStep | None = None
        going = np.arange(len(indices))
        rewards = np.zeros(actions.shape[:2], np.float32)
        for e in range(actions.shape[1]):
            step = self._env.step_chunk(actions[going, e : e + 1], indices[going], autoreset=False)
            self._write(indices[going], actions[going, e], step)
            rewards[going, e] = step.reward
            whole = step if whole is None else _merged(whole, step, going)
            going = going[~step.ended]
            if len(going) == 0:
                break
        assert whole is not None
        return replace(whole, step_rewards=rewards)

    def state(self) -> EnvState:
        """See `BatchedEnv.state`."""
        return self._env.state()

    def restore(self, state: EnvState) -> Observation:
        """See `BatchedEnv.restore`."""
        return self._env.restore(state)

    def close(self) -> None:
        """See `BatchedEnv.close`."""
        self._env.close()

    def _write(self, indices: IntArray, actions: FloatArray, step: ChunkStep) -> None:
        for row, index in enumerate(indices):
            trajectory = self.trajectories[index][-1]
            trajectory.observations.append(_latest(step.final_observation, row))
            trajectory.actions.append(actions[row])
            trajectory.rewards.append(float(step.reward[row]))
            trajectory.success = bool(step.success[row])


def _latest(observation: Observation, row: int) -> Any:
    """What one environment observes now: (D,), or named parts."""
    return map_parts(lambda part: part[row, -1].copy(), observation)


def _merged(whole: ChunkStep, step: ChunkStep, rows: IntArray) -> ChunkStep:
    """Put one more step of the environments `rows` into the chunk so far."""
    merged = {}
    for part in fields(ChunkStep):
        old, new = getattr(whole, part.name), getattr(step, part.name)
        if part.name == "n_steps":
            new = take(old, rows) + new
        old = map_parts(np.copy, old)
        put(old, rows, new)
        merged[part.name] = old
    return replace(whole, **merged)
