"""Batched environments for stable-baselines3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dprl.errors import EnvError, MissingDependencyError, check_count
from dprl.observations import Observation, map_parts, take
from dprl.spec import BatchedEnv, ChunkStep, FloatArray

try:
    from gymnasium import spaces
    from stable_baselines3.common.vec_env.base_vec_env import VecEnv
except ImportError as error:
    raise MissingDependencyError("stable-baselines3", "sb3", "an environment for stable-baselines3") from error


class ChunkedVecEnv(VecEnv):
    """A `VecEnv` whose one step is a chunk of environment steps.

    Observations are (O·D,), or a dict of parts with the history O in front; an action is (E·A,), which is (A,) for one
    step at a time. Episodes are recorded in the infos as `VecMonitor` does it.
    """

    def __init__(self, env: BatchedEnv, n_action_steps: int = 1) -> None:
        """Wrap `env`; an action is `n_action_steps` (E) environment steps."""
        check_count("n_action_steps", n_action_steps)
        self._env = env
        self._n_action_steps = n_action_steps
        self._actions: FloatArray | None = None
        spec = env.spec
        low, high = (np.tile(np.asarray(b, np.float32), n_action_steps) for b in (spec.action_low, spec.action_high))
        blank = self._shown(spec.zero_observation(1, spec.n_obs_steps))
        super().__init__(env.n_envs, _space(take(blank, 0)), spaces.Box(low, high, dtype=np.float32))

    def reset(self) -> Any:
        """Start the next episode of every environment."""
        return self._shown(self._env.reset())

    def step_async(self, actions: np.ndarray[Any, Any]) -> None:
        """Take the actions (N, E·A).

        Raises:
            EnvError: they have another shape.
        """
        expected = (self.num_envs, self._n_action_steps * self._env.spec.action_size)
        if np.shape(actions) != expected:
            raise EnvError(f"actions of shape {np.shape(actions)}: {self._env.spec.id} expects {expected}")
        self._actions = np.asarray(actions, np.float32).reshape(self.num_envs, self._n_action_steps, -1)

    def step_wait(self) -> tuple[Any, np.ndarray[Any, Any], np.ndarray[Any, Any], list[dict[str, Any]]]:
        """Execute them; ended episodes are followed by the next ones."""
        if self._actions is None:
            raise EnvError("step_wait before step_async: there are no actions to execute")
        step = self._env.step_chunk(self._actions)
        infos = [self._info(step, i) for i in range(self.num_envs)]
        return self._shown(step.observation), step.reward, step.ended, infos

    def close(self) -> None:
        """Free the environments."""
        self._env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute of the batched environment, once for each index; there are no single environments."""
        value = None if attr_name == "render_mode" else getattr(self._env, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Not possible: there are no single environments."""
        raise AttributeError(f"{attr_name}: a batched environment has no single environments to set it of")

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Not possible: there are no single environments."""
        raise AttributeError(f"{method_name}: a batched environment has no single environments to call it of")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """None is."""
        return [False for _ in self._get_indices(indices)]

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Nothing: a batched environment is seeded when it is made, and its episodes by their numbers."""
        return [None] * self.num_envs

    def _info(self, step: ChunkStep, i: int) -> dict[str, Any]:
        if not step.ended[i]:
            return {}
        info: dict[str, Any] = {
            "terminal_observation": take(self._shown(step.final_observation), i),
            "TimeLimit.truncated": bool(step.truncated[i]),
            "episode": {"r": float(step.episode_return[i]), "l": int(step.episode_length[i])},
        }
        return info | ({"is_success": bool(step.success[i])} if self._env.spec.has_success else {})

    def _shown(self, observation: Observation) -> Any:
        if not self._env.spec.cameras:
            return np.asarray(observation).reshape(len(np.asarray(observation)), -1)
        return observation


def _space(observation: Observation) -> spaces.Space[Any]:
    """The space of one observation."""

    def box(part: np.ndarray[Any, Any]) -> spaces.Box:
        if part.dtype == np.uint8:
            return spaces.Box(0, 255, part.shape, np.uint8)
        return spaces.Box(-np.inf, np.inf, part.shape, np.float32)

    found = map_parts(box, observation)
    return spaces.Dict(found) if isinstance(found, dict) else found
