"""Solvers against closed forms.

For data x_0 ~ N(MEAN, COVARIANCE) the best prediction of x_0 is linear in x_t, and so is every solver's step. What a
solver returns is then Gaussian, and mean and covariance follow step by step. They are derived here from the papers'
formulas, in float64 and with no code of the library's: DDPM (arXiv:2006.11239 eq. 7), DDIM (arXiv:2010.02502 eq. 12 and
16), DPM-Solver++ 2M and its SDE form (arXiv:2211.01095), Euler on a rectified flow (arXiv:2209.03003).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from dprl.diffusion import NoiseSchedule, ScheduleConfig, SolverConfig, n_draws, solve, solver_steps

Array = npt.NDArray[np.float64]

A = 3
MEAN = np.array([0.3, -0.2, 0.1])
COVARIANCE = np.array([[0.09, 0.03, -0.02], [0.03, 0.04, 0.01], [-0.02, 0.01, 0.06]])
EYE, ZERO = np.eye(A), np.zeros((A, A))

SCHEDULES = ("squaredcos_cap_v2", "linear", "scaled_linear", "vp")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SOLVERS = {
    "ddpm": SolverConfig("ddpm"),
    "ddim": SolverConfig("ddim"),
    "ddim-eta-0.5": SolverConfig("ddim", eta=0.5),
    "ddim-eta-1": SolverConfig("ddim", eta=1.0),
    "dpmsolver++": SolverConfig("dpmsolver++"),
    "sde-dpmsolver++": SolverConfig("sde-dpmsolver++"),
}
FLOW = ("rectified_flow", "velocity", "euler")
DIFFUSION_CASES = [(s, p, name) for s in SCHEDULES for p in PREDICTIONS for name in SOLVERS]
CASES = [*DIFFUSION_CASES, FLOW]
SEED = 0

# ----------------------------------------------------------------------------------------------- the papers' formulas


@cache
def alphas_bar(schedule: str, k: int) -> Array:
    """ᾱ (K,) of a diffusion schedule, from its definition."""
    if schedule == "squaredcos_cap_v2":  # arXiv:2102.09672 eq. 17, β at most 0.999

        def f(t: float) -> float:
            return math.cos((t / k + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = np.array([min(1 - f(t + 1) / f(t), 0.999) for t in range(k)])
    elif schedule == "vp":  # β(t) from 0.1 to 10 over t in [0, 1], integrated over each of K parts
        edges = np.linspace(0, 1, k + 1)
        integral = 0.1 * edges + (10 - 0.1) * edges**2 / 2
        betas = 1 - np.exp(-np.diff(integral))
    elif schedule == "linear":
        betas = np.linspace(1e-4, 0.02, k)
    else:
        betas = np.linspace(1e-4**0.5, 0.02**0.5, k) ** 2
    product: Array = np.cumprod(1 - betas)
    return product


def signal_and_noise(schedule: str, k: int, t: int) -> tuple[float, float]:
    """Of x_t = signal x_0 + noise ε; t = -1 is the data."""
    if t < 0:
        return 1.0, 0.0
    if schedule == "rectified_flow":
        return 1 - (t + 1) / k, (t + 1) / k
    alpha_bar = float(alphas_bar(schedule, k)[t])
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


Affine = tuple[Array, Array]
"""Gain (A, A) and offset (A,)."""


def best_clean(signal: float, noise: float, mean: Array = MEAN, covariance: Array = COVARIANCE) -> Affine:
    """E[x_0 | x_t] = gain x_t + offset, Bayes' rule for Gaussians."""
    gain: Array = signal * covariance @ np.linalg.inv(signal**2 * covariance + noise**2 * EYE)
    return gain, mean - signal * gain @ mean


CleanOf = Callable[[float, float, float, float], Affine]
"""x̂_0 as a function of x_t; of signal and noise at a step and after it."""


def unguided(signal: float, noise: float, signal_next: float, noise_next: float) -> Affine:
    return best_clean(signal, noise)


@dataclass
class Moments:
    """Of the state (x_t, x̂_0 of the step before), both (A,)."""

    mean: Array
    covariance: Array

    def step(self, clean: Affine, noisy: float, new: float, before: float, std: float) -> None:
        """x' = noisy x + new x̂_0 + before x̂_0 of the step before + std z, where x̂_0 = gain x + offset."""
        gain, offset = clean
        matrix = np.block([[noisy * EYE + new * gain, before * EYE], [gain, ZERO]])
        self.mean = matrix @ self.mean + np.concatenate([new * offset, offset])
        added = np.zeros((2 * A, 2 * A))
        added[:A, :A] = std**2 * EYE
        self.covariance = matrix @ self.covariance @ matrix.T + added


