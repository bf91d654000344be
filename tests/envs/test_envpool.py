"""EnvPool: trajectories depend on an environment's seed and actions, and on nothing else."""

import os

import numpy as np
import pytest

from dprl.cores import available_cores
from dprl.spec import BatchedEnv, ChunkStep, EnvOptions, EnvSpec, build, env_seeds, resolve, with_n_obs_steps

pytest.importorskip("envpool")

from dprl.envs import catalogue

LIMITS = {"metaworld/push-v3": 6, "Hopper-v5": 30}  # short, so that there are resets


@pytest.fixture(params=LIMITS)
def spec(request) -> EnvSpec:
    # The dense reward tells trajectories apart.
    options = EnvOptions(max_episode_steps=LIMITS[request.param], reward="dense")
    spec = with_n_obs_steps(resolve(request.param, options), 2)
    assert spec.builder == "dprl.envs.envpool:build"
    return spec


def chunks(spec: EnvSpec, n_envs: int, n_chunks: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n_chunks, n_envs, 5, spec.action_size)).astype(np.float32)


def play(env: BatchedEnv, actions: np.ndarray) -> list[ChunkStep]:
    return [env.step_chunk(chunk) for chunk in actions]


def test_same_seeds_give_equal_trajectories(spec, assert_same_step):
    actions = chunks(spec, 2, 12)
    one, other = build(spec, env_seeds(3, 2)), build(spec, env_seeds(3, 2))
    np.testing.assert_array_equal(one.reset(), other.reset())
    steps = play(one, actions)
    assert sum(step.ended.sum() for step in steps) >= 3, "there should be resets"
    for a, b in zip(steps, play(other, actions), strict=True):
        assert_same_step(a, b)


def test_other_seeds_environments_and_episodes_start_elsewhere(spec):
    one, other = build(spec, env_seeds(3, 2)), build(spec, env_seeds(4, 2))
    starts = np.concatenate([one.reset(), one.reset(), other.reset()])[:, -1]
    assert len(np.unique(starts, axis=0)) == 6


def test_trajectory_does_not_depend_on_the_other_environments(spec, assert_same_step):
    actions = chunks(spec, 4, 6)
    many, few = build(spec, env_seeds(3, 4)), build(spec, env_seeds(3, 2, first=2), num_threads=1)
    np.testing.assert_array_equal(many.reset()[2:], few.reset())
    for a, b in zip(play(many, actions), play(few, actions[:, 2:]), strict=True):
        assert_same_step(a, b, [2, 3])


def test_episode_does_not_depend_on_the_one_before(spec, assert_same_step):
    actions = chunks(spec, 1, 1)
    played, reset_only = build(spec, [5]), build(spec, [5])
    for env in (played, reset_only):
        env.reset()
    played.step_chunk(actions[0], autoreset=False)
    np.testing.assert_array_equal(played.reset(), reset_only.reset())
    assert_same_step(played.step_chunk(actions[0]), reset_only.step_chunk(actions[0]))


def test_chunk_equals_single_steps(spec, step_singly, assert_same_step):
    chunked, single = build(spec, env_seeds(3, 2)), build(spec, env_seeds(3, 2))
    np.testing.assert_array_equal(chunked.reset(), single.reset())
    for actions in chunks(spec, 2, 8):
        assert_same_step(chunked.step_chunk(actions), step_singly(single, actions))


@pytest.mark.parametrize("n_chunks", [1, 9])
def test_restore_goes_on_exactly(spec, n_chunks, assert_same_step):
    original, restored = build(spec, env_seeds(3, 3)), build(spec, env_seeds(3, 3))
    original.reset()
    observation = play(original, chunks(spec, 3, n_chunks))[-1].observation
    if n_chunks == 9:
        assert original.state().episodes.min() >= 1, "every environment should be past its first episode"
    np.testing.assert_array_equal(restored.restore(original.state()), observation)
    later = chunks(spec, 3, 6, seed=1)
    for a, b in zip(play(original, later), play(restored, later), strict=True):
        assert_same_step(a, b)


def test_subset_leaves_the_others_untouched(spec, assert_same_step):
    actions = chunks(spec, 3, 2)
    some, only = build(spec, env_seeds(3, 3)), build(spec, env_seeds(3, 3))
    for env in (some, only):
        env.reset()
    some.step_chunk(actions[0, :2], np.array([2, 0]))
    assert_same_step(some.step_chunk(actions[1]), only.step_chunk(actions[1, 1:2], np.array([1])), [1])


def test_results_come_in_the_order_asked_for(spec, assert_same_step):
    order = np.array([2, 0, 3])
    actions = chunks(spec, 3, 1)[0]
    env, single = build(spec, env_seeds(3, 4)), build(spec, env_seeds(3, 4))
    first = env.reset()
    np.testing.assert_array_equal(single.reset(), first)
    step = env.step_chunk(actions, order)
    for row, index in enumerate(order):
        assert_same_step(step, single.step_chunk(actions[[row]], np.array([index])), [row])
    np.testing.assert_array_equal(env.reset(order)[[0]], single.reset(order[:1]))


def test_time_limit_is_the_specs(spec):
    env = build(spec, [0])
    env.reset()
    still = np.zeros((1, spec.max_episode_steps + 5, spec.action_size), np.float32)
    step = env.step_chunk(still)
    assert (step.n_steps[0], step.truncated[0], step.terminated[0]) == (spec.max_episode_steps, True, False)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's list of threads")
def test_threads_stay_on_their_cores_if_there_is_one_for_every_core():
    cores = os.cpu_count()
    if cores in (None, 1) or available_cores() != cores:
        pytest.skip("needs more than one core, and all of the machine's")
    spec = resolve("Hopper-v5")
    before = pinned()
    few = build(spec, env_seeds(0, cores - 1))
    assert pinned() == before, "some cores only: whoever else runs here would pin to the same"
    all_of_them = build(spec, env_seeds(0, cores))
    new = pinned().keys() - before.keys()
    assert len(new) == cores
    assert {pinned()[thread] for thread in new} == set(range(cores))
    few.close()
    all_of_them.close()


def pinned() -> dict[int, int]:
    """Return the threads of this process that may run on one core only, and which."""
    allowed = {int(thread): os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")}
    return {thread: next(iter(cores)) for thread, cores in allowed.items() if len(cores) == 1}


def test_closing_twice_is_harmless():
    env = build(resolve("Hopper-v5"), [0])
    env.close()
    env.close()


def test_push_shows_its_goal():
    env = build(resolve("metaworld/push-v3"), env_seeds(0, 2))
    assert (env.reset()[:, -1, 36:39] != 0).all()


@pytest.mark.parametrize("name", catalogue.MUJOCO)
def test_spec_has_the_sizes_of_envpool(name):
    spec = resolve(name)
    env = build(spec, [0])
    assert env.reset().shape == (1, 1, spec.observation_size)
    env.step_chunk(np.zeros((1, 1, spec.action_size), np.float32))
    env.close()
