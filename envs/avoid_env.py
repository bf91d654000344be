"""Avoid as single Gymnasium environments: ``gymnasium.make("dprl/Avoid-v0")`` after ``import dprl.envs``."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import numpy.typing as npt

from dprl.envs import avoid
from dprl.observations import STATE, Observation, take
from dprl.spec import EnvOptions

RENDER_SIZE = 240
ONLY = np.array([0])


class AvoidEnv(gymnasium.Env[Any, Any]):
    """One of `avoid.IDS`. The reward is 1 at success, else 0."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 as Gymnasium declares it

    def __init__(self, env_id: str = avoid.STATE_ID, render_mode: str | None = None) -> None:
        spec = avoid.make_spec(env_id, EnvOptions())
        box = gymnasium.spaces.Box
        state = box(-1 - avoid.SPEED, 1 + avoid.SPEED, (spec.observation_size,), np.float32)
        images = {camera.part: box(0, 255, camera.shape, np.uint8) for camera in spec.cameras}
        self.observation_space = gymnasium.spaces.Dict({STATE: state, **images}) if images else state
        self.action_space = box(-1.0, 1.0, (spec.action_size,), np.float32)
        self.render_mode = render_mode
        self._pixels = bool(images)
        self._simulator = avoid.Avoid([0], pixels=self._pixels)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the episode that `seed` names, or the next one."""
        super().reset(seed=seed)
        self._simulator = avoid.Avoid([int(self.np_random.integers(2**31))], pixels=self._pixels)
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
        """Return the world, (240, 240, 3)."""
        simulator = self._simulator
        image: npt.NDArray[np.uint8] = avoid.draw(
            simulator.position, simulator.obstacle, simulator.goal, size=RENDER_SIZE
        )[0]
        return image
