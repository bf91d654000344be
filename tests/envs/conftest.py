"""What the tests of all simulators share."""

from collections.abc import Mapping
from dataclasses import fields

import numpy as np
import pytest

from dprl.observations import Observation, map_parts, put
from dprl.spec import BatchedEnv, ChunkStep


def _step_singly(env: BatchedEnv, actions: np.ndarray) -> ChunkStep:
    """Do what `step_chunk(actions)` promises with chunks of one action: stop at an episode's end, reset at last."""
    n, n_actions, _ = actions.shape
    step_rewards, n_steps = np.zeros((n, n_actions), np.float32), np.zeros(n, np.int64)
    last: dict = {}
    playing = np.arange(n)
    for e in range(n_actions):
        step = env.step_chunk(actions[playing, e][:, None], playing, autoreset=False)
        step_rewards[playing, e] = step.reward
        n_steps[playing] += step.n_steps
        for field in fields(ChunkStep):
            value = getattr(step, field.name)
            last.setdefault(field.name, map_parts(lambda part: np.zeros((n, *part.shape[1:]), part.dtype), value))
            put(last[field.name], playing, value)
        playing = playing[~step.ended]
        if len(playing) == 0:
            break
    ended = np.flatnonzero(last["terminated"] | last["truncated"])
    if len(ended):
        put(last["observation"], ended, env.reset(ended))
    return ChunkStep(**{**last, "step_rewards": step_rewards, "n_steps": n_steps})


def _assert_same_step(one: ChunkStep, other: ChunkStep, rows: list[int] | None = None) -> None:
    """Compare bit for bit; `rows` picks those of `one`."""
    for field in fields(ChunkStep):
        _assert_same(getattr(one, field.name), getattr(other, field.name), field.name, rows)


def _assert_same(one: Observation, other: Observation, name: str = "", rows: list[int] | None = None) -> None:
    """Compare arrays, or all parts of dicts."""
    if isinstance(one, Mapping):
        assert one.keys() == other.keys()
        for part in one:
            _assert_same(one[part], other[part], f"{name} {part}", rows)
        return
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one if rows is None else one[rows], other, name)


@pytest.fixture
def step_singly():
    return _step_singly


@pytest.fixture
def assert_same_step():
    return _assert_same_step


@pytest.fixture
def assert_same():
    return _assert_same
