"""Meta-World v3: its task names, its scripted experts, and its own (slower) environments, which can also render."""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from dataclasses import dataclass
from typing import Any, cast

import gymnasium
import numpy as np
import numpy.typing as npt

from dprl import observations
from dprl.envs import rendering
from dprl.errors import EnvError, MissingDependencyError
from dprl.observations import STATE
from dprl.spec import FloatArray

OBSERVATION_SIZE = 39
ACTION_SIZE = 4
MAX_EPISODE_STEPS = 200
HAND = slice(0, 3)
OBJECT = slice(4, 7)
GOAL = slice(36, 39)
HAND_SIZE = 4  # the hand's position and how open its gripper is
PIXELS = observations.Camera("corner2", 84, 84)
RENDERED, TOP, LEFT = 126, 34, 12  # pixels of the square that is rendered, and where the table is cut out of it

# (task as Meta-World calls it, without its -v3; EnvPool's name follows from it)
TASKS = (
    "assembly", "basketball", "bin-picking", "box-close", "button-press", "button-press-topdown",
    "button-press-topdown-wall", "button-press-wall", "coffee-button", "coffee-pull", "coffee-push", "dial-turn",
    "disassemble", "door-close", "door-lock", "door-open", "door-unlock", "drawer-close", "drawer-open",
    "faucet-close", "faucet-open", "hammer", "hand-insert", "handle-press", "handle-press-side", "handle-pull",
    "handle-pull-side", "lever-pull", "peg-insert-side", "peg-unplug-side", "pick-out-of-hole", "pick-place",
    "pick-place-wall", "plate-slide", "plate-slide-back", "plate-slide-back-side", "plate-slide-side", "push",
    "push-back", "push-wall", "reach", "reach-wall", "shelf-place", "soccer", "stick-pull", "stick-push", "sweep",
    "sweep-into", "window-close", "window-open",
)  # fmt: skip


def envpool_id(task: str) -> str:
    """Return EnvPool's name of the task ``push-v3``: ``MetaWorld/Push-v3``."""
    return "MetaWorld/" + "".join(word.capitalize() for word in task.removesuffix("-v3").split("-")) + "-v3"


def _package() -> Any:
    try:
        import metaworld
    except ImportError as error:
        raise MissingDependencyError("metaworld", "envs", "Meta-World's experts and its own environments") from error
    logging.getLogger("metaworld").setLevel(logging.ERROR)
    return metaworld


@dataclass(frozen=True)
class Camera:
    """What to render with."""

    width: int
    height: int
    camera_name: str = "corner2"


class SeededMetaWorld(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A Meta-World task whose goal is observed and drawn anew, from the seed, at every reset."""

    def __init__(self, task: str, camera: Camera | None = None) -> None:
        _package()
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
        image = np.ascontiguousarray(upright[TOP : TOP + PIXELS.height, LEFT : LEFT + PIXELS.width])
        return {STATE: observation[:HAND_SIZE], PIXELS.part: image, "privileged": observation}


_gl_backend = functools.cache(rendering.find_backend)


def make_pixels(task: str) -> gymnasium.Env[Any, Any]:
    """Build one environment of the package's own that is seen through `PIXELS`.

    Raises:
        EnvError: this machine cannot render.
    """
    if _gl_backend() is None:
        raise EnvError(f"metaworld/{task}-pixels renders, which no GL library here can do; {rendering.REMEDY}")
    return Pixels(SeededMetaWorld(task, Camera(RENDERED, RENDERED, PIXELS.name)))


class ScriptedExpert:
    """The package's hand-written policy of one task. It acts on the observation alone."""

    def __init__(self, task: str) -> None:
        _package()
        from metaworld.policies import ENV_POLICY_MAP

        self._policy: Any = cast("Any", ENV_POLICY_MAP[task])()

    def act(self, observation: npt.NDArray[Any]) -> FloatArray:
        """Return actions (n, 4) in [-1, 1] for observations (n, 39)."""
        with warnings.catch_warnings():  # it warns that its actions are clipped, which they are here
            warnings.simplefilter("ignore")
            actions = [self._policy.get_action(row) for row in np.asarray(observation, np.float64)]
        return np.clip(np.asarray(actions, np.float32), -1.0, 1.0)


def scripted(env_id: str) -> ScriptedExpert:
    """Build the expert of ``metaworld/<task>``, with pixels or without."""
    return ScriptedExpert(env_id.removeprefix("metaworld/").removesuffix("-pixels"))
