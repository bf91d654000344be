"""Value guidance against closed forms: Gaussian behaviour, quadratic value.

For x_0 ~ N(MEAN, COVARIANCE) and J(x_0) = -(x_0 - GOAL)' PRECISION (x_0 - GOAL) / 2 everything is Gaussian: what the
tilted distribution p(x_0) exp(s J) is, what E[exp(s J) | x_t] is, and what each solver's step makes of a guide, which
moves x̂_0 by an affine function of x_t. All is derived here in float64, with no code of the library's.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dprl.diffusion import NoiseSchedule, ScheduleConfig, SolverConfig, n_draws, solve_guided, solver_steps
from dprl.guidance import Guide, ValueGuide, guided
from dprl.guidance.value import Gradient, Scaling
from tests.diffusion import test_closed_form as plain
from tests.diffusion.test_closed_form import (
    CASES,
    COVARIANCE,
    EYE,
    MEAN,
    A,
    Affine,
    Array,
    CleanOf,
    best_clean,
    closed_form,
    exact_moments,
    settings,
)

GOAL = np.array([0.8, 0.4, -0.3])
PRECISION = np.array([[6.0, 1.0, 0.0], [1.0, 4.0, -1.0], [0.0, -1.0, 5.0]])
SCALES = (0.3, 1.0, 3.0)
ONE_OF_EACH = [
    pytest.param(*case, marks=[] if case[1] in ("epsilon", "velocity") else pytest.mark.full, id="-".join(case))
    for case in CASES
]
"""Every schedule with every solver; with every prediction in the long tests."""

# --------------------------------------------------------------------------------------------------- the closed forms


def tilted(scale: float) -> tuple[Array, Array]:
    """Mean and covariance of p(x_0) exp(s J(x_0))."""
    own = np.linalg.inv(COVARIANCE)
    covariance = np.linalg.inv(own + scale * PRECISION)
    mean: Array = covariance @ (own @ MEAN + scale * PRECISION @ GOAL)
    return mean, covariance


def energy_gradient(signal: float, noise: float, scale: float = 1.0) -> Affine:
    """∇_{x_t} log E[exp(s J(x_0)) | x_t], where x_0 given x_t is N(x̂_0, S)."""
    gain, offset = best_clean(signal, noise)
    spread = np.linalg.inv(np.linalg.inv(COVARIANCE) + (signal / noise) ** 2 * EYE)
    slope = -gain.T @ np.linalg.inv(np.linalg.inv(scale * PRECISION) + spread)
    return slope @ gain, slope @ (offset - GOAL)


def through(signal: float, noise: float) -> Affine:
    """∇_{x_t} J(x̂_0(x_t))."""
    gain, offset = best_clean(signal, noise)
    return -gain.T @ PRECISION @ gain, -gain.T @ PRECISION @ (offset - GOAL)


def held(signal: float, noise: float) -> Affine:
    """∇J at x̂_0, over the signal."""
    gain, offset = best_clean(signal, noise)
    return -PRECISION @ gain / signal, -PRECISION @ (offset - GOAL) / signal


GRADIENTS: dict[str, Callable[[float, float], Affine]] = {"noisy": energy_gradient, "through": through, "held": held}


def factor(scaling: str, signal: float, noise: float, signal_next: float, noise_next: float) -> float:
    if scaling == "score":
        return noise**2 / signal
    if scaling == "variance":  # what moves ddpm's mean by β̃ g, over the weight that its mean gives to x̂_0
        beta = 1 - (signal / signal_next) ** 2
        return (noise_next**2 / noise**2 * beta) / (signal_next * beta / noise**2)
    return {"noise": noise, "constant": 1.0}[scaling]


def moved(gradient: str, scaling: str, scale: float) -> CleanOf:
    """x̂_0 of a guided step."""

    def clean(signal: float, noise: float, signal_next: float, noise_next: float) -> Affine:
        gain, offset = best_clean(signal, noise)
        if signal == 0:  # nothing is known of x_0
            return gain, offset
        by = scale * factor(scaling, signal, noise, signal_next, noise_next)
        slope, height = GRADIENTS[gradient](signal, noise)
        return gain + by * slope, offset + by * height

    return clean


def expected(config: ScheduleConfig, solver: SolverConfig, clean_of: CleanOf) -> tuple[Array, Array]:
    k = config.num_train_timesteps
    return closed_form(
        config.schedule, k, solver.num_inference_steps or k, str(solver.solver), solver.eta, clean_of=clean_of
    )


# ------------------------------------------------------------------------------------------------------ the library's


class Quadratic:
    """J itself, and the exact energy of noisy actions, of a scale."""

    def __init__(self, config: ScheduleConfig, scale: float = 1.0) -> None:
        self.config, self.scale = config, scale

    def at(self, obs: Tensor) -> Callable[[Tensor], Tensor]:
        def value(actions: Tensor) -> Tensor:
            away = actions[:, 0] - torch.from_numpy(GOAL).to(actions.dtype)
            return -0.5 * torch.einsum("bi,ij,bj->b", away, torch.from_numpy(PRECISION).to(actions.dtype), away)

        return value

    def noisy_at(self, obs: Tensor) -> Callable[[Tensor, int], Tensor]:
        return self.energy

    def energy(self, noisy: Tensor, timestep: int) -> Tensor:
        """Up to a constant: x' slope x / 2 + height' x."""
        levels = plain.signal_and_noise(self.config.schedule, self.config.num_train_timesteps, timestep)
        slope, height = (torch.from_numpy(part).to(noisy.dtype) for part in energy_gradient(*levels, self.scale))
        x = noisy[:, 0]
        return 0.5 * torch.einsum("bi,ij,bj->b", x, slope, x) + x @ height


def run_with(guide_of: Callable[[ScheduleConfig], Guide]) -> plain.Run:
    """As `tests.diffusion.test_closed_form.run`, guided."""

    def run(config: ScheduleConfig, solver: SolverConfig, draws: Callable[[int], Tensor]) -> Tensor:
        steps = solver_steps(config, solver)
        all_draws = draws(n_draws(steps))
        schedule = NoiseSchedule(config).to(all_draws.dtype)
        network = plain.network(config.schedule, config.num_train_timesteps, config.prediction_type)

        def network_at(t: int) -> Callable[[Tensor], Tensor]:
            return lambda x: schedule.predict_clean(x, network(x, t), t, clip=None)

        obs, guide = torch.zeros(all_draws.shape[1], 1, 1), guide_of(config)
        advance = guided(
            guide, steps, schedule, network_at, obs=obs, to_actions=lambda clean: clean, allowed=lambda clean: clean
        )
        return solve_guided(steps, advance, all_draws[0], all_draws[1:])[:, 0]

    return run


def by_value(gradient: Gradient, scaling: Scaling, scale: float) -> plain.Run:
    return run_with(lambda config: ValueGuide(Quadratic(config), scale, gradient, scaling))


def exact(scale: float) -> plain.Run:
    """Guided by the energy of exp(s J)."""
    return run_with(lambda config: ValueGuide(Quadratic(config, scale), 1.0, "noisy", "score"))


# -------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(("signal", "noise"), [(0.9, 0.4), (0.3, 0.95), (1e-3, 1.0)])
@pytest.mark.parametrize("scale", SCALES)
def test_the_energy_makes_the_best_prediction_that_of_the_tilted_distribution(
    signal: float, noise: float, scale: float
) -> None:
    gain, offset = best_clean(signal, noise)
    slope, height = energy_gradient(signal, noise, scale)
    theirs = best_clean(signal, noise, *tilted(scale))
    np.testing.assert_allclose(gain + noise**2 / signal * slope, theirs[0], atol=1e-10)
    np.testing.assert_allclose(offset + noise**2 / signal * height, theirs[1], atol=1e-10)


@pytest.mark.parametrize(("schedule", "prediction", "name"), ONE_OF_EACH)
@pytest.mark.parametrize(("k", "n"), [(50, 10), (20, 20)])
@pytest.mark.parametrize("scale", SCALES)
def test_exact_guidance_is_the_recursion_of_the_tilted_distribution(
    schedule: str, prediction: str, name: str, k: int, n: int, scale: float
) -> None:
    config, solver = ScheduleConfig(k, schedule, prediction), settings(name, n)

    def clean_of(signal: float, noise: float, *following: float) -> Affine:
        return best_clean(signal, noise, *(tilted(scale) if signal else (MEAN, COVARIANCE)))

    ours, theirs = exact_moments(config, solver, exact(scale)), expected(config, solver, clean_of)
    for own, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(own, their, rtol=0, atol=5e-4 if name == "ddpm" else 2e-5)


@pytest.mark.parametrize(("schedule", "prediction", "name"), ONE_OF_EACH)
@pytest.mark.parametrize("gradient", ["noisy", "through", "held"])
@pytest.mark.parametrize("scaling", ["score", "variance", "noise", "constant"])
def test_every_kind_of_guidance_is_its_own_recursion(
    schedule: str, prediction: str, name: str, gradient: Gradient, scaling: Scaling
) -> None:
    """Of a scale so small that `held` stays in sight of the data; its score form multiplies rounding by 1/α²."""
    config, solver = ScheduleConfig(20, schedule, prediction), settings(name, 10)
    largest = gradient == "held" and scaling == "score"
    scale, relative = (1e-3, 1e-2) if largest else (0.01, 1e-3)
    ours = exact_moments(config, solver, by_value(gradient, scaling, scale))
    theirs = expected(config, solver, moved(gradient, scaling, scale))
    for own, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(own, their, rtol=relative, atol=5e-4 if name == "ddpm" else 5e-5)


def check_sampled(schedule: str, prediction: str, name: str, samples: int) -> None:
    config, solver = ScheduleConfig(50, schedule, prediction), settings(name, 10)
    generator = torch.Generator().manual_seed(0)
    x = exact(1.0)(config, solver, lambda n: torch.randn(n, samples, 1, A, generator=generator)).double().numpy()

    def clean_of(signal: float, noise: float, *following: float) -> Affine:
        return best_clean(signal, noise, *(tilted(1.0) if signal else (MEAN, COVARIANCE)))

    mean, covariance = expected(config, solver, clean_of)
    variance = np.diag(covariance)
    assert (np.abs(x.mean(0) - mean) <= 3 * np.sqrt(variance / samples)).all()
    spread = np.sqrt((np.outer(variance, variance) + covariance**2) / samples)
    assert (np.abs(np.cov(x.T) - covariance) <= 3 * spread).all()


@pytest.mark.parametrize(("schedule", "prediction", "name"), ONE_OF_EACH)
def test_sampled_mean_and_covariance(schedule: str, prediction: str, name: str) -> None:
    check_sampled(schedule, prediction, name, 20_000)


@pytest.mark.full
@pytest.mark.parametrize(("schedule", "prediction", "name"), ONE_OF_EACH)
def test_sampled_mean_and_covariance_of_many(schedule: str, prediction: str, name: str) -> None:
    check_sampled(schedule, prediction, name, 200_000)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++"])
def test_exact_guidance_converges_to_the_tilted_distribution(name: str) -> None:
    mean, covariance = tilted(1.0)
    variance = np.diag(covariance)
    errors = []
    for k in (20, 100, 1000):
        ours = exact_moments(ScheduleConfig(k, "squaredcos_cap_v2", "sample"), settings(name), exact(1.0))
        far = np.abs(ours[0] - mean) / np.sqrt(variance)
        spread = np.abs(ours[1] - covariance) / np.sqrt(np.outer(variance, variance))
        errors.append(max(far.max(), spread.max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.025


class OneNumber:
    """Of x_0 ~ N(0, 1/4) and J(x_0) = -2 (x_0 - 1)², which tilts it to N(1/2, 1/8): the energy of noisy actions."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def clean(self, noisy: Tensor, timestep: int) -> Tensor:
        """E[x_0 | x_t]."""
        signal, noise = self.schedule.level(timestep)
        return noisy * signal / (signal**2 + 4 * noise**2)

    def noisy_at(self, obs: Tensor) -> Callable[[Tensor, int], Tensor]:
        def energy(noisy: Tensor, timestep: int) -> Tensor:
            signal, noise = self.schedule.level(timestep)
            spread = 1 / (4 + (signal / noise) ** 2)
            return (-0.5 * (self.clean(noisy, timestep) - 1) ** 2 / (1 / 4 + spread))[:, 0, 0]

        return energy


@pytest.mark.parametrize(("k", "approximate"), [(20, 0.338), (100, 0.460), (1000, 0.496)])
def test_the_energy_scaled_by_the_variance_falls_short_of_the_mean_that_its_score_finds(
    k: int, approximate: float
) -> None:
    config = ScheduleConfig(k, "squaredcos_cap_v2")
    schedule, steps = NoiseSchedule(config).double(), solver_steps(config, SolverConfig("ddpm"))
    value = OneNumber(schedule)

    def mean(scaling: Scaling) -> float:
        """Samples are affine in the draws, so draws of zero give it."""
        advance = guided(
            ValueGuide(value, 1.0, "noisy", scaling),
            steps,
            schedule,
            lambda t: lambda x: value.clean(x, t),
            obs=torch.zeros(1, 1, 1),
            to_actions=lambda clean: clean,
            allowed=lambda clean: clean,
        )
        draws = torch.zeros(n_draws(steps), 1, 1, 1, dtype=torch.float64)
        return float(solve_guided(steps, advance, draws[0], draws[1:]))

    assert mean("variance") == pytest.approx(approximate, abs=6e-4)
    assert mean("score") == pytest.approx(0.5, abs=6e-4)
