"""Anything registered with Gymnasium, through `gymnasium.vector`."""

import os
import signal
import threading
import time
from typing import Any

import gymnasium
import numpy as np
import pytest

from dprl.envs.gymnasium import CLOSE_TIMEOUT_S
from dprl.errors import EnvError, EnvFaultError
from dprl.spec import BatchedEnv, ChunkStep, EnvOptions, EnvSpec, build, env_seeds, resolve

TERMINATING, SUCCEEDING, NESTED, ENDLESS = "dprl-test/Ends-v0", "dprl-test/Goal-v0", "dprl-test/Dict-v0", "Endless-v0"
RANDOM = "dprl-test/Random-v0"


class Toy(gymnasium.Env):
    """Observes (a number drawn at reset, the step, the sum of actions); ends or succeeds at step 4, if it does."""

    seconds = 0.0
    """Of a step."""

    def __init__(self, ends: bool = False, reports_success: bool = False, nested: bool = False) -> None:
        self._ends, self._reports_success, self._nested = ends, reports_success, nested
        self.action_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float64)
        box = gymnasium.spaces.Box(-np.inf, np.inf, (1, 2), np.float64)
        flat = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        single = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({"b": box, "a": single}) if nested else flat

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._start, self._steps, self._sum = self.np_random.uniform(1, 2), 0, 0.0
        return self._observe(), {}

    def step(self, action):
        time.sleep(self.seconds)
        assert self.action_space.contains(action), action
        self._steps += 1
        self._sum += float(action.sum())
        at_four = self._steps == 4
        info = {"is_success": self._reports_success and at_four} if self._reports_success else {}
        return self._observe(), float(self._steps), self._ends and at_four, False, info

    def _observe(self) -> Any:
        if self._nested:
            return {"b": np.array([[self._steps, self._sum]]), "a": np.array([self._start], np.float32)}
        return np.array([self._start, self._steps, self._sum], np.float32)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    gymnasium.register(TERMINATING, Toy, max_episode_steps=9, kwargs={"ends": True})
    gymnasium.register(SUCCEEDING, Toy, max_episode_steps=9, kwargs={"reports_success": True})
    gymnasium.register(NESTED, Toy, max_episode_steps=9, kwargs={"nested": True})
    gymnasium.register(ENDLESS, Toy)
    gymnasium.register(RANDOM, Toy, max_episode_steps=9, nondeterministic=True)
    yield
    for name in (TERMINATING, SUCCEEDING, NESTED, ENDLESS, RANDOM):
        del gymnasium.registry[name]


def make(name: str, n_envs: int = 2, **options: Any) -> BatchedEnv:
    return build(resolve(name, EnvOptions(**options)), env_seeds(3, n_envs))


def chunks(spec: EnvSpec, n_envs: int, n_chunks: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n_chunks, n_envs, 3, spec.action_size)).astype(np.float32)


def play(env: BatchedEnv, n_chunks: int, seed: int = 0) -> list[ChunkStep]:
    return [env.step_chunk(actions) for actions in chunks(env.spec, env.n_envs, n_chunks, seed)]


def test_pendulum_is_dense_and_truncated_at_its_limit():
    env = make("Pendulum-v1", 1)
    assert (env.spec.reward, env.spec.has_success, env.spec.max_episode_steps) == ("dense", False, 200)
    assert (env.spec.action_low, env.spec.action_high) == ((-2.0,), (2.0,))
    env.reset()
    step = env.step_chunk(np.zeros((1, 201, 1), np.float32))
    assert (step.n_steps[0], step.truncated[0], step.terminated[0]) == (200, True, False)
    assert step.reward[0] < 0


@pytest.mark.parametrize("limit", [5, 203])
def test_the_chosen_limit_counts_not_the_environments_own(limit):
    env = make("Pendulum-v1", 1, max_episode_steps=limit)
    env.reset()
    assert env.step_chunk(np.zeros((1, limit + 1, 1), np.float32)).n_steps[0] == limit


def test_environment_without_a_limit_needs_one():
    with pytest.raises(EnvError, match="'Endless-v0' has no time limit of its own: state one with max_episode_steps"):
        resolve(ENDLESS)
    assert resolve(ENDLESS, EnvOptions(max_episode_steps=7)).max_episode_steps == 7


