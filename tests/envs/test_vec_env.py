"""A stable-baselines3 `VecEnv` as a backend: the episodes of the same environments through Gymnasium."""

import os
import signal
import threading

import numpy as np
import pytest

from dprl.envs import vec_env
from dprl.errors import EnvError, EnvFaultError
from dprl.mdp import DenoisingMDP, ExplorationConfig
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features
from dprl.rollout import InProcessPool, as_pool
from dprl.spec import ChunkStep, EnvOptions, EnvSpec, build, env_seeds, resolve

pytest.importorskip("stable_baselines3")
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack, VecNormalize

from tests.toys import ARRAYS

N_ENVS, LIMIT = 4, 13  # which no number of chunks fills


def hopper(n_envs: int):
    return make_vec_env("Hopper-v5", n_envs)


def hopper_in_processes(n_envs: int):
    return make_vec_env("Hopper-v5", n_envs, vec_env_cls=SubprocVecEnv)


def through_gymnasium() -> EnvSpec:
    return resolve("Hopper-v5", EnvOptions(backend="gymnasium", max_episode_steps=LIMIT))


@pytest.fixture
def actor() -> DenoisingMDP:
    policy = DiffusionPolicy(Features(11, 3), DiffusionConfig(horizon=3, num_train_timesteps=4))
    return DenoisingMDP(policy, 2, ExplorationConfig())


@pytest.mark.parametrize("make", ["hopper", pytest.param("hopper_in_processes", marks=pytest.mark.full)])
def test_rollouts_are_gymnasiums(make, actor):
    """Also where episodes end inside a chunk, by themselves and by the time limit."""
    spec = vec_env.make_spec(f"tests.envs.test_vec_env:{make}", max_episode_steps=LIMIT)
    rollouts = []
    for one in (spec, through_gymnasium()):
        with InProcessPool(one, N_ENVS, seed=3) as pool:
            rollouts.append(pool.collect(actor, 14))
    assert rollouts[0].truncated.any()
    assert rollouts[0].terminated.any() or rollouts[0].n_steps.min() < rollouts[0].n_steps.max()
    for field in ARRAYS:
        ours, theirs = (getattr(rollout, field.name) for rollout in rollouts)
        np.testing.assert_array_equal(ours, theirs, field.name)


def test_a_vec_env_of_ones_own_can_be_restored(actor):
    pool = as_pool(vec_env.from_vec_env(hopper(N_ENVS), max_episode_steps=LIMIT, seed=3), seed=3)
    with pool:
        pool.collect(actor, 3)
        state, rest = pool.state(), pool.collect(actor, 5)
    again = as_pool(vec_env.from_vec_env(hopper(N_ENVS), max_episode_steps=LIMIT, seed=3), seed=3)
    with again:
        again.restore(state)
        np.testing.assert_array_equal(again.collect(actor, 5).observations, rest.observations)


def test_episodes_of_different_length_are_restored(actor):
    """Though all its environments step at once."""
    spec = vec_env.make_spec("tests.envs.test_vec_env:hopper", max_episode_steps=100)
    with InProcessPool(spec, N_ENVS, seed=3) as pool:
        pool.collect(actor, 12)
        state, rest = pool.state(), pool.collect(actor, 5)
    assert len(set(state.lengths)) > 1
    with InProcessPool(spec, N_ENVS, seed=3) as again:
        again.restore(state)
        np.testing.assert_array_equal(again.collect(actor, 5).observations, rest.observations)


