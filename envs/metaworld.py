"""Meta-World v3: its task names, what its numbers are, and its scripted experts."""

from __future__ import annotations

import logging
import warnings
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dprl import observations
from dprl.errors import MissingDependencyError
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


def require_package() -> Any:
    """Import the package, quietly; MissingDependencyError names the extra."""
    try:
        import metaworld
    except ImportError as error:
        raise MissingDependencyError("metaworld", "envs", "Meta-World's experts and its own environments") from error
    logging.getLogger("metaworld").setLevel(logging.ERROR)
    return metaworld


class ScriptedExpert:
    """The package's hand-written policy of one task. It acts on the observation alone."""

    def __init__(self, task: str) -> None:
        require_package()
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
