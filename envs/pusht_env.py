"""Push-T as single Gymnasium environments, made exact; `pusht` has its geometry and its expert."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from dprl.envs.pusht import CAMERA, IDS, TABLE, Array, coverage
from dprl.errors import EnvError, MissingDependencyError
from dprl.observations import STATE


def make_single(kind: str) -> gymnasium.Env[Any, Any]:
    """Build one environment that observes `kind`: ``state``, ``keypoints`` or ``pixels``. It has no time limit."""
    return PushT(kind)


class PushT(gymnasium.Wrapper[Any, Any, Any, Any]):
    """gym-pusht's environment, made exact, with its own reward: coverage / 0.95, at most 1.

    gym-pusht builds its physics anew at every reset, so its motion repeats to the bit. Its coverage does not: it adds
    up the block's rectangles in the order of a set of objects, which differs from episode to episode. Here it is
    computed from the outline, equal to 1e-15 and three times as fast. The images are gym-pusht's to the bit.
    """

    def __init__(self, kind: str) -> None:
        try:
            from gym_pusht.envs.pusht import PushTEnv
        except ImportError as error:
            raise MissingDependencyError("gym-pusht", "pusht", "Push-T") from error
        if f"pusht/{kind}" not in IDS:
            raise EnvError(f"Push-T can be observed as state, keypoints or pixels, not as '{kind}'")
        env: Any = PushTEnv(obs_type="state")
        env._get_coverage = self._coverage
        super().__init__(env)
        self._env = env
        self._kind = kind
        self.observation_space = _observation_space(kind)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; `seed` decides where disc and block are."""
        self._env._last_action = None  # or the next frame rendered would show it
        state, info = self.env.reset(seed=seed, options=options)
        return self._observe(state), {**info, "coverage": self._coverage()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step; the info has ``coverage`` in [0, 1] and ``is_success``."""
        state, reward, terminated, truncated, info = self.env.step(np.asarray(action, np.float64))
        info["is_success"] = bool(info["is_success"])
        return self._observe(state), float(reward), bool(terminated), bool(truncated), info

    def _coverage(self) -> float:
        block = self._env.block
        return coverage(np.array(block.position), block.angle)

    def _observe(self, state: Array) -> Any:
        if self._kind == "state":
            return state
        if self._kind == "keypoints":
            keypoints = self._env.get_keypoints(self._env._block_shapes).ravel()
            return {STATE: np.concatenate([state[:2], keypoints]), "privileged": state}
        return {STATE: state[:2], CAMERA.part: self._image(), "privileged": state}

    def _image(self) -> npt.NDArray[np.uint8]:
        """What gym-pusht observes as pixels, by a way of reading its surface that takes a third of the time."""
        import cv2
        import pygame

        surface = self._env._draw()
        drawn = np.frombuffer(pygame.image.tobytes(surface, "RGB"), np.uint8)
        image: Any = cv2.resize(drawn.reshape(surface.get_height(), surface.get_width(), 3), CAMERA.shape[1::-1])
        return np.asarray(image, np.uint8)


def _observation_space(kind: str) -> gymnasium.Space[Any]:
    """Return the space; of the block's coordinates without bounds, since it can be pushed over the table's edge."""
    box, inf = gymnasium.spaces.Box, np.inf
    disc = box(0.0, TABLE, (2,), np.float64)
    state = box(np.array([0, 0, -inf, -inf, 0]), np.array([TABLE, TABLE, inf, inf, 2 * np.pi]), dtype=np.float64)
    if kind == "state":
        return state
    if kind == "keypoints":
        low, high = np.full(18, -inf), np.full(18, inf)
        low[:2], high[:2] = 0, TABLE
        return gymnasium.spaces.Dict({STATE: box(low, high, dtype=np.float64), "privileged": state})
    return gymnasium.spaces.Dict({STATE: disc, CAMERA.part: box(0, 255, CAMERA.shape, np.uint8), "privileged": state})