def test_an_interrupted_call_is_not_taken_for_the_next_ones_answer(monkeypatch):
    env = vec_env.from_vec_env(hopper(2), max_episode_steps=LIMIT)
    env.reset()
    with monkeypatch.context() as interrupted:
        interrupted.setattr(env._simulator._env, "step_wait", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            env.step_chunk(np.zeros((2, 1, 3), np.float32))
    with pytest.raises(EnvError, match="make a new one") as caught:
        env.reset()
    assert not isinstance(caught.value, EnvFaultError), "no environment is to blame"
    env.close()


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_what_was_handed_in_cannot_be_built_again(actor):
    pool = as_pool(vec_env.from_vec_env(hopper(2), max_episode_steps=LIMIT), seed=0)
    with pool, pytest.raises(EnvError, match=r"handed in ready-made.*make_spec"):
        pool.evaluate(actor.policy, 1, 0)


def test_time_limits_of_its_own_truncate():
    import gymnasium
    from stable_baselines3.common.vec_env import DummyVecEnv

    env = DummyVecEnv([lambda: gymnasium.make("Pendulum-v1", max_episode_steps=3)] * 2)
    batched = vec_env.from_vec_env(env, max_episode_steps=1000)
    batched.reset()
    step: ChunkStep = batched.step_chunk(np.zeros((2, 5, 1), np.float32))
    assert step.truncated.all()
    assert not step.terminated.any()
    np.testing.assert_array_equal(step.n_steps, 3)
    assert (step.final_observation != step.observation).any()


@pytest.mark.parametrize("wrapper", [VecNormalize, lambda env: VecFrameStack(env, 2)])
def test_wrappers_that_change_observations_are_refused(wrapper):
    env = wrapper(hopper(1))
    with pytest.raises(EnvError, match=r"a VecEnv in Vec\w+ is not taken"):
        vec_env.from_vec_env(env, max_episode_steps=10)
    env.close()


def test_other_spaces_are_refused():
    env = make_vec_env("CartPole-v1", 1)
    with pytest.raises(EnvError, match="its action_space is Discrete"):
        vec_env.from_vec_env(env, max_episode_steps=10)
    env.close()


def test_an_environment_that_was_left_out_must_be_reset():
    env = vec_env.from_vec_env(hopper(2), max_episode_steps=10)
    env.reset()
    env.step_chunk(np.zeros((1, 1, 3), np.float32), np.array([0]))
    with pytest.raises(EnvError, match="one that was left out must be reset"):
        env.step_chunk(np.zeros((2, 1, 3), np.float32))
    env.reset(np.array([1]))
    env.step_chunk(np.zeros((2, 1, 3), np.float32))
    env.close()


def test_an_environment_that_fails_to_reset_is_named():
    env = vec_env.from_vec_env(make_vec_env("Hopper-v5", 2), max_episode_steps=LIMIT)
    env.reset()
    env._simulator._env.envs[1].reset = None
    with pytest.raises(EnvFaultError, match=r"raised in environment 1, episode 1, step 0 .*TypeError"):
        env.reset()
    env.close()


@pytest.mark.full
def test_processes_that_have_died_do_not_hinder_closing(caplog):
    env = vec_env.from_vec_env(hopper_in_processes(2), max_episode_steps=LIMIT)
    env.reset()
    processes = env._simulator._env.processes
    processes[0].kill()
    with pytest.raises(EnvFaultError, match="the simulator raised"):
        env.step_chunk(np.zeros((2, 1, 3), np.float32))
    env.close()
    assert "did not close" in caplog.text
    assert not any(process.is_alive() for process in processes)


@pytest.mark.timeout(60)
def test_it_closes_whichever_of_its_processes_dies_in_a_step():
    """The answers of those before it have been read, and are not waited for again."""
    env = vec_env.from_vec_env(hopper_in_processes(2), max_episode_steps=LIMIT)
    env.reset()
    processes = env._simulator._env.processes
    os.kill(processes[1].pid, signal.SIGSTOP)
    threading.Timer(0.5, processes[1].kill).start()
    with pytest.raises(EnvFaultError, match="the simulator raised"):
        env.step_chunk(np.zeros((2, 1, 3), np.float32))
    env.close()
    assert not any(process.is_alive() for process in processes)


def test_spec_builds_any_number():
    spec = vec_env.make_spec("tests.envs.test_vec_env:hopper", max_episode_steps=5)
    assert spec.serial
    env = build(spec, env_seeds(0, 3))
    assert env.reset().shape == (3, 1, 11)
    env.close()
