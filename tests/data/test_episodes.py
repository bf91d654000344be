"""Chunks are cut within episodes, and every place where one fits is used."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dprl.data import Episodes
from dprl.errors import DatasetError


def make(lengths: list[int]) -> Episodes:
    steps, n = sum(lengths), len(lengths)
    no = np.zeros(n, np.bool_)
    return Episodes(
        observations=np.zeros((steps, 2), np.float32),
        actions=np.zeros((steps, 1), np.float32),
        rewards=np.zeros(steps, np.float32),
        final_observations=np.zeros((n, 2), np.float32),
        ends=np.cumsum(lengths),
        terminated=no,
        success=np.arange(n) % 2 == 0,
        seeds=np.arange(n),
    )


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    n_obs_steps=st.integers(1, 4),
    horizon=st.integers(1, 6),
)
def test_chunks_stay_in_their_episode_and_cover_every_start(lengths, n_obs_steps, horizon):
    episodes = make(lengths)
    if max(lengths) < horizon:
        with pytest.raises(DatasetError):
            episodes.chunk_indices(n_obs_steps, horizon)
        return
    observations, actions = episodes.chunk_indices(n_obs_steps, horizon)

    owner = np.repeat(np.arange(len(lengths)), lengths)
    assert (owner[actions] == owner[actions[:, :1]]).all()
    assert (owner[observations] == owner[actions[:, :1]]).all()
    fits = [step for step in range(sum(lengths) - horizon + 1) if owner[step] == owner[step + horizon - 1]]
    assert actions[:, 0].tolist() == fits
    np.testing.assert_array_equal(actions - actions[:, :1], np.broadcast_to(np.arange(horizon), actions.shape))

    start = episodes.starts[owner[actions[:, :1]]]
    wanted = actions[:, :1] - np.arange(n_obs_steps)[::-1]
    np.testing.assert_array_equal(observations, np.where(wanted < start, start, wanted))


def test_observations_before_the_start_repeat_the_first():
    observations, actions = make([3, 4]).chunk_indices(n_obs_steps=3, horizon=2)
    assert actions.tolist() == [[0, 1], [1, 2], [3, 4], [4, 5], [5, 6]]
    assert observations.tolist() == [[0, 0, 0], [0, 0, 1], [3, 3, 3], [3, 3, 4], [3, 4, 5]]


def test_short_episodes_are_left_out():
    _, actions = make([2, 5, 1]).chunk_indices(n_obs_steps=1, horizon=4)
    assert actions.tolist() == [[2, 3, 4, 5], [3, 4, 5, 6]]


def test_too_long_a_horizon_is_refused():
    with pytest.raises(DatasetError, match="horizon of 6: the longest has 5 steps"):
        make([2, 5, 1]).chunk_indices(n_obs_steps=1, horizon=6)


def test_no_episodes_are_refused():
    with pytest.raises(DatasetError, match="no episodes"):
        make([])


def test_lengths_starts_and_success_rate():
    episodes = make([2, 5, 1])
    assert episodes.n_episodes == 3
    assert episodes.starts.tolist() == [0, 2, 7]
    assert episodes.lengths.tolist() == [2, 5, 1]
    assert episodes.success_rate == pytest.approx(2 / 3)