def grid(solver: str, n: int, k: int) -> list[int]:
    """The visited timesteps of the default spacing, noisiest first, and -1."""
    if solver == "euler":  # trailing
        visited = np.round(k - np.arange(n) * k / n) - 1
    elif solver.endswith("dpmsolver++"):  # n of n + 1 points of a linspace
        visited = np.round(np.linspace(0, k - 1, n + 1))[1:]
    else:  # leading
        visited = np.arange(n) * (k // n)
    return [*sorted({int(t) for t in visited}, reverse=True), -1]


def closed_form(
    schedule: str, k: int, n: int, solver: str, eta: float = 0.0, clean_of: CleanOf = unguided
) -> tuple[Array, Array]:
    """Mean (A,) and covariance (A, A) of what `n` steps make of N(0, I)."""
    moments = Moments(np.zeros(2 * A), np.block([[EYE, ZERO], [ZERO, ZERO]]))
    h_before = 0.0
    for t, following in pairwise(grid(solver, n, k)):
        (s, noise), (s_next, noise_next) = signal_and_noise(schedule, k, t), signal_and_noise(schedule, k, following)
        clean = clean_of(s, noise, s_next, noise_next)
        if solver == "ddpm":
            alpha = s**2 / s_next**2
            new = s_next * (1 - alpha) / noise**2
            noisy = math.sqrt(alpha) * noise_next**2 / noise**2
            moments.step(clean, noisy, new, 0.0, math.sqrt(noise_next**2 / noise**2 * (1 - alpha)))
        elif solver == "ddim":
            sigma = eta * noise_next / noise * math.sqrt(1 - s**2 / s_next**2)
            direction = math.sqrt(max(noise_next**2 - sigma**2, 0.0))
            moments.step(clean, direction / noise, s_next - direction * s / noise, 0.0, sigma)
        elif solver == "euler":  # velocity = x̂_0 - ε̂
            dt = noise - noise_next
            moments.step(clean, 1 - dt / noise, dt * (1 + s / noise), 0.0, 0.0)
        elif following < 0:  # λ is infinite there: first order
            moments.step(clean, 0.0, 1.0, 0.0, 0.0)
        else:
            h = math.log(s_next / noise_next) - math.log(s / noise)
            half_over_r = h / (2 * h_before) if h_before else 0.0
            stochastic = solver.startswith("sde")
            scale = s_next * -math.expm1(-2 * h if stochastic else -h)
            noisy = noise_next / noise * (math.exp(-h) if stochastic else 1.0)
            std = noise_next * math.sqrt(-math.expm1(-2 * h)) if stochastic else 0.0
            moments.step(clean, noisy, scale * (1 + half_over_r), -scale * half_over_r, std)
            h_before = h
    return moments.mean[:A], moments.covariance[:A, :A]


# ---------------------------------------------------------------------------------------------- the library's solvers


def network(schedule: str, k: int, prediction: str) -> Callable[[Tensor, int], Tensor]:
    """What a perfectly trained network returns for x (B, 1, A) at timestep t."""

    def predict(x: Tensor, t: int) -> Tensor:
        s, n = signal_and_noise(schedule, k, t)
        gain, offset = (torch.from_numpy(part).to(x.dtype) for part in best_clean(s, n))
        clean = x @ gain.T + offset
        epsilon = (x - s * clean) / n
        velocities = {"v_prediction": s * epsilon - n * clean, "velocity": clean - epsilon}
        return ({"sample": clean, "epsilon": epsilon} | velocities)[prediction]

    return predict


Run = Callable[[ScheduleConfig, SolverConfig, Callable[[int], Tensor]], Tensor]


def run(config: ScheduleConfig, solver: SolverConfig, draws: Callable[[int], Tensor]) -> Tensor:
    """What the solver makes of ``draws(n)``, all the n draws it takes (n, B, 1, A): (B, A)."""
    steps = solver_steps(config, solver)
    all_draws = draws(n_draws(steps))
    schedule = NoiseSchedule(config).to(all_draws.dtype)
    predict = network(config.schedule, config.num_train_timesteps, config.prediction_type)

    def predict_clean(x: Tensor, t: int) -> Tensor:
        return schedule.predict_clean(x, predict(x, t), t, clip=None)

    return solve(steps, predict_clean, all_draws[0], all_draws[1:])[:, 0]


def exact_moments(config: ScheduleConfig, solver: SolverConfig, run: Run = run) -> tuple[Array, Array]:
    """Mean and covariance without sampling: the output is affine in the draws, so zero and unit draws tell it all."""

    def zero_and_units(n: int) -> Tensor:
        units = torch.eye(n * A, dtype=torch.float64).view(n * A, n, 1, A).transpose(0, 1)
        return torch.cat([torch.zeros(n, 1, 1, A, dtype=torch.float64), units], dim=1)

    offset, *columns = run(config, solver, zero_and_units).numpy()
    matrix = np.stack(columns) - offset
    return offset, matrix.T @ matrix


def settings(name: str, n: int | None = None) -> SolverConfig:
    known = SOLVERS.get(name, SolverConfig("euler"))
    return SolverConfig(known.solver, n, known.eta)


def expected(config: ScheduleConfig, solver: SolverConfig) -> tuple[Array, Array]:
    k = config.num_train_timesteps
    return closed_form(config.schedule, k, solver.num_inference_steps or k, str(solver.solver), solver.eta)


@pytest.mark.parametrize(("schedule", "prediction", "name"), CASES, ids=str)
@pytest.mark.parametrize(("k", "n"), [(50, 1), (50, 2), (50, 7), (50, 10), (50, 50), (20, 20), (100, 9)])
def test_mean_and_covariance_are_exactly_those_of_the_recursion(
    schedule: str, prediction: str, name: str, k: int, n: int
) -> None:
    """But for float32: ddpm takes β and 1 - ᾱ from two tables, whose digits differ where β is small."""
    config, solver = ScheduleConfig(k, schedule, prediction), settings(name, n)
    for ours, theirs in zip(exact_moments(config, solver), expected(config, solver), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-4 if name == "ddpm" else 5e-6)


def check_sampled(schedule: str, prediction: str, name: str, k: int, n: int, samples: int, seed: int) -> float:
    """Every entry of mean and covariance is within three standard errors; return the farthest."""
    config, solver = ScheduleConfig(k, schedule, prediction), settings(name, n)
    generator = torch.Generator().manual_seed(seed)
    x = run(config, solver, lambda n: torch.randn(n, samples, 1, A, generator=generator)).double().numpy()
    mean, covariance = expected(config, solver)
    variance = np.diag(covariance)
    mean_error = (x.mean(0) - mean) / np.sqrt(variance / samples)
    spread = np.sqrt((np.outer(variance, variance) + covariance**2) / samples)
    covariance_error = (np.cov(x.T) - covariance) / spread
    farthest = max(float(np.abs(mean_error).max()), float(np.abs(covariance_error).max()))
    assert farthest <= 3, (mean_error, covariance_error)
    return farthest


@pytest.mark.parametrize("n", [10, 50])
@pytest.mark.parametrize(("schedule", "prediction", "name"), CASES, ids=str)
def test_sampled_mean_and_covariance(schedule: str, prediction: str, name: str, n: int) -> None:
    check_sampled(schedule, prediction, name, 50, n, samples=20_000, seed=SEED)


@pytest.mark.full
@pytest.mark.parametrize(("k", "n"), [(50, 3), (50, 25), (100, 20)])
@pytest.mark.parametrize(("schedule", "prediction", "name"), CASES, ids=str)
def test_sampled_mean_and_covariance_of_many(schedule: str, prediction: str, name: str, k: int, n: int) -> None:
    check_sampled(schedule, prediction, name, k, n, samples=200_000, seed=SEED)


# -------------------------------------------------------------------------------------------------------- convergence


def distance(moments: tuple[Array, Array]) -> float:
    """How far from the data: the largest error of mean and covariance, over the data's standard deviation, variance."""
    variance = np.diag(COVARIANCE)
    mean_error = np.abs(moments[0] - MEAN) / np.sqrt(variance)
    covariance_error = np.abs(moments[1] - COVARIANCE) / np.sqrt(np.outer(variance, variance))
    return float(max(mean_error.max(), covariance_error.max()))


def error(schedule: str, k: int, solver: str) -> float:
    """How far from the data the library's solver ends that visits all of the k timesteps."""
    prediction = "velocity" if schedule == "rectified_flow" else "sample"
    return distance(exact_moments(ScheduleConfig(k, schedule, prediction), settings(solver)))


CONVERGES = ["ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++"]


@pytest.mark.parametrize("solver", CONVERGES)
def test_it_converges_to_the_data_with_the_cosine_schedule(solver: str) -> None:
    errors = [error("squaredcos_cap_v2", k, solver) for k in (20, 100, 1000)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_euler_converges_to_the_data() -> None:
    errors = [error("rectified_flow", k, "euler") for k in (20, 100, 1000)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


@pytest.mark.parametrize("solver", CONVERGES)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_it_converges_with_linear_betas_of_a_thousand_timesteps(schedule: str, solver: str) -> None:
    assert alphas_bar(schedule, 1000)[-1] < 5e-3
    assert error(schedule, 1000, solver) < 0.05


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_it_does_not_converge_with_linear_betas_of_a_hundred_timesteps(schedule: str) -> None:
    """Diffusers' β do not depend on K: at K = 100 the noisiest level keeps much of the signal, and N(0, I) is off it.

    Deterministic solvers carry that to the end. Stochastic ones forget where they came from, nearly.
    """
    assert alphas_bar(schedule, 100)[-1] > 0.35
    for solver in ("ddim", "dpmsolver++"):
        assert error(schedule, 100, solver) > 0.4
    for solver in ("ddpm", "sde-dpmsolver++"):
        assert 0.03 < error(schedule, 100, solver) < 0.1


@pytest.mark.parametrize("name", ["ddpm", "dpmsolver++"])
def test_a_thousand_steps_of_the_library_converge(name: str) -> None:
    check_sampled("squaredcos_cap_v2", "sample", name, 1000, 1000, samples=10_000, seed=SEED)
    config = ScheduleConfig(1000, "squaredcos_cap_v2", "sample")
    assert distance(expected(config, settings(name))) < 0.02
