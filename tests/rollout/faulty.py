"""An environment that fails where and how a file says, as often as the file says."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dprl.envs.chunked import ChunkedEnv, SimulatorStep
from dprl.spec import EnvSpec, FloatArray, IntArray
from tests.toys import Reach, reach_spec

FAULTS = ("kill", "raise", "hang", "nan", "shape")
"""There is one more, which is nobody's fault: "end"."""


@dataclass(frozen=True)
class Fault:
    """What happens at one step of one environment's episode."""

    kind: str
    seed: int
    """The environment's own."""
    episode: int
    step: int
    times: int = 1


def faulty_spec(folder: Path, **changes: Any) -> EnvSpec:
    """The reacher of `tests.toys`, with the faults in `folder`."""
    spec = replace(
        reach_spec(), builder="tests.rollout.faulty:build_faulty", backend_id=str(folder), max_episode_steps=8
    )
    return replace(spec, **changes)


def plant(folder: Path, fault: Fault) -> None:
    """Let `fault` happen."""
    for i in range(fault.times):
        name = f"{fault.seed}-{fault.episode}-{fault.step}-{i}"
        Path(folder, name).write_text(json.dumps(fault.kind), encoding="utf-8")


def build_faulty(spec: EnvSpec, seeds: list[int], num_threads: int = 0) -> ChunkedEnv:
    return ChunkedEnv(spec, FaultyReach(seeds, Path(spec.backend_id)), seeds)


class FaultyReach(Reach):
    """See `Fault`."""

    def __init__(self, seeds: list[int], folder: Path) -> None:
        super().__init__(seeds)
        self._folder = folder
        self._episode = np.zeros(len(seeds), np.int64)
        self._step = np.zeros(len(seeds), np.int64)

    def reset(self, indices: IntArray, episodes: IntArray) -> npt.NDArray[Any]:
        self._episode[indices], self._step[indices] = episodes, 0
        return super().reset(indices, episodes)

    def step(self, indices: IntArray, actions: FloatArray) -> SimulatorStep:
        result = super().step(indices, actions)
        for row, index in enumerate(indices):
            kind = self._due(index)
            if kind is not None:
                result = _fail(kind, result, row)
        self._step[indices] += 1
        return result

    def _due(self, index: int) -> str | None:
        pattern = f"{self.seeds[index]}-{self._episode[index]}-{self._step[index]}-*"
        for file in sorted(self._folder.glob(pattern)):
            kind: str = json.loads(file.read_text(encoding="utf-8"))
            file.unlink()
            return kind
        return None


def _fail(kind: str, result: SimulatorStep, row: int) -> SimulatorStep:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "raise":
        raise RuntimeError("the motor is on fire")
    if kind == "hang":
        time.sleep(3600)
    if kind == "end":
        ended = np.array(result.terminated)
        ended[row] = True
        return replace(result, terminated=ended)
    if kind == "nan":
        observation = np.array(result.observation)
        observation[row] = np.nan
        return replace(result, observation=observation)
    return replace(result, reward=result.reward[:, None])
