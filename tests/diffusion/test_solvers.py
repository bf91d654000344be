"""Samplers against closed forms: for Gaussian data the best denoiser is known, and so is what each sampler returns."""

import pytest
import torch

from dprl.diffusion import NoiseSchedule, ddpm
from dprl.errors import ConfigError

MEAN, STD = 0.3, 0.2


def best_noise(schedule: NoiseSchedule, x: torch.Tensor, t: int) -> torch.Tensor:
    """E[ε | x_t] when x_0 ~ N(MEAN, STD²)."""
    alpha_bar = schedule.alphas_bar[t]
    variance = alpha_bar * STD**2 + 1 - alpha_bar
    return (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * MEAN) / variance


def recursion(schedule: NoiseSchedule) -> tuple[float, float]:
    """Mean and variance of DDPM's output, step by step: every step is linear in x."""
    mean, variance = 0.0, 1.0
    for t in reversed(range(schedule.num_train_timesteps)):
        zero, one = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)

        def step(x: torch.Tensor, t: int = t) -> tuple[float, float]:
            clean = schedule.predict_clean(x, best_noise(schedule, x, t), t, None)
            moved, std = schedule.posterior(clean, x, t)
            return float(moved), float(std)

        offset, std = step(zero)
        slope = step(one)[0] - offset
        mean, variance = offset + slope * mean, slope**2 * variance + (std**2 if t else 0.0)
    return mean, variance


@pytest.mark.parametrize("steps", [1, 5, 20, 100])
def test_ddpm_output_has_the_mean_and_variance_of_its_recursion(steps: int) -> None:
    schedule, n = NoiseSchedule(steps), 40_000
    draws = torch.randn(ddpm.n_draws(schedule, None), n, 1, 1, generator=torch.Generator().manual_seed(steps))
    x = ddpm.solve(schedule, lambda x, t: best_noise(schedule, x, t), draws, None, 1.0).flatten()
    mean, variance = recursion(schedule)
    assert abs(float(x.mean()) - mean) < 3 * (variance / n) ** 0.5 + 1e-4
    assert abs(float(x.var()) - variance) < 3 * variance * (2 / n) ** 0.5 + 1e-5


def test_ddpm_converges_to_the_data() -> None:
    mean, variance = recursion(NoiseSchedule(1000))
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert variance == pytest.approx(STD**2, rel=0.05)


def test_temperature_zero_takes_no_noise_but_the_first() -> None:
    schedule = NoiseSchedule(5)
    draws = torch.randn(5, 3, 2, 1, generator=torch.Generator().manual_seed(0))
    other = torch.cat([draws[:1], torch.randn(4, 3, 2, 1, generator=torch.Generator().manual_seed(1))])

    def solve(noise: torch.Tensor, temperature: float) -> torch.Tensor:
        return ddpm.solve(schedule, lambda x, t: best_noise(schedule, x, t), noise, None, temperature)

    assert torch.equal(solve(draws, 0.0), solve(other, 0.0))
    assert not torch.equal(solve(draws, 1.0), solve(other, 1.0))


def test_ddpm_refuses_fewer_steps() -> None:
    with pytest.raises(ConfigError, match=r"num_inference_steps = 3.*all 5"):
        ddpm.n_draws(NoiseSchedule(5), 3)
