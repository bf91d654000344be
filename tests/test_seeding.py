"""Noise by environment, episode and step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dprl.seeding import EpisodeNoise

SHAPE = (3, 2, 4)


def draw(seed: int, environments: list[int], episodes: list[int], steps: list[int]) -> np.ndarray:
    return EpisodeNoise(seed, "noise").draw(SHAPE, np.array(environments), np.array(episodes), np.array(steps))


@given(st.lists(st.tuples(*(st.integers(0, 2**31 - 1),) * 3), min_size=1, max_size=5, unique=True), st.integers(0, 9))
def test_a_draw_depends_on_its_own_place_alone(places, seed):
    together = draw(seed, *map(list, zip(*places, strict=True)))
    assert together.shape == (3, len(places), 2, 4)
    for i, (environment, episode, step) in enumerate(places):
        np.testing.assert_array_equal(draw(seed, [environment], [episode], [step])[:, 0], together[:, i])
    assert len(np.unique(together)) == together.size


@pytest.mark.parametrize("change", ["seed", "environment", "episode", "step"])
def test_each_part_of_the_key_counts(change):
    place = {"seed": 0, "environment": 5, "episode": 6, "step": 7}
    one, other = (
        draw(p["seed"], [p["environment"]], [p["episode"]], [p["step"]])
        for p in (place, place | {change: place[change] + 1})
    )
    assert not np.isin(one, other).any()


def test_neighbouring_streams_are_normal_and_uncorrelated():
    """1,000 environments at 50 steps each: mean, variance, kurtosis, and correlation between neighbours."""
    each = [draw(1, list(range(1000)), [3] * 1000, [step] * 1000) for step in range(50)]
    noise = np.stack(each).swapaxes(1, 2).reshape(50, 1000, 24)  # step, environment, number
    n = noise.size
    assert abs(noise.mean()) < 4 / n**0.5
    assert abs(noise.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((noise**4).mean() - 3) < 4 * (96 / n) ** 0.5
    for axis in range(3):
        rows = np.moveaxis(noise, axis, 0)
        assert abs((rows[1:] * rows[:-1]).mean()) < 4 / rows[1:].size ** 0.5


def test_many_draws_of_one_stream_do_not_run_into_the_next_step():
    """The step is the counter's second word: 2^64 blocks apart."""
    long = EpisodeNoise(0, "noise").draw((10_000,), np.zeros(2, int), np.zeros(2, int), np.arange(2))
    assert not np.isin(long[:, 0], long[:, 1]).mean() > 0.01
