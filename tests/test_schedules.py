"""Numbers that change over a run."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dprl.errors import ConfigError
from dprl.schedules import Anneal, Warmup


def test_warmup_then_cosine() -> None:
    schedule = Warmup(warmup=3, decay=13, final=0.2)
    assert [schedule.at(i) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.at(8) == pytest.approx(0.6)
    assert schedule.at(5) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 0.2)) / 2)
    assert schedule.at(13) == schedule.at(1000) == pytest.approx(0.2)


def test_without_decay_it_stays() -> None:
    assert [Warmup(1).at(i) for i in (0, 1, 500)] == [0.5, 1.0, 1.0]
    assert Warmup().at(0) == 1.0


@given(st.integers(0, 20), st.integers(1, 50), st.floats(0, 1), st.integers(0, 200))
def test_a_factor_never_exceeds_one_and_never_rises_again(warmup: int, longer: int, final: float, i: int) -> None:
    """So that no schedule can climb back, as two of the reference's do."""
    schedule = Warmup(warmup, warmup + longer, final)
    assert 0 <= schedule.at(i) <= 1
    if i >= warmup:
        assert schedule.at(i + 1) <= schedule.at(i) + 1e-12


def test_anneal_is_linear_between_its_ends() -> None:
    anneal = Anneal(final=2, iterations=4, start=10)
    assert [anneal.at(i, 10) for i in (0, 10, 11, 12, 14, 100)] == [10, 10, 8, 6, 2, 2]
    assert Anneal().at(7, 10) == 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Warmup(-1), "warmup = -1: must be at least 0"),
        (lambda: Warmup(5, 5), "decay = 5: must be above warmup, which is 5"),
        (lambda: Warmup(final=2.0), "final = 2.0: must be at most 1"),
        (lambda: Warmup(final=0.5), "final = 0.5: is where a decay ends"),
        (lambda: Anneal(3.0), "final = 3.0: is of a number that moves"),
        (lambda: Anneal(start=3), "start = 3: is of a number that moves"),
        (lambda: Anneal(1.0, -1), "iterations = -1: must be at least 0"),
        (lambda: Anneal(1.0, 2, -1), "start = -1: must be at least 0"),
    ],
)
def test_bad_schedules_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
