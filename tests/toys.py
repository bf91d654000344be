"""Small worlds whose answers are known."""

from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from dprl.data import Episodes
from dprl.envs.chunked import ChunkedEnv, SimulatorStep
from dprl.networks import MLPConfig
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features
from dprl.rollout import Rollout
from dprl.seeding import numpy_generator
from dprl.spec import EnvSpec, FloatArray, IntArray, build, env_seeds

ARRAYS = [field for field in fields(Rollout) if field.compare]
"""What rollouts are compared by: all but how long they took."""
SPEED = 0.1
TOLERANCE = 0.05


def reach_spec() -> EnvSpec:
    """A point on a line must stop at a goal. Observation: position, goal. Success: within 0.05 after a slow step."""
    return EnvSpec(
        id="toy/reach",
        builder="tests.toys:build_reach",
        backend_id="reach",
        observation_size=2,
        action_low=(-1.0,),
        action_high=(1.0,),
        max_episode_steps=40,
        reward="sparse",
        has_success=True,
    )


def build_reach(spec: EnvSpec, seeds: list[int], num_threads: int = 0) -> ChunkedEnv:
    return ChunkedEnv(spec, Reach(seeds), seeds)


def make_toy(spec: EnvSpec, n_envs: int, seed: int = 0) -> ChunkedEnv:
    env = build(spec, env_seeds(seed, n_envs))
    assert isinstance(env, ChunkedEnv)
    return env


def toy_policy(seed: int = 0) -> DiffusionPolicy:
    config = DiffusionConfig(horizon=2, num_train_timesteps=8, denoiser=MLPConfig(hidden_size=16))
    return DiffusionPolicy(Features(2, 1), config, seed=seed)


class Reach:
    """See `reach_spec`. Each episode's start and goal depend on the environment's seed and the episode alone."""

    def __init__(self, seeds: list[int]) -> None:
        self.seeds = seeds
        self.state = np.zeros((len(seeds), 2), np.float32)

    def reset(self, indices: IntArray, episodes: IntArray) -> npt.NDArray[Any]:
        for index, episode in zip(indices, episodes, strict=True):
            self.state[index] = numpy_generator(self.seeds[index], int(episode)).uniform(-1, 1, 2)
        return self.state[indices].copy()

    def step(self, indices: IntArray, actions: FloatArray) -> SimulatorStep:
        self.state[indices, 0] += SPEED * actions[:, 0]
        distance = np.abs(self.state[indices, 0] - self.state[indices, 1])
        success = (distance < TOLERANCE) & (np.abs(actions[:, 0]) < 0.5)
        no = np.zeros(len(indices), np.bool_)
        return SimulatorStep(self.state[indices].copy(), -distance, no, no, success)

    def close(self) -> None:
        pass


class PaysForEver:
    """Reward 1 at every step; the observation says nothing."""

    @staticmethod
    def batched(n_envs: int, limit: int) -> ChunkedEnv:
        spec = EnvSpec("toy/for-ever", "", "", 1, (-1.0,), (1.0,), max_episode_steps=limit)
        return ChunkedEnv(spec, PaysForEver(), list(range(n_envs)))

    def reset(self, indices: IntArray, episodes: IntArray) -> npt.NDArray[Any]:
        return np.full((len(indices), 1), 0.5, np.float32)

    def step(self, indices: IntArray, actions: FloatArray) -> SimulatorStep:
        no = np.zeros(len(indices), np.bool_)
        return SimulatorStep(np.full((len(indices), 1), 0.5), np.ones(len(indices)), no, no, no)

    def close(self) -> None:
        pass


def reach_demonstrations(seed: int, n_episodes: int = 30) -> Episodes:
    """A reacher with a weak and noisy hand."""
    from dprl.envs.collect import collect_episodes

    class Expert:
        def act(self, observation: npt.NDArray[Any]) -> FloatArray:
            return np.clip(5 * (observation[:, 1:] - observation[:, :1]), -1, 1).astype(np.float32)

    return collect_episodes(reach_spec(), Expert(), noise=0.8, n_episodes=n_episodes, seed=seed)
