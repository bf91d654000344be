"""EnvPool: Gymnasium's MuJoCo tasks and Meta-World, stepped by C++ threads. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from dprl.cores import available_cores
from dprl.envs.chunked import ChunkedEnv, SimulatorStep
from dprl.errors import EnvError, MissingDependencyError
from dprl.spec import EnvSpec, FloatArray, IntArray


def available() -> bool:
    """Whether EnvPool is installed."""
    return importlib.util.find_spec("envpool") is not None


def build(spec: EnvSpec, seeds: list[int], num_threads: int = 0) -> ChunkedEnv:
    """Build one environment per seed; `num_threads` = 0 means one per core."""
    return ChunkedEnv(spec, EnvPoolSimulator(spec, seeds, num_threads), seeds)


class EnvPoolSimulator:
    """Steps and resets any subset by ``env_id``.

    EnvPool cannot be reseeded, but an environment's k-th reset depends on its seed and k alone, so an episode number
    is reached by counting resets.
    """

    def __init__(self, spec: EnvSpec, seeds: list[int], num_threads: int) -> None:
        if not available():
            raise MissingDependencyError("envpool", "envs", f"{spec.id} on EnvPool")
        import envpool

        threads = min(num_threads or available_cores(), len(seeds))
        # Two steps of head room: EnvPool resets by itself after its own time limit, ours must come first.
        options: dict[str, Any] = {"max_episode_steps": spec.max_episode_steps + 2}
        if threads == available_cores() == os.cpu_count():  # each stays on its core: left to itself, Linux doubles up
            options["thread_affinity_offset"] = 0
        if spec.backend_id.startswith("MetaWorld/"):
            options["partially_observable"] = False
        self._env: Any = envpool.make_gymnasium(
            spec.backend_id,
            num_envs=len(seeds),
            num_threads=threads,
            env_seed=seeds,
            **options,
        )
        self._resets = np.zeros(len(seeds), np.int64)
        self._has_success = spec.has_success

    def reset(self, indices: IntArray, episodes: IntArray) -> npt.NDArray[Any]:
        """Reset until each environment has reached its episode.

        Raises:
            EnvError: an environment is past its episode already, and EnvPool cannot go back.
        """
        if (self._resets[indices] > episodes).any():
            raise EnvError("EnvPool cannot go back to an earlier episode: restore into freshly built environments")
        observation = np.zeros((len(indices), *self._env.observation_space.shape))
        while True:
            rows = np.flatnonzero(self._resets[indices] <= episodes)
            if len(rows) == 0:
                return observation
            result, info = self._env.reset(indices[rows].astype(np.int32))
            observation[rows[self._order(info, indices[rows])]] = result
            self._resets[indices[rows]] += 1

    def step(self, indices: IntArray, actions: FloatArray) -> SimulatorStep:
        """Step the environments `indices`; results come back in that order."""
        ids = indices.astype(np.int32)
        observation, reward, terminated, truncated, info = self._env.step(actions.astype(np.float64), env_id=ids)
        back = slice(None) if np.array_equal(info["env_id"], ids) else np.argsort(self._order(info, indices))
        success = np.asarray(info["success"])[back] > 0.5 if self._has_success else np.zeros(len(ids), np.bool_)
        return SimulatorStep(
            np.asarray(observation)[back],
            np.asarray(reward)[back],
            np.asarray(terminated, np.bool_)[back],
            np.asarray(truncated, np.bool_)[back],
            success,
        )

    def close(self) -> None:
        """Stop EnvPool's threads and give their memory (14 MB for a Meta-World task) back to the system."""
        if self._env is None:
            return
        self._env.close()
        self._env = None
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc keeps it
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    @staticmethod
    def _order(info: dict[str, Any], indices: IntArray) -> IntArray:
        """Return for each returned row the position of its environment in `indices` (which are distinct)."""
        sorter = np.argsort(indices)
        return np.asarray(sorter[np.searchsorted(indices, info["env_id"], sorter=sorter)], np.int64)
