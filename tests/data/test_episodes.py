"""Chunks are cut within episodes, and every place where one fits is used; episodes are selected and split whole."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dprl.data import Episodes
from dprl.errors import ConfigError, DatasetError


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


def rows(chunks):
    return chunks.observation_rows, chunks.action_rows, chunks.valid


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
            episodes.chunks(n_obs_steps, horizon)
        return
    observations, actions, valid = rows(episodes.chunks(n_obs_steps, horizon))
    assert valid.all()

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
    observations, actions, _ = rows(make([3, 4]).chunks(n_obs_steps=3, horizon=2))
    assert actions.tolist() == [[0, 1], [1, 2], [3, 4], [4, 5], [5, 6]]
    assert observations.tolist() == [[0, 0, 0], [0, 0, 1], [3, 3, 3], [3, 3, 4], [3, 4, 5]]


def test_short_episodes_are_left_out():
    _, actions, _ = rows(make([2, 5, 1]).chunks(n_obs_steps=1, horizon=4))
    assert actions.tolist() == [[2, 3, 4, 5], [3, 4, 5, 6]]


def test_too_long_a_horizon_is_refused():
    with pytest.raises(DatasetError, match="horizon of 6: the longest has 5 steps"):
        make([2, 5, 1]).chunks(n_obs_steps=1, horizon=6)


def test_no_episodes_are_refused():
    with pytest.raises(DatasetError, match="no episodes"):
        make([])


def test_lengths_starts_and_success_rate():
    episodes = make([2, 5, 1])
    assert episodes.n_episodes == 3
    assert episodes.starts.tolist() == [0, 2, 7]
    assert episodes.lengths.tolist() == [2, 5, 1]
    assert episodes.success_rate == pytest.approx(2 / 3)


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def numbered(lengths: list[int]) -> Episodes:
    """Every number names its own place: steps count on, final observations are minus their episode."""
    steps, n = sum(lengths), len(lengths)
    step, episode = np.arange(steps, dtype=np.float32), np.arange(n)
    return Episodes(
        observations=np.stack([step, step], axis=1),
        actions=step[:, None],
        rewards=step,
        final_observations=-np.stack([episode, episode], axis=1).astype(np.float32),
        ends=np.cumsum(lengths),
        terminated=episode % 2 == 0,
        success=episode % 3 == 0,
        seeds=episode,
        env_id="toy",
        images={"top": np.broadcast_to(np.uint8(step)[:, None, None, None], (steps, 2, 3, 3))},
        final_images={"top": np.broadcast_to(np.uint8(episode)[:, None, None, None], (n, 2, 3, 3))},
    )


@settings(deadline=None)
@given(lengths=LENGTHS, n_obs_steps=st.integers(1, 4), horizon=st.integers(1, 6), pad_after=st.integers(0, 8))
def test_padded_chunks(lengths, n_obs_steps, horizon, pad_after):
    episodes = make(lengths)
    if max(lengths) + min(pad_after, horizon - 1) < horizon:
        with pytest.raises(DatasetError):
            episodes.chunks(n_obs_steps, horizon, pad_after=pad_after)
        return
    chunks = episodes.chunks(n_obs_steps, horizon, pad_after=pad_after)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    first = chunks.action_rows[:, 0]

    assert len(chunks) == len(first)
    assert (owner[chunks.action_rows] == owner[first][:, None]).all(), "a chunk stays in its episode"
    assert chunks.valid[:, 0].all()
    assert (~chunks.valid).sum(axis=1).max() <= pad_after
    wanted, last = first[:, None] + np.arange(horizon), episodes.ends[owner[first]][:, None] - 1
    np.testing.assert_array_equal(chunks.valid, wanted <= last)
    np.testing.assert_array_equal(chunks.action_rows, np.minimum(wanted, last))
    fits = [s for s in range(sum(lengths)) if s + horizon - 1 - pad_after <= episodes.ends[owner[s]] - 1]
    assert first.tolist() == fits, "every start that the padding allows is used, once"
    earlier = first[:, None] - np.arange(n_obs_steps)[::-1]
    np.testing.assert_array_equal(chunks.observation_rows, np.maximum(earlier, episodes.starts[owner[first]][:, None]))


def test_padding_by_hand():
    chunks = make([3, 1]).chunks(n_obs_steps=1, horizon=3, pad_after=1)
    assert chunks.action_rows.tolist() == [[0, 1, 2], [1, 2, 2]]
    assert chunks.valid.tolist() == [[True, True, True], [True, True, False]]
    assert make([3, 1]).chunks(1, 3, pad_after=2).action_rows.tolist()[2:] == [[2, 2, 2], [3, 3, 3]]


def test_wrong_padding_is_refused():
    with pytest.raises(ConfigError, match="pad_after = -1: must be at least 0"):
        make([3]).chunks(1, 2, pad_after=-1)
    with pytest.raises(DatasetError, match="horizon of 6, 2 of them padding: the longest has 3 steps"):
        make([3]).chunks(1, 6, pad_after=2)


@settings(deadline=None)
@given(lengths=LENGTHS, data=st.data())
def test_selected_episodes_are_whole_and_unchanged(lengths, data):
    episodes = numbered(lengths)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8))
    some = episodes.select(chosen)
    assert some.lengths.tolist() == [lengths[i] for i in chosen]
    assert some.seeds.tolist() == chosen
    np.testing.assert_array_equal(some.terminated, episodes.terminated[chosen])
    np.testing.assert_array_equal(some.success, episodes.success[chosen])
    np.testing.assert_array_equal(some.final_observations[:, 0], np.negative(chosen))
    np.testing.assert_array_equal(some.final_images["top"][:, 0, 0, 0], chosen)
    rows = np.concatenate([np.arange(episodes.starts[i], episodes.ends[i]) for i in chosen])
    for values in (some.observations[:, 0], some.actions[:, 0], some.rewards, some.images["top"][:, 0, 0, 0]):
        np.testing.assert_array_equal(values, rows)
    assert some.env_id == "toy"


def test_a_mask_selects_the_episodes_where_it_is_true():
    episodes = make([2, 5, 1, 4])
    assert episodes.select(episodes.success).seeds.tolist() == [0, 2]
    assert episodes.select(~episodes.success).lengths.tolist() == [5, 4]
    assert episodes.select((~episodes.success).tolist()).seeds.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("success", np.zeros(2, np.bool_), r"success are bool \(2,\); they must be bool \(3,\)"),
        ("success", np.array([0.5, 0, 1]), "success are float64"),
        ("terminated", np.zeros(4, np.bool_), "terminated are bool"),
        ("seeds", np.arange(2), r"seeds are int64 \(2,\); they must be whole numbers \(3,\)"),
        ("ends", np.array([2.0, 7.0, 8.0]), "ends are float64"),
        ("final_observations", np.zeros((3, 5), np.float32), "final_observations have 5 numbers, observations 2"),
    ],
)
def test_numbers_of_episodes_that_do_not_add_up_are_refused(field, value, message):
    with pytest.raises(DatasetError, match=message):
        replace(make([2, 5, 1]), **{field: value})


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([], "no episodes are selected"),
        ([0, 3], "no episode 3: the data set has 3"),
        ([-1], "-1"),
        ([1.7], "whole numbers"),
        ([True, False], "a mask of 3"),
        ([[0]], "whole numbers"),
        (np.zeros(3, np.bool_), "no episodes are selected"),
    ],
)
def test_impossible_selections_are_refused(chosen, message):
    with pytest.raises(DatasetError, match=message):
        make([2, 5, 1]).select(chosen)


@settings(deadline=None)
@given(lengths=LENGTHS, share=st.floats(0.001, 0.999), seed=st.integers(0, 2**31))
def test_split_divides_the_episodes(lengths, share, seed):
    episodes = numbered([*lengths, 1])
    n = episodes.n_episodes
    train, validation = episodes.split(share, seed)
    assert validation is not None
    assert sorted([*train.seeds, *validation.seeds]) == list(range(n))
    assert train.seeds.tolist() == sorted(train.seeds)
    assert validation.seeds.tolist() == sorted(validation.seeds)
    assert validation.n_episodes in {min(max(k, 1), n - 1) for k in (math.floor(share * n), math.ceil(share * n))}
    again = episodes.split(share, seed)[1]
    assert again is not None
    assert again.seeds.tolist() == validation.seeds.tolist()


def test_split_follows_from_its_seed():
    episodes = make([1] * 30)
    chosen = {tuple(part.seeds) for seed in range(5) if (part := episodes.split(0.2, seed)[1]) is not None}
    assert len(chosen) == 5
    assert {len(seeds) for seeds in chosen} == {6}


def test_no_share_is_no_split():
    episodes = make([2, 5])
    assert episodes.split(0.0, 0) == (episodes, None)


def test_impossible_splits_are_refused():
    with pytest.raises(DatasetError, match=r"validation_share = 0.1: the data set has a single episode"):
        make([4]).split(0.1, 0)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"validation_share = .* at least 0 and below 1"):
            make([4, 4]).split(share, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ends": np.array([2, 2, 5])}, "episode 1 is empty: it goes from step 2 to before 2"),
        ({"ends": np.array([2, 4, 3])}, "episode 2 is empty"),
        ({"ends": np.array([2, 3, 9])}, "the episodes have 9 steps, but there are 5 actions"),
        ({"actions": np.zeros((5, 1))}, r"actions are float64 \(5, 1\); they must be float32 \(5, size\)"),
        ({"actions": np.zeros(5, np.float32)}, r"actions are float32 \(5,\)"),
        ({"rewards": np.zeros((5, 1), np.float32)}, r"rewards are float32 \(5, 1\); they must be float32 \(5, \)"),
        ({"observations": np.zeros((4, 2), np.float32)}, r"observations are float32 \(4, 2\)"),
        ({"final_observations": np.zeros((2, 2), np.float32)}, r"final_observations are float32 \(2, 2\)"),
        (
            {"observations": np.float32([[0, 0], [0, 0], [0, 0], [0, np.inf], [0, 0]])},
            r"observations of episode 2, step 0 are \[0.0, inf\]; they must be finite",
        ),
        ({"final_observations": np.float32([[0, 0], [np.nan, 0], [0, 0]])}, "final_observations of episode 1 are"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(DatasetError, match=message):
        replace(make([2, 1, 2]), **changes)


@pytest.mark.parametrize(("n_obs_steps", "horizon"), [(0, 2), (1, 0), (1, -3)])
def test_chunks_of_nothing_are_refused(n_obs_steps, horizon):
    with pytest.raises(ConfigError, match="must be at least 1"):
        make([4]).chunks(n_obs_steps, horizon)


def test_the_best_episodes_are_those_of_the_largest_returns():
    episodes = make([2, 3, 1, 4])
    episodes.rewards[:] = [1, 1, 0, 5, 0, 3, 0, 0, 0, 2]
    assert episodes.returns.tolist() == [2, 5, 3, 2]
    assert episodes.best(0.5).seeds.tolist() == [1, 2]
    assert episodes.best(0.51).seeds.tolist() == [0, 1, 2]  # rounded up; of equal ones the first
    assert episodes.best(1.0) is episodes
    assert make([1] * 100).best(0.07).n_episodes == 7


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_impossible_shares_are_refused(share):
    with pytest.raises(ConfigError, match="share = "):
        make([2]).best(share)


def test_the_best_of_data_without_rewards_cannot_be_told():
    with pytest.raises(DatasetError, match="neither rewards nor success"):
        replace(make([2, 2]), rewards_from="none").best(0.5)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6), cut=st.integers(0, 6))
def test_parts_put_together_are_the_whole(lengths, cut):
    whole = make(lengths)
    whole.rewards[:] = np.arange(len(whole.rewards))
    n, cut = whole.n_episodes, min(cut, len(lengths))
    parts = [whole.select(rows) for rows in (np.arange(cut), np.arange(cut, n)) if len(rows)]
    together = Episodes.concatenate(parts)
    for name in ("observations", "actions", "rewards", "final_observations", "ends", "terminated", "success", "seeds"):
        assert np.array_equal(getattr(together, name), getattr(whole, name)), name


def test_parts_that_differ_are_not_put_together():
    with pytest.raises(DatasetError, match="of 2 kinds"):
        Episodes.concatenate([make([2]), replace(make([2]), env_id="other")])
