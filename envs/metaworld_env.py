"""Meta-World's own environments, slower than EnvPool's, which can also render."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any, cast

import gymnasium
import numpy as np

from dprl.envs import metaworld, rendering
from dprl.envs.metaworld import HAND_SIZE, LEFT, PIXELS, RENDERED, TOP
from dprl.errors import EnvError
from dprl.observations import STATE


@dataclass(frozen=True)
class Camera:
    """What to render with."""

    width: int
    height: int
    camera_name: str = "corner2"


class SeededMetaWorld(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A Meta-World task whose goal is observed and drawn anew, from the seed, at every reset."""

    def __init__(self, task: str, camera: Camera | None = None) -> None:
        metaworld.require_package()
        from metaworld.env_dict import ENV_CLS_MAP

        if task not in ENV_CLS_MAP:
            raise EnvError(f"Meta-World has no task '{task}'")
        options: dict[str, Any] = {} if camera is None else {"render_mode": "rgb_array", **vars(camera)}
        env: Any = ENV_CLS_MAP[task](**options)
        env._partially_observable = False
        del env.sawyer_observation_space  # cached while the goal was hidden; observations are clipped to it
        env.observation_space = env.sawyer_observation_space
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env._set_task_called = True
        env.max_path_length = sys.maxsize  # the time limit is the spec's
        super().__init__(env)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; `seed` decides where object and goal are."""
        if seed is not None:
            cast("Any", self.unwrapped).seed(int(seed))
        return self.env.reset()


def make_single(task: str) -> gymnasium.Env[Any, Any]:
    """Build one environment of the package's own."""
    return SeededMetaWorld(task)


class Pixels(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Shows the hand's 4 numbers and the image of one camera; all 39 numbers are privileged."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        box, full = gymnasium.spaces.Box, cast("Any", env.observation_space)
        self.observation_space = gymnasium.spaces.Dict(
            {
                STATE: box(full.low[:HAND_SIZE], full.high[:HAND_SIZE], dtype=full.dtype.type),
                PIXELS.part: box(0, 255, PIXELS.shape, np.uint8),
                "privileged": full,
            }
        )

    def observation(self, observation: Any) -> dict[str, Any]:
        """Render, turn upright (this camera hangs upside down), and cut out the table."""
        upright = np.flipud(cast("Any", self.env.render()))
        image = np.ascontiguousarray(
            upright[
                TOP : TOP + PIXELS.height,
                LEFT : LEFT + PIXELS.width,
            ]
        )
        return {STATE: observation[:HAND_SIZE], PIXELS.part: image, "privileged": observation}


@functools.cache
def require_gl() -> str:
    """Return the backend that renders, once found; EnvError where none does."""
    backend = rendering.find_backend()
    if backend is None:
        raise EnvError(f"a Meta-World camera renders, which no GL library here can do; {rendering.REMEDY}")
    return backend


def make_pixels(task: str) -> gymnasium.Env[Any, Any]:
    """Build one environment of the package's own that is seen through `PIXELS`.

    Raises:
        EnvError: this machine cannot render.
    """
    require_gl()
    return Pixels(SeededMetaWorld(task, Camera(RENDERED, RENDERED, PIXELS.name)))