def test_what_is_registered_as_nondeterministic_is_not_replayed():
    assert not resolve(RANDOM).replayable
    assert resolve(TERMINATING).replayable


def test_users_environment_terminates():
    env = make(TERMINATING)
    first = env.reset()
    step = env.step_chunk(chunks(env.spec, 2, 1)[0])
    assert not step.ended.any()
    step = env.step_chunk(chunks(env.spec, 2, 1)[0])
    assert step.terminated.all()
    assert not step.truncated.any()
    assert step.n_steps.tolist() == [1, 1]
    assert step.episode_return.tolist() == [1 + 2 + 3 + 4] * 2
    assert step.final_observation[:, -1, 1].tolist() == [4, 4]
    assert (step.observation[:, -1, 0] != first[:, -1, 0]).all(), "the next episode should start elsewhere"


def test_is_success_in_the_info_makes_the_reward_sparse():
    env = make(SUCCEEDING)
    assert (env.spec.reward, env.spec.has_success) == ("sparse", True)
    env.reset()
    steps = play(env, 2)
    assert steps[0].reward.tolist() == [0, 0]
    assert steps[1].reward.tolist() == [1, 1]
    assert steps[1].success.all()
    assert steps[1].terminated.all()


def test_dense_reward_of_an_environment_with_success():
    env = make(SUCCEEDING, reward="dense")
    env.reset()
    steps = play(env, 2)
    assert steps[0].reward.tolist() == [6, 6]
    assert steps[1].truncated.all()
    assert not steps[1].terminated.any()


def test_dict_observation_is_flattened():
    env = make(NESTED)
    assert env.spec.observation_size == 3
    env.reset()
    actions = chunks(env.spec, 2, 1)[0]
    observation = env.step_chunk(actions).observation[:, -1]
    np.testing.assert_array_equal(observation[:, 1], 3)  # a: start; b: step, sum of actions
    np.testing.assert_allclose(observation[:, 2], actions.sum(axis=(1, 2)), rtol=1e-6)


@pytest.mark.parametrize("name", [TERMINATING, NESTED, "Pendulum-v1"])
def test_async_equals_sync(name, assert_same_step):
    sync, parallel = (make(name, vectorization=kind, max_episode_steps=5) for kind in ("sync", "async"))
    np.testing.assert_array_equal(sync.reset(), parallel.reset())
    for a, b in zip(play(sync, 4), play(parallel, 4), strict=True):
        assert_same_step(a, b)
    actions = chunks(sync.spec, 1, 1)[0]
    assert_same_step(sync.step_chunk(actions, np.array([1])), parallel.step_chunk(actions, np.array([1])))
    parallel.close()


@pytest.mark.parametrize("name", [TERMINATING, "Pendulum-v1"])
def test_chunk_equals_single_steps(name, step_singly, assert_same_step):
    chunked, single = make(name, max_episode_steps=8), make(name, max_episode_steps=8)
    np.testing.assert_array_equal(chunked.reset(), single.reset())
    for actions in chunks(chunked.spec, 2, 6):
        assert_same_step(chunked.step_chunk(actions), step_singly(single, actions))


def test_trajectory_does_not_depend_on_the_other_environments(assert_same_step):
    spec = resolve("Pendulum-v1", EnvOptions(max_episode_steps=5))
    many, few = build(spec, env_seeds(3, 4)), build(spec, env_seeds(3, 2, first=2))
    np.testing.assert_array_equal(many.reset()[2:], few.reset())
    for actions in chunks(spec, 4, 4):
        assert_same_step(many.step_chunk(actions), few.step_chunk(actions[2:]), [2, 3])


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_subset_leaves_the_others_untouched(vectorization):
    env = make(TERMINATING, 3, vectorization=vectorization)
    first = env.reset()[:, -1]
    env.step_chunk(np.ones((2, 2, 2), np.float32), np.array([2, 0]))
    env.reset(np.array([0]))
    observation = env.step_chunk(np.ones((3, 1, 2), np.float32)).observation[:, -1]
    assert observation[:, 1:].tolist() == [[1, 2], [1, 2], [3, 6]]
    assert (observation[:, 0] == first[:, 0]).tolist() == [False, True, True]
    env.close()


