"""A Gymnasium environment that fails as a file says; importing this registers it."""

import os
import signal
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

ID = "tests.rollout.mortal:Mortal-v0"
FOLDER = "DPRL_TEST_MORTAL"
"""The environment variable that names the folder of such files: `step-kill`, `reset-shape`, ..."""


class Mortal(gymnasium.Env[Any, Any]):
    """Counts its steps."""

    observation_space = gymnasium.spaces.Dict({"n": gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)})
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._n = np.array([self.np_random.uniform(), 0.0], np.float32)
        return self._observed("reset"), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._n[1] += 1
        return self._observed("step"), 1.0, False, False, {}

    def _observed(self, call: str) -> Any:
        for file in Path(os.environ[FOLDER]).glob(f"{call}-*"):
            if "always" not in file.name:
                try:
                    file.unlink()
                except FileNotFoundError:  # another environment took it
                    continue
            if "kill" in file.name:
                os.kill(os.getpid(), signal.SIGKILL)
            return {"n": np.zeros(3, np.float32)} if "shape" in file.name else None
        return {"n": self._n.copy()}


gymnasium.register("Mortal-v0", Mortal, max_episode_steps=20)
