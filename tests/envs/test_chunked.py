"""Chunk execution over a fake simulator whose observations say which environment, episode and step they are of."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from dprl.envs.chunked import ChunkedEnv, SimulatorStep
from dprl.errors import EnvError
from dprl.spec import EnvSpec

SPEC = EnvSpec("fake", "nowhere:build", "fake", 4, (-1.0, -1.0), (1.0, 1.0), max_episode_steps=6, has_success=True)
DENSE = replace(SPEC, reward="dense")
SPARSE = replace(SPEC, reward="sparse")

When = Mapping[tuple[int, int], int]  # (environment, episode) -> the step, counted from 1


class Fake:
    """Observes (environment, episode, step, sum of all actions); rewards 10 · environment + step."""

    def __init__(
        self,
        n: int,
        terminates: When | None = None,
        truncates: When | None = None,
        succeeds: When | None = None,
        nan_observation: When | None = None,
        nan_reward: When | None = None,
    ) -> None:
        self.terminates, self.truncates, self.succeeds = terminates or {}, truncates or {}, succeeds or {}
        self.nan_observation, self.nan_reward = nan_observation or {}, nan_reward or {}
        self.episode = np.full(n, -1)
        self.step_number = np.zeros(n, int)
        self.sums = np.zeros(n)
        self.log: dict[tuple[int, int], list[float]] = {}
        self.closed = False

    def reset(self, indices, episodes):
        self.episode[indices], self.step_number[indices], self.sums[indices] = episodes, 0, 0.0
        return self._observe(indices)

    def step(self, indices, actions):
        assert (self.episode[indices] >= 0).all()
        self.step_number[indices] += 1
        self.sums[indices] += actions.sum(axis=1)
        for i, action in zip(indices, actions, strict=True):
            self.log.setdefault((int(i), int(self.episode[i])), []).append(float(action[0]))
        reward = 10.0 * indices + self.step_number[indices]
        reward[self._now(self.nan_reward, indices)] = np.nan
        ends = (self._now(when, indices) for when in (self.terminates, self.truncates, self.succeeds))
        return SimulatorStep(self._observe(indices), reward, *ends)

    def close(self):
        self.closed = True

    def _observe(self, indices):
        observation = np.stack([indices, self.episode[indices], self.step_number[indices], self.sums[indices]], axis=1)
        observation[self._now(self.nan_observation, indices), 3] = np.nan
        return observation

    def _now(self, when, indices):
        return np.array([when.get((int(i), int(self.episode[i]))) == self.step_number[i] for i in indices], bool)


def make(spec: EnvSpec = DENSE, n: int = 2, **when: When) -> tuple[ChunkedEnv, Fake]:
    fake = Fake(n, **when)
    return ChunkedEnv(spec, fake, [100 + i for i in range(n)]), fake


def acts(n: int, n_actions: int, first: float = 1.0) -> np.ndarray:
    """Actions 0.01, 0.02, ... (the same in every environment)."""
    values = (first + np.arange(n_actions)) / 100
    return np.broadcast_to(values[None, :, None], (n, n_actions, 2)).astype(np.float32)


def test_chunk_equals_single_steps(step_singly, assert_same_step):
    when = {"terminates": {(0, 0): 2, (1, 1): 3}, "truncates": {(2, 0): 5}}
    (chunked, chunk_log), (single, single_log) = make(n=3, **when), make(n=3, **when)
    np.testing.assert_array_equal(chunked.reset(), single.reset())
    for first in (1, 10, 20, 30):
        actions = acts(3, 4, first)
        assert_same_step(chunked.step_chunk(actions), step_singly(single, actions))
    assert chunk_log.log == single_log.log


def test_ended_chunk_executes_nothing_in_the_next_episode():
    env, fake = make(terminates={(0, 0): 2})
    env.reset()
    env.step_chunk(acts(2, 4))
    env.step_chunk(acts(2, 1, first=50))
    logs = {key: np.round(np.multiply(values, 100)).tolist() for key, values in fake.log.items()}
    assert logs == {(0, 0): [1, 2], (1, 0): [1, 2, 3, 4, 50], (0, 1): [50]}


def test_ended_chunk_reports_what_it_executed():
    env, _ = make(terminates={(1, 0): 3})
    env.reset()
    step = env.step_chunk(acts(2, 4))
    assert step.n_steps.tolist() == [4, 3]
    assert step.reward.tolist() == [1 + 2 + 3 + 4, 11 + 12 + 13]
    assert step.terminated.tolist() == [False, True]
    assert not step.truncated.any()
    assert step.episode_return.tolist() == step.reward.tolist()
    assert step.episode_length.tolist() == [4, 3]


def test_final_observation_is_before_the_reset_and_observation_after():
    env, _ = make(terminates={(1, 0): 3})
    env.reset()
    step = env.step_chunk(acts(2, 4))
    assert step.final_observation[:, -1, :3].tolist() == [[0, 0, 4], [1, 0, 3]]
    assert step.observation[:, -1, :3].tolist() == [[0, 0, 4], [1, 1, 0]]


def test_without_autoreset_the_observation_stays_the_final_one():
    env, fake = make(terminates={(1, 0): 3})
    env.reset()
    step = env.step_chunk(acts(2, 4), autoreset=False)
    np.testing.assert_array_equal(step.observation, step.final_observation)
    assert fake.episode.tolist() == [0, 0]


def test_success_in_the_middle_of_a_chunk_is_reported():
    env, _ = make(SPARSE, succeeds={(1, 0): 2})
    env.reset()
    step = env.step_chunk(acts(2, 4))
    assert step.success.tolist() == [False, True]
    assert step.reward.tolist() == [0, 1]
    assert step.n_steps.tolist() == [4, 2]


def test_episode_return_and_length_go_over_chunks_and_start_anew():
    env, _ = make(n=1, terminates={(0, 0): 3})
    env.reset()
    steps = [env.step_chunk(acts(1, 2)) for _ in range(3)]
    assert [s.episode_return[0] for s in steps] == [3, 6, 3]
    assert [s.episode_length[0] for s in steps] == [2, 3, 2]


def test_history_is_filled_at_reset_and_shifts():
    env, _ = make(replace(DENSE, n_obs_steps=3), n=1)
    assert env.reset()[0, :, 2].tolist() == [0, 0, 0]
    assert env.step_chunk(acts(1, 1)).observation[0, :, 2].tolist() == [0, 0, 1]
    assert env.step_chunk(acts(1, 3)).observation[0, :, 2].tolist() == [2, 3, 4]


def test_history_does_not_reach_into_the_last_episode():
    env, _ = make(replace(DENSE, n_obs_steps=3), n=1, terminates={(0, 0): 4})
    env.reset()
    step = env.step_chunk(acts(1, 4))
    assert step.final_observation[0, :, 2].tolist() == [2, 3, 4]
    assert step.observation[0, :, 1:3].tolist() == [[1, 0]] * 3


def test_time_limit_truncates():
    env, _ = make(n=1)
    env.reset()
    assert not env.step_chunk(acts(1, 5)).ended.any()
    step = env.step_chunk(acts(1, 5))
    assert step.n_steps[0] == 1
    assert step.truncated[0]
    assert not step.terminated[0]


def test_termination_at_the_time_limit_is_termination():
    env, _ = make(n=1, terminates={(0, 0): 6}, truncates={(0, 0): 6})
    env.reset()
    step = env.step_chunk(acts(1, 6))
    assert step.terminated[0]
    assert not step.truncated[0]


@pytest.mark.parametrize(("spec", "terminated"), [(SPARSE, True), (DENSE, False)])
def test_success_terminates_under_sparse_and_truncates_under_dense_reward(spec, terminated):
    env, _ = make(spec, n=1, succeeds={(0, 0): 2})
    env.reset()
    step = env.step_chunk(acts(1, 4))
    assert (step.terminated[0], step.truncated[0]) == (terminated, not terminated)


def test_reward_is_sparse_or_the_simulators():
    rewards = []
    for spec in (SPARSE, DENSE):
        env, _ = make(spec, n=1, succeeds={(0, 0): 3})
        env.reset()
        rewards.append([float(env.step_chunk(acts(1, 1)).reward[0]) for _ in range(3)])
    assert rewards == [[0, 0, 1], [1, 2, 3]]


def test_subset_steps_and_resets_only_its_environments_in_its_order():
    env, fake = make(n=3)
    env.reset()
    step = env.step_chunk(acts(2, 2), np.array([2, 0]))
    assert step.observation[:, -1, :3].tolist() == [[2, 0, 2], [0, 0, 2]]
    assert step.reward.tolist() == [21 + 22, 1 + 2]
    assert env.reset(np.array([2]))[:, -1, :3].tolist() == [[2, 1, 0]]
    assert env.step_chunk(acts(3, 1)).observation[:, -1, :3].tolist() == [[0, 0, 3], [1, 0, 1], [2, 1, 1]]
    assert len(fake.log[1, 0]) == 1


def test_results_do_not_change_when_the_environment_goes_on():
    env, _ = make()
    first = env.reset()
    step = env.step_chunk(acts(2, 2))
    kept = first.copy(), step.observation.copy(), step.episode_return.copy()
    env.step_chunk(acts(2, 2))
    np.testing.assert_array_equal(first, kept[0])
    np.testing.assert_array_equal(step.observation, kept[1])
    np.testing.assert_array_equal(step.episode_return, kept[2])


def test_actions_are_clipped_to_the_action_space():
    env, fake = make(n=1)
    env.reset()
    env.step_chunk(np.array([[[7.0, 0.0], [-7.0, 0.0]]], np.float32))
    assert fake.log[0, 0] == [1.0, -1.0]


def test_stepping_before_the_first_reset_is_refused():
    env, _ = make()
    with pytest.raises(EnvError, match="fake: there is no open episode in environment 0, "):
        env.step_chunk(acts(2, 1))


def test_stepping_an_ended_environment_is_refused():
    env, fake = make(terminates={(1, 0): 2})
    env.reset()
    env.step_chunk(acts(2, 2), autoreset=False)
    with pytest.raises(EnvError, match=r"fake: there is no open episode in environment 1, .*: reset it"):
        env.step_chunk(acts(2, 1))
    assert len(fake.log[0, 0]) == 2, "a refused call must not step the other environments"
    env.reset(np.array([1]))
    env.step_chunk(acts(2, 1))


@pytest.mark.parametrize("shape", [(2, 2), (3, 4, 2), (2, 4, 3), (2, 1, 4, 2)])
def test_wrong_action_shape_is_refused(shape):
    env, _ = make()
    env.reset()
    with pytest.raises(EnvError, match=r"fake expects \(2, executed steps, 2\)") as error:
        env.step_chunk(np.zeros(shape, np.float32))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_action_that_is_not_finite_is_refused(bad):
    env, fake = make(terminates={(1, 0): 2})
    env.reset()
    env.step_chunk(acts(2, 2))
    env.step_chunk(acts(2, 3))
    actions = acts(2, 4).copy()
    actions[1, 0, 1] = bad
    with pytest.raises(EnvError, match="fake: action is not finite in environment 1, episode 1, step 3"):
        env.step_chunk(actions)
    assert len(fake.log[1, 1]) == 3, "nothing of the refused chunk must be executed"


@pytest.mark.parametrize("what", ["observation", "reward"])
def test_simulator_value_that_is_not_finite_is_refused(what):
    env, _ = make(terminates={(1, 0): 2}, **{f"nan_{what}": {(1, 1): 3}})
    env.reset()
    env.step_chunk(acts(2, 2))
    message = f"fake: {what} is not finite in environment 1, episode 1, step 2 .environment seed 101"
    with pytest.raises(EnvError, match=message):
        env.step_chunk(acts(2, 4))


def test_first_observation_that_is_not_finite_is_refused():
    env, _ = make(nan_observation={(1, 0): 0})
    with pytest.raises(EnvError, match="observation is not finite in environment 1, episode 0, step 0"):
        env.reset()


def play(env: ChunkedEnv, n_chunks: int, first: int = 1) -> list:
    rng = np.random.default_rng(first)
    return [env.step_chunk(rng.uniform(-1, 1, (env.n_envs, 4, 2)).astype(np.float32)) for _ in range(n_chunks)]


@pytest.mark.parametrize("n_chunks", [0, 1, 2, 5])
def test_restore_on_a_new_instance_goes_on_exactly(n_chunks, assert_same_step):
    when = {"terminates": {(0, 0): 2, (0, 1): 1, (2, 0): 4, (2, 1): 5}}
    spec = replace(DENSE, n_obs_steps=2)
    (original, _), (restored, _) = make(spec, 3, **when), make(spec, 3, **when)
    observation = original.reset()
    for step in play(original, n_chunks):
        observation = step.observation
    if n_chunks == 5:
        assert len(set(original.state().episodes)) > 1, "the environments should be in different episodes"
    np.testing.assert_array_equal(restored.restore(original.state()), observation)
    for one, other in zip(play(original, 4, 2), play(restored, 4, 2), strict=True):
        assert_same_step(one, other)


def test_state_does_not_change_when_the_environment_goes_on():
    env, _ = make()
    env.reset()
    play(env, 1)
    state = env.state()
    kept = state.episodes.copy(), state.lengths.copy(), state.actions.copy()
    play(env, 3, 2)
    for one, other in zip((state.episodes, state.lengths, state.actions), kept, strict=True):
        np.testing.assert_array_equal(one, other)


def test_restore_of_unstarted_environments_begins_at_the_first_episode():
    original, restored = make()[0], make()[0]
    restored.restore(original.state())
    assert restored.reset()[:, -1, 1].tolist() == [0, 0]


def test_restore_of_another_number_of_environments_is_refused():
    env, other = make(n=2)[0], make(n=3)[0]
    with pytest.raises(EnvError, match="of 3 environments, here are 2"):
        env.restore(other.state())


def test_close_closes_the_simulator():
    env, fake = make()
    env.close()
    assert fake.closed
