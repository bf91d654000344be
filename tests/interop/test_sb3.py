"""Batched environments handed to stable-baselines3."""

import numpy as np
import pytest

from dprl.errors import ConfigError, EnvError
from dprl.spec import EnvOptions, make
from tests.toys import make_toy, reach_spec

pytest.importorskip("stable_baselines3")
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

from dprl.interop.sb3 import ChunkedVecEnv


@pytest.mark.parametrize("chunk", [1, 3])
def test_steps_are_the_batched_environments(chunk):
    env, other = ChunkedVecEnv(make_toy(reach_spec(), 4), chunk), make_toy(reach_spec(), 4)
    np.testing.assert_array_equal(env.reset(), other.reset()[:, 0])
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(60):
        actions = rng.uniform(-1, 1, (4, chunk)).astype(np.float32)
        observation, reward, done, infos = env.step(actions)
        step = other.step_chunk(actions[:, :, None])
        np.testing.assert_array_equal(observation, step.observation[:, 0])
        np.testing.assert_array_equal(reward, step.reward)
        np.testing.assert_array_equal(done, step.ended)
        for i, info in enumerate(infos):
            assert ("terminal_observation" in info) == bool(step.ended[i])
            if step.ended[i]:
                ended += 1
                np.testing.assert_array_equal(info["terminal_observation"], step.final_observation[i, 0])
                assert info["TimeLimit.truncated"] == step.truncated[i]
                assert info["is_success"] == step.success[i]
                assert info["episode"] == {"r": step.episode_return[i], "l": step.episode_length[i]}
    assert ended > 4


@pytest.mark.full
def test_ppo_learns_on_it():
    """The reacher, whose reward is dense here, from far below to near its best."""
    from dataclasses import replace

    spec = replace(reach_spec(), reward="dense", has_success=False)
    env = ChunkedVecEnv(make_toy(spec, 16))
    model = PPO("MlpPolicy", env, n_steps=64, batch_size=256, seed=0, device="cpu", gamma=0.9, learning_rate=1e-3)
    before, _ = evaluate_policy(model, env, 32, warn=False)
    model.learn(20_000)
    after, _ = evaluate_policy(model, env, 32, warn=False)
    assert before < -15
    assert after > before / 2
    assert len(model.ep_info_buffer) > 0, "episodes are recorded"


def test_images_and_history_have_their_spaces():
    env = ChunkedVecEnv(make("AvoidPixels-v0", 2, n_obs_steps=2, options=EnvOptions(max_episode_steps=5)), 2)
    observation = env.reset()
    for name, space in env.observation_space.spaces.items():
        assert space.contains(observation[name][0]), name
    assert env.observation_space["observation.images.scene"].shape == (2, 48, 48, 3)
    assert env.action_space.shape == (4,)
    env.close()


def test_actions_of_another_size_are_refused():
    env = ChunkedVecEnv(make_toy(reach_spec(), 2), 3)
    env.reset()
    with pytest.raises(EnvError, match=r"actions of shape \(2, 4\): toy/reach expects \(2, 3\)"):
        env.step(np.zeros((2, 4), np.float32))


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="n_action_steps = 0"):
        ChunkedVecEnv(make_toy(reach_spec(), 1), 0)
