"""The schedule's tables against their definitions and invariants."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dprl.diffusion import NoiseSchedule
from dprl.diffusion.schedule import cosine_betas


@given(st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_invariants(steps: int) -> None:
    schedule = NoiseSchedule(steps)
    betas, alphas_bar = schedule.betas, schedule.alphas_bar
    assert ((betas > 0) & (betas < 1)).all()
    assert (alphas_bar.diff() < 0).all()
    assert (schedule.posterior_std**2 <= betas * 1.00001).all()
    assert schedule.posterior_std[0] <= 1e-9


def test_cosine_betas_by_hand() -> None:
    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = cosine_betas(4)
    assert betas[0] == pytest.approx(1 - f(0.25) / f(0))
    assert betas[2] == pytest.approx(1 - f(0.75) / f(0.5))
    assert betas[3] == pytest.approx(0.999)


def test_predicting_the_clean_action_undoes_the_noising() -> None:
    schedule = NoiseSchedule(20)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.rand(20, 3, 2, generator=generator) * 2 - 1, torch.randn(20, 3, 2, generator=generator)
    t = torch.arange(20)
    noisy = schedule.add_noise(clean, noise, t)
    back = schedule.predict_clean(noisy, noise, t, None)
    torch.testing.assert_close(back[:19], clean[:19], atol=1e-4, rtol=1e-4)  # at t = 19 almost no signal is left
    assert schedule.predict_clean(noisy, -noise, t, 1.0).abs().max() <= 1


def test_one_timestep_for_all_equals_a_batch_of_it() -> None:
    schedule = NoiseSchedule(10)
    x, clean = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(0))
    for t in range(10):
        batch = torch.full((5,), t)
        assert torch.equal(schedule.predict_clean(x, clean, t, 1.0), schedule.predict_clean(x, clean, batch, 1.0))
        for one, many in zip(schedule.posterior(clean, x, t), schedule.posterior(clean, x, batch), strict=True):
            assert torch.equal(one.expand(many.shape), many)


def test_posterior_is_bayes_rule() -> None:
    """q(x_{t-1} | x_t, x_0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add."""
    schedule, t = NoiseSchedule(20), 7
    beta, previous = float(schedule.betas[t]), float(schedule.alphas_bar[t - 1])
    clean, noisy = torch.tensor([[[0.3]]]), torch.tensor([[[-0.8]]])
    precision = (1 - beta) / beta + 1 / (1 - previous)
    expected = (math.sqrt(1 - beta) * -0.8 / beta + math.sqrt(previous) * 0.3 / (1 - previous)) / precision
    mean, std = schedule.posterior(clean, noisy, t)
    assert float(mean) == pytest.approx(expected, rel=1e-4)
    assert float(std) ** 2 == pytest.approx(1 / precision, rel=1e-4)
