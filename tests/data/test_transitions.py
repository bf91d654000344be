"""Decisions cut out of episodes, against a loop that follows the definition."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dprl.data import Episodes
from dprl.data.transitions import decisions
from dprl.errors import ConfigError, DatasetError
from tests.policy.small import FEATURES, random_episodes


def by_hand(
    data: Episodes, n_obs: int, n_act: int, gamma: float, *, bootstraps: bool = True
) -> list[tuple[object, ...]]:
    """What each decision saw, did, earned and led to."""
    found = []
    for i, (start, end) in enumerate(zip(data.starts, data.ends, strict=True)):
        states = np.concatenate([data.observations[start:end], data.final_observations[i : i + 1]])
        known = data.final_known is None or data.final_known[i]
        for t in range(end - start):
            n = min(n_act, end - start - t)
            last = t + n == end - start
            over = last and (data.terminated[i] or not bootstraps)
            if last and not over and not known:
                continue
            reward = sum(gamma**j * data.rewards[start + t + j] for j in range(n))
            discount = 0.0 if over else gamma**n
            seen, following = ([states[max(0, at + j)] for j in range(1 - n_obs, 1)] for at in (t, t + n))
            did = [data.actions[min(start + t + j, end - 1)] for j in range(n_act)]
            found.append((seen, did, n, following, reward, discount))
    return found


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    n_obs=st.integers(1, 3),
    n_act=st.integers(1, 4),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    seed=st.integers(0, 5),
    bootstraps=st.booleans(),
)
def test_decisions_are_what_the_definition_says(
    lengths: list[int], n_obs: int, n_act: int, gamma: float, seed: int, bootstraps: bool
) -> None:
    rng = np.random.default_rng(seed)
    data = random_episodes(FEATURES, tuple(lengths), seed)
    flags = [rng.random(len(lengths)) < 0.5 for _ in range(2)]
    data = replace(data, terminated=flags[0], final_known=flags[1])
    expected = by_hand(data, n_obs, n_act, gamma, bootstraps=bootstraps)
    if not expected:
        with pytest.raises(DatasetError, match="no decision is left"):
            decisions(data, n_obs, n_act, gamma, bootstrap_truncated=bootstraps)
        return
    cut = decisions(data, n_obs, n_act, gamma, bootstrap_truncated=bootstraps)
    everything = np.concatenate([data.observations, data.final_observations])
    seen, did, n, following, reward, discount = (np.array(column) for column in zip(*expected, strict=True))
    np.testing.assert_array_equal(data.observations[cut.observation_rows], seen)
    np.testing.assert_array_equal(data.actions[cut.action_rows], did)
    np.testing.assert_array_equal(cut.n_steps, n)
    np.testing.assert_array_equal(everything[cut.next_rows], following)
    np.testing.assert_allclose(cut.rewards, reward, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cut.discounts, discount, rtol=1e-6)
    assert len(cut) == len(expected)


def test_where_rewards_are_made_of_success_nothing_follows_a_cut() -> None:
    data = replace(random_episodes(), terminated=np.zeros(4, np.bool_), final_known=np.zeros(4, np.bool_))
    made = decisions(replace(data, rewards_from="success"), 1, 2, 0.9)
    assert (made.discounts[made.next_rows[:, 0] >= 28] == 0).all()
    assert len(made) == 28
    assert len(decisions(data, 1, 2, 0.9)) == 28 - 2 * 4


def test_data_without_rewards_are_refused() -> None:
    data = replace(random_episodes(), rewards_from="none")
    with pytest.raises(DatasetError, match="neither rewards nor success"):
        decisions(data, 1, 1, 0.99)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 1, 0.9), "n_obs_steps = 0"), ((1, 0, 0.9), "n_action_steps = 0"), ((1, 1, 1.5), "gamma = 1.5: must be from")],
)
def test_bad_arguments_are_refused(arguments: tuple[int, int, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decisions(random_episodes(), *arguments)


def sparse(rewards: list[float], known: list[bool]) -> Episodes:
    """Four episodes that were cut off, each with a reward at its end."""
    data = random_episodes()
    earned = np.zeros(len(data.actions), np.float32)
    earned[np.asarray(data.ends) - 1] = rewards
    cut, outcomes = np.zeros(4, np.bool_), np.array(known)
    return replace(data, rewards=earned, terminated=cut, final_known=outcomes, rewards_from="data")


def test_rewards_that_would_all_be_left_out_are_refused() -> None:
    data = sparse([0, 1, 0, 1], [True, False, True, False])
    with pytest.raises(DatasetError, match="all rewards are in decisions that must be left out"):
        decisions(data, 1, 2, 0.9)
    kept = decisions(data, 1, 2, 0.9, bootstrap_truncated=False)
    assert len(kept) == len(data.actions)
    assert (kept.rewards > 0).sum() == 4


def test_rewards_of_which_most_are_left_out_are_told() -> None:
    with pytest.warns(UserWarning, match="75% of the rewards are in decisions that are left out"):
        decisions(sparse([1, 1, 1, 1], [True, False, False, False]), 1, 2, 0.9)


def test_rewards_that_are_all_zero_are_told() -> None:
    with pytest.warns(UserWarning, match="all rewards of the data are 0"):
        decisions(sparse([0] * 4, [True] * 4), 1, 2, 0.9)
