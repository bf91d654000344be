"""Anything registered with Gymnasium, through `gymnasium.vector`."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dprl.envs.chunked import ChunkedEnv, SimulatorStep
from dprl.errors import EnvError, MissingDependencyError
from dprl.seeding import derive_seed
from dprl.spec import EnvSpec, FloatArray, IntArray, load

try:
    import gymnasium
except ImportError as error:
    raise MissingDependencyError("gymnasium", "envs", "running environments") from error

SUCCESS_KEYS = ("success", "is_success")


def build(spec: EnvSpec, seeds: list[int], num_threads: int = 0) -> ChunkedEnv:
    """Build one environment per seed; `num_threads` is not used (see `EnvSpec.vectorization`)."""
    return ChunkedEnv(spec, GymnasiumSimulator(spec, seeds), seeds)


def make_single(backend_id: str, max_episode_steps: int | None = None) -> gymnasium.Env[Any, Any]:
    """Build one plain environment: a Gymnasium id, or ``module:function!argument`` that returns one.

    Raises:
        EnvError: Gymnasium cannot build it.
    """
    if "!" in backend_id:
        reference, argument = backend_id.split("!")
        return cast("gymnasium.Env[Any, Any]", load(reference)(argument))
    try:
        return gymnasium.make(backend_id, max_episode_steps=max_episode_steps)
    except Exception as error:  # any package may fail in any way while it builds its environment
        raise EnvError(f"Gymnasium cannot make '{backend_id}': {error}") from error


class Held(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Stands still where the action is NaN, so that a vector environment can step a subset.

    Episode ends travel in the info, where the vector environment does not act on them, and success under one key,
    whatever the environment calls it.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self._observation: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset and remember the observation."""
        self._observation, _ = self.env.reset(seed=seed, options=options)
        return self._observation, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step, or stand still."""
        if np.isnan(action[0]):
            return self._observation, 0.0, False, False, {}
        space = cast("Any", self.env.action_space)
        result = self.env.step(np.asarray(action, space.dtype).reshape(space.shape))
        self._observation, reward, terminated, truncated, info = result
        success = any(float(info.get(key) or 0.0) > 0.5 for key in SUCCESS_KEYS)
        ends = {"dprl_terminated": bool(terminated), "dprl_truncated": bool(truncated), "dprl_success": success}
        return self._observation, float(reward), False, False, ends


class Flat(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Flattens observations (dictionaries too) and declares a flat float32 action that may be NaN."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(gymnasium.wrappers.FlattenObservation(env))
        size = int(np.prod(cast("Any", env.action_space).shape))
        self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)


class GymnasiumSimulator:
    """`gymnasium.vector` with automatic resets off: episodes are seeded one by one, so any of them can be replayed."""

    def __init__(self, spec: EnvSpec, seeds: list[int]) -> None:
        def make() -> gymnasium.Env[Any, Any]:
            return Flat(Held(make_single(spec.backend_id, spec.max_episode_steps)))

        vector = gymnasium.vector.SyncVectorEnv if spec.vectorization == "sync" else gymnasium.vector.AsyncVectorEnv
        mode = gymnasium.vector.AutoresetMode.DISABLED
        self._env: Any = vector([make] * len(seeds), autoreset_mode=mode)
        self._seeds = seeds
        self._started = np.zeros(len(seeds), np.bool_)

    def reset(self, indices: IntArray, episodes: IntArray) -> npt.NDArray[Any]:
        """Reset each environment with the seed of its episode."""
        seeds: list[int | None] = [None] * len(self._seeds)
        for index, episode in zip(indices, episodes, strict=True):
            seeds[index] = derive_seed(self._seeds[index], "episode", int(episode)) & 0x7FFFFFFF
        mask = np.zeros(len(seeds), np.bool_)
        mask[indices] = True
        if not self._started.all():  # gymnasium.vector must see every environment once before it takes a mask
            mask[~self._started] = True
            self._started[:] = True
        observation, _ = self._env.reset(seed=seeds, options={"reset_mask": mask})
        return np.asarray(observation)[indices]

    def step(self, indices: IntArray, actions: FloatArray) -> SimulatorStep:
        """Step the environments `indices`; the others stand still."""
        padded = np.full((len(self._seeds), actions.shape[1]), np.nan, np.float32)
        padded[indices] = actions
        observation, reward, _, _, info = self._env.step(padded)
        terminated, truncated, success = (
            np.asarray(info[f"dprl_{key}"], np.bool_)[indices] for key in ("terminated", "truncated", "success")
        )
        return SimulatorStep(np.asarray(observation)[indices], reward[indices], terminated, truncated, success)

    def close(self) -> None:
        """Close all environments and their processes."""
        self._env.close()
