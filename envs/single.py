"""This library's own worlds as single Gymnasium environments: ``gymnasium.make("dprl/Avoid-v0")`` and so on."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import numpy.typing as npt

from dprl.envs import avoid, maze
from dprl.observations import STATE, Observation, take
from dprl.spec import EnvOptions

ONLY = np.array([0])


class SingleEnv(gymnasium.Env[Any, Any]):
    """One of `avoid.IDS` or `maze.IDS`. The reward is 1 at success, else 0."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 as Gymnasium declares it

    def __init__(self, env_id: str = avoid.STATE_ID, render_mode: str | None = None) -> None:
        is_maze = env_id in maze.IDS
        spec = (maze if is_maze else avoid).make_spec(env_id, EnvOptions())
        low, high = maze.limits(env_id) if is_maze else avoid.LIMITS
        box = gymnasium.spaces.Box
        state = box(low, high, (spec.observation_size,), np.float32)
        images = {camera.part: box(0, 255, camera.shape, np.uint8) for camera in spec.cameras}
        self.observation_space = gymnasium.spaces.Dict({STATE: state, **images}) if images else state
        self.action_space = box(-1.0, 1.0, (spec.action_size,), np.float32)
        self.render_mode = render_mode
        self._env_id = env_id
        self._simulator = self._build(0)

    def _build(self, seed: int) -> avoid.Avoid | maze.PointMaze:
        if self._env_id in maze.IDS:
            return maze.PointMaze([seed], self._env_id)
        return avoid.Avoid([seed], pixels=self._env_id == avoid.PIXELS_ID)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the episode that `seed` names, or the next one."""
        super().reset(seed=seed)
        self._simulator = self._build(int(self.np_random.integers(2**31)))
        return take(self._simulator.reset(ONLY, ONLY), 0), {}

    def step(self, action: Any) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Move; the info says whether it was a ``success``."""
        action = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        result = self._simulator.step(ONLY, action[None])
        success = bool(result.success[0])
        return (
            take(result.observation, 0),
            float(success),
            bool(result.terminated[0]) or success,
            False,
            {"success": success},
        )

    def render(self) -> npt.NDArray[np.uint8]:  # type: ignore[override]
        """Return the world as an image (height, width, 3)."""
        return self._simulator.picture()