def test_subset_can_be_reset_before_the_others():
    one, other = make(TERMINATING, 3), make(TERMINATING, 3)
    observation = one.reset(np.array([1]))
    np.testing.assert_array_equal(observation, other.reset()[[1]])
    np.testing.assert_array_equal(one.reset(np.array([0, 2])), make(TERMINATING, 3).reset()[[0, 2]])


@pytest.mark.parametrize("name", [TERMINATING, "Pendulum-v1"])
@pytest.mark.parametrize("n_chunks", [1, 5])
def test_restore_goes_on_exactly(name, n_chunks, assert_same_step):
    original, restored = make(name, max_episode_steps=8), make(name, max_episode_steps=8)
    original.reset()
    original.step_chunk(chunks(original.spec, 1, 1)[0], np.array([1]))  # so that they are out of step
    observation = play(original, n_chunks)[-1].observation
    np.testing.assert_array_equal(restored.restore(original.state()), observation)
    for a, b in zip(play(original, 4, 1), play(restored, 4, 1), strict=True):
        assert_same_step(a, b)


def test_processes_end_in_the_middle_of_a_step_whatever_their_parent_does_at_a_signal(monkeypatch):
    """Training handles SIGTERM; processes that it starts must not."""
    spec = resolve(TERMINATING, EnvOptions(vectorization="async"))
    monkeypatch.setattr(Toy, "seconds", 3600.0)
    monkeypatch.setattr("dprl.envs.gymnasium.CLOSE_TIMEOUT_S", 0.2)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        env = build(spec, env_seeds(3, 2))
        env.reset()
        vector = env._simulator._env
        vector.step_async(np.zeros((2, 2), np.float32))
        start = time.monotonic()
        env.close()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - start < 10
    assert not any(process.is_alive() for process in vector.processes)


@pytest.mark.parametrize("dead", [0, 1])
def test_it_closes_whichever_of_its_processes_dies_in_a_step(dead):
    """The answers of those before it have been read, and are not waited for again."""
    env = build(resolve(TERMINATING, EnvOptions(vectorization="async")), env_seeds(3, 2))
    env.reset()
    processes = env._simulator._env.processes
    os.kill(processes[dead].pid, signal.SIGSTOP)
    threading.Timer(0.5, processes[dead].kill).start()
    with pytest.raises(EnvFaultError, match=r"EOFError|ConnectionResetError"):
        env.step_chunk(np.zeros((2, 1, 2), np.float32))
    start = time.monotonic()
    env.close()
    assert time.monotonic() - start < CLOSE_TIMEOUT_S / 2
    assert not any(process.is_alive() for process in processes)


def test_discrete_actions_are_refused():
    with pytest.raises(EnvError, match=r"'CartPole-v1' has the action space Discrete\(2\).*continuous actions"):
        resolve("CartPole-v1")


def test_environment_that_cannot_be_made_is_an_error_with_its_name():
    gymnasium.register("Broken-v0", "no_such_module:Env", max_episode_steps=5)
    try:
        with pytest.raises(EnvError, match=r"Gymnasium cannot make 'Broken-v0'.*no_such_module"):
            resolve("Broken-v0")
    finally:
        del gymnasium.registry["Broken-v0"]


def test_metaworld_of_the_package_is_seeded(assert_same_step):
    pytest.importorskip("metaworld")
    options = {"backend": "gymnasium", "reward": "dense", "max_episode_steps": 4}
    one, other = make("metaworld/push-v3", **options), make("metaworld/push-v3", **options)
    assert one.spec.builder == "dprl.envs.gymnasium:build"
    first = one.reset()
    np.testing.assert_array_equal(first, other.reset())
    assert (first[0, -1, 36:39] != first[1, -1, 36:39]).any()
    assert (first[:, -1, 36:39] != 0).all()
    steps = play(one, 4)
    for a, b in zip(steps, play(other, 4), strict=True):
        assert_same_step(a, b)
    fresh = make("metaworld/push-v3", **options)
    np.testing.assert_array_equal(fresh.restore(one.state()), steps[-1].observation)
    assert_same_step(play(fresh, 1, 1)[0], play(one, 1, 1)[0])
