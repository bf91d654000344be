"""The scripted expert, and the demonstrations it plays."""

import numpy as np
import pytest

from dprl.data import Episodes
from dprl.envs import collect
from dprl.envs.collect import collect_episodes
from dprl.envs.experts import make_expert
from dprl.errors import ConfigError, EnvError
from dprl.spec import EnvOptions, build, env_seeds, resolve

pytest.importorskip("metaworld")

REACH = "metaworld/reach-v3"


def play(n_episodes: int, noise: float = 0.5, seed: int = 1, steps: int = 8) -> Episodes:
    spec = resolve(REACH, EnvOptions(max_episode_steps=steps, reward="dense"))
    return collect_episodes(spec, make_expert("scripted", REACH), noise, n_episodes, seed)


def assert_prefix(few: Episodes, many: Episodes) -> None:
    n, steps = few.n_episodes, few.ends[-1]
    for name in ("ends", "final_observations", "terminated", "success", "seeds"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name)[:n], name)
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name)[:steps], name)


def test_scripted_expert_reaches():
    spec = resolve(REACH)
    episodes = collect_episodes(spec, make_expert("scripted", REACH), 0.0, 5, 0)
    assert episodes.success.sum() >= 4
    np.testing.assert_array_equal(episodes.terminated, episodes.success)
    np.testing.assert_array_equal(episodes.rewards[episodes.ends - 1], episodes.success.astype(np.float32))
    assert episodes.rewards.sum() == episodes.success.sum(), "1 at the first success, else 0"


def test_episodes_are_consistent():
    episodes = play(3)
    assert episodes.env_id == REACH
    assert episodes.lengths.tolist() == [8, 8, 8]
    assert episodes.observations.shape == (24, 39)
    assert episodes.actions.shape == (24, 4)
    assert episodes.final_observations.shape == (3, 39)
    assert np.abs(episodes.actions).max() <= 1
    assert not episodes.terminated.any()
    assert episodes.seeds.tolist() == env_seeds(1, 3, purpose="demonstrations")


@pytest.mark.parametrize(("transitions", "episodes"), [(1, 1), (24, 3), (25, 4), (165, 21)])
def test_transitions_are_played_in_whole_episodes_that_are_the_same(transitions: int, episodes: int):
    spec = resolve(REACH, EnvOptions(max_episode_steps=8, reward="dense"))
    data = collect_episodes(spec, make_expert("scripted", REACH), 0.5, 1, 1, transitions=transitions)
    assert data.n_episodes == episodes
    assert data.ends[-1] >= transitions > data.ends[-1] - 8
    assert data.seeds.tolist() == env_seeds(1, episodes, purpose="demonstrations")
    few = play(min(episodes, 3))
    assert_prefix(few, data)


def test_episodes_are_what_the_environment_does():
    episodes = play(2)
    env = build(resolve(REACH, EnvOptions(max_episode_steps=8, reward="dense")), episodes.seeds.tolist())
    np.testing.assert_array_equal(episodes.observations[episodes.starts], env.reset()[:, -1])
    for t in range(8):
        step = env.step_chunk(episodes.actions[episodes.starts + t][:, None], autoreset=False)
        np.testing.assert_array_equal(episodes.rewards[episodes.starts + t], step.reward)
        led_to = episodes.observations[episodes.starts + t + 1] if t < 7 else episodes.final_observations
        np.testing.assert_array_equal(led_to, step.final_observation[:, -1])


def test_episode_does_not_depend_on_how_many_there_are():
    assert_prefix(play(2), play(5))


def test_episode_does_not_depend_on_the_batches_it_is_played_in(monkeypatch):
    together = play(5)
    monkeypatch.setattr(collect, "MAX_ENVS", 2)
    assert_prefix(play(5), together)


def test_seed_and_noise_change_the_episodes():
    actions = [play(1, noise, seed).actions for noise, seed in ((0.5, 1), (0.5, 2), (0.0, 1))]
    assert not np.array_equal(actions[0], actions[1])
    assert not np.array_equal(actions[0], actions[2])


def test_no_episodes_are_refused():
    with pytest.raises(ConfigError, match="n_episodes = 0"):
        play(0)


def test_expert_acts_row_by_row_within_the_action_space():
    expert = make_expert("scripted", REACH)
    observation = play(1, steps=3).observations
    actions = expert.act(observation)
    assert actions.shape == (3, 4)
    assert actions.dtype == np.float32
    assert np.abs(actions).max() <= 1
    np.testing.assert_array_equal(expert.act(observation[1:2]), actions[1:2])


def test_unknown_expert_is_refused_with_a_hint():
    with pytest.raises(EnvError, match=r"unknown expert 'scriptd'\. Did you mean scripted\?"):
        make_expert("scriptd", REACH)


def test_expert_of_another_environment_is_refused():
    with pytest.raises(EnvError, match="the expert 'scripted' does not know 'Hopper-v5'"):
        make_expert("scripted", "Hopper-v5")
    with pytest.raises(EnvError, match=r"does not know 'metaworld/raech-v3'.*metaworld/reach-v3"):
        make_expert("scripted", "metaworld/raech-v3")


def test_the_packages_own_environment_shows_the_goal_at_every_step() -> None:
    """The expert, which needs the goal, succeeds there too; so videos show what EnvPool trained."""
    spec = resolve("metaworld/push-v3", EnvOptions(backend="gymnasium"))
    data = collect_episodes(spec, make_expert("scripted", spec.id), 0.0, 4, seed=0)
    assert data.success_rate >= 0.75
    assert (np.abs(data.observations[:, 37]) > 0.1).all()
