"""Solvers step by step: which timesteps they visit, what each step does, which draws it takes.

What they return for Gaussian data is in test_closed_form.py, what other code returns in test_diffusers.py.
"""

import math

import pytest
import torch
from torch import Tensor

from dprl.diffusion import NoiseSchedule, ScheduleConfig, SolverConfig, Step, n_draws, solve, solver_steps
from dprl.errors import ConfigError

MEAN, STD = 0.3, 0.2
COSINE = ScheduleConfig(10)
FLOW = ScheduleConfig(10, "rectified_flow", "velocity")


def best_clean(config: ScheduleConfig, x: Tensor, t: int) -> Tensor:
    """E[x_0 | x_t] when x_0 ~ N(MEAN, STD²)."""
    signal, noise = (float(table[t]) for table in config.levels())
    return MEAN + signal * STD**2 / (signal**2 * STD**2 + noise**2) * (x - signal * MEAN)


def recursion(config: ScheduleConfig, steps: tuple[Step, ...]) -> tuple[float, float]:
    """Mean and variance of a one-step solver's output, step by step: every step is linear in x."""
    mean, variance = 0.0, 1.0
    for step in steps:

        def clean(x: float, t: int = step.timestep) -> float:
            return float(best_clean(config, torch.tensor(x, dtype=torch.float64), t))

        offset = step.clean * clean(0.0)
        slope = step.noisy + step.clean * clean(1.0) - offset
        mean, variance = offset + slope * mean, slope**2 * variance + step.std**2
    return mean, variance


@pytest.mark.parametrize("steps", [1, 5, 20, 100])
def test_ddpm_output_has_the_mean_and_variance_of_its_recursion(steps: int) -> None:
    config, n = ScheduleConfig(steps), 40_000
    grid = solver_steps(config, SolverConfig())
    draws = torch.randn(n_draws(grid), n, 1, 1, generator=torch.Generator().manual_seed(steps))
    x = solve(grid, lambda x, t: best_clean(config, x, t), draws[0], draws[1:]).flatten()
    mean, variance = recursion(config, grid)
    assert abs(float(x.mean()) - mean) < 3 * (variance / n) ** 0.5 + 1e-4
    assert abs(float(x.var()) - variance) < 3 * variance * (2 / n) ** 0.5 + 1e-5


def test_ddpm_converges_to_the_data() -> None:
    config = ScheduleConfig(1000)
    mean, variance = recursion(config, solver_steps(config, SolverConfig()))
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert variance == pytest.approx(STD**2, rel=0.05)


NOISY = ["ddpm", "ddim", "sde-dpmsolver++"]


@pytest.mark.parametrize("solver", NOISY)
def test_temperature_zero_takes_no_noise_but_the_first(solver: str) -> None:
    steps = solver_steps(COSINE, SolverConfig(solver, 5, 1.0 if solver == "ddim" else 0.0))
    draws = torch.randn(5, 3, 2, 1, generator=torch.Generator().manual_seed(0))
    other = torch.cat([draws[:1], torch.randn(4, 3, 2, 1, generator=torch.Generator().manual_seed(1))])

    def run(noise: Tensor, temperature: float) -> Tensor:
        return solve(steps, lambda x, t: best_clean(COSINE, x, t), noise[0], noise[1:], temperature)

    assert torch.equal(run(draws, 0.0), run(other, 0.0))
    assert not torch.equal(run(draws, 1.0), run(other, 1.0))
    scaled = torch.cat([draws[:1], 0.5 * draws[1:]])
    torch.testing.assert_close(run(draws, 0.5), run(scaled, 1.0))


@pytest.mark.parametrize(
    ("config", "solver", "expected"),
    [
        (COSINE, SolverConfig(), 10),
        (COSINE, SolverConfig("ddpm", 3), 3),
        (COSINE, SolverConfig("ddpm", 1), 1),
        (COSINE, SolverConfig("ddim"), 1),
        (COSINE, SolverConfig("ddim", 4, 0.1), 4),
        (COSINE, SolverConfig("ddim", 4, 1.0), 4),
        (COSINE, SolverConfig("dpmsolver++", 4), 1),
        (COSINE, SolverConfig("sde-dpmsolver++", 4), 4),
        (FLOW, SolverConfig(), 1),
        (FLOW, SolverConfig("euler", 4), 1),
    ],
    ids=str,
)
def test_every_draw_is_used(config: ScheduleConfig, solver: SolverConfig, expected: int) -> None:
    """The last step has no noise, and deterministic solvers draw once."""
    steps = solver_steps(config, solver)
    assert n_draws(steps) == expected
    draws = torch.randn(expected, 2, 2, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    solve(steps, lambda x, t: 0.5 * x.sin(), draws[0], draws[1:]).sum().backward()
    assert draws.grad.ne(0).all()


# ------------------------------------------------------------------------------------------------------------ grids

GRIDS = {
    ("ddpm", None, 10): [9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
    ("ddpm", None, 4): [6, 4, 2, 0],
    ("ddim", None, 3): [6, 3, 0],
    ("ddim", None, 1): [0],
    ("ddim", "leading", 5): [8, 6, 4, 2, 0],
    ("ddim", "trailing", 5): [9, 7, 5, 3, 1],
    ("ddim", "trailing", 4): [9, 7, 4, 1],
    ("ddim", "trailing", 1): [9],
    ("ddim", "linspace", 4): [9, 6, 3, 0],
    ("ddim", "linspace", 3): [9, 4, 0],
    ("ddim", "linspace", 1): [0],
    ("dpmsolver++", None, 3): [9, 6, 3],
    ("dpmsolver++", None, 1): [9],
    ("dpmsolver++", None, 10): [9, 8, 7, 6, 5, 4, 3, 2, 1],
    ("sde-dpmsolver++", "trailing", 5): [9, 7, 5, 3, 1],
    ("sde-dpmsolver++", "leading", 5): [5, 4, 3, 2, 1],
    ("dpmsolver++", "leading", 3): [6, 4, 2],
    ("euler", None, 5): [9, 7, 5, 3, 1],
    ("euler", None, 10): [9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
    ("euler", "linspace", 4): [9, 6, 3, 0],
}


@pytest.mark.parametrize(("solver", "spacing", "n"), GRIDS, ids=str)
def test_visited_timesteps(solver: str, spacing: str | None, n: int) -> None:
    """As diffusers' tables, a half rounded to the even number; a timestep that is met twice is visited once."""
    steps = solver_steps(FLOW if solver == "euler" else COSINE, SolverConfig(solver, n, timestep_spacing=spacing))
    assert [step.timestep for step in steps] == GRIDS[solver, spacing, n]


# ----------------------------------------------------------------------------------------------------- coefficients


def levels(config: ScheduleConfig, t: int) -> tuple[float, float]:
    signal, noise = config.levels()
    return float(signal[t]), float(noise[t])


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_ddim_by_hand(eta: float) -> None:
    """arXiv:2010.02502 eq. 12 with σ of eq. 16, from timestep 6 to 4."""
    step = solver_steps(COSINE, SolverConfig("ddim", 4, eta))[0]
    assert step.timestep == 6
    a, a_next = levels(COSINE, 6)[0] ** 2, levels(COSINE, 4)[0] ** 2
    sigma = eta * math.sqrt((1 - a_next) / (1 - a)) * math.sqrt(1 - a / a_next)
    x, clean = 0.7, -0.2
    epsilon = (x - math.sqrt(a) * clean) / math.sqrt(1 - a)
    expected = math.sqrt(a_next) * clean + math.sqrt(1 - a_next - sigma**2) * epsilon
    assert step.noisy * x + step.clean * clean == pytest.approx(expected, rel=1e-5)
    assert step.std == pytest.approx(sigma, rel=1e-5)


@pytest.mark.parametrize("n", [1, 3, 10])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_with_eta_one_is_ddpm(n: int, spacing: str) -> None:
    """But for the rounding, which is each one's own: it follows the code that checkpoints come from."""
    ddim = solver_steps(COSINE, SolverConfig("ddim", n, 1.0, spacing))
    ddpm = solver_steps(COSINE, SolverConfig("ddpm", n, timestep_spacing=spacing))
    assert len(ddim) == len(ddpm)
    for one, other in zip(ddim, ddpm, strict=True):
        assert tuple(one) == pytest.approx(tuple(other), abs=1e-5)


@pytest.mark.parametrize("stochastic", [False, True])
def test_dpmsolver_by_hand(stochastic: bool) -> None:
    """arXiv:2211.01095 algorithm 2 (2M) over timesteps 9, 6, 3; the stochastic form halves what x and x̂_0 keep of h."""
    name = "sde-dpmsolver++" if stochastic else "dpmsolver++"
    first, second, last = solver_steps(COSINE, SolverConfig(name, 3))
    (s0, n0), (s1, n1), (s2, n2) = (levels(COSINE, t) for t in (9, 6, 3))
    lambdas = [math.log(s / n) for s, n in ((s0, n0), (s1, n1), (s2, n2))]
    h1, h2 = lambdas[1] - lambdas[0], lambdas[2] - lambdas[1]
    m0, m1, x = 0.4, -0.3, 0.9  # predictions of x_0 at timesteps 9 and 6, and x there
    extrapolated = (1 + h2 / (2 * h1)) * m1 - h2 / (2 * h1) * m0
    for step, h, s, n, n_before, data in ((first, h1, s1, n1, n0, m0), (second, h2, s2, n2, n1, extrapolated)):
        if stochastic:
            expected = n / n_before * math.exp(-h) * x + s * (1 - math.exp(-2 * h)) * data
            assert step.std == pytest.approx(n * math.sqrt(1 - math.exp(-2 * h)))
        else:
            expected = n / n_before * x - s * math.expm1(-h) * data
            assert step.std == 0
        moved = step.noisy * x + (step.clean * m0 if step is first else step.clean * m1 + step.previous * m0)
        assert moved == pytest.approx(expected, rel=1e-6)
    assert first.previous == 0
    assert last == Step(3, 0.0, 1.0, 0.0, 0.0)


def test_euler_by_hand() -> None:
    """x <- x + (n - n') velocity, where the network's velocity is x_0 - ε."""
    schedule = NoiseSchedule(FLOW)
    x, velocity = torch.randn(2, 3, 2, 1, generator=torch.Generator().manual_seed(0))
    steps = solver_steps(FLOW, SolverConfig("euler", 5))
    noises = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    expected = x
    for noise, following, step in zip(noises[:-1], noises[1:], steps, strict=True):
        expected = expected + (noise - following) * velocity

        def predict(x: Tensor, t: int) -> Tensor:
            return schedule.predict_clean(x, velocity, t, None)

        x = solve((step,), predict, x, torch.zeros(0, 3, 2, 1))
        torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("solver", ["dpmsolver++", "sde-dpmsolver++"])
def test_the_last_steps_alone_know_of_no_step_before(solver: str) -> None:
    """A warm start goes on from the middle: its first step is of first order."""
    steps = solver_steps(COSINE, SolverConfig(solver, 5))
    (s, n), (s_next, n_next) = levels(COSINE, steps[-2].timestep), levels(COSINE, steps[-1].timestep)
    h = math.log(s_next / n_next) - math.log(s / n)
    decay = math.exp(-2 * h) if solver.startswith("sde") else math.exp(-h)
    x, clean = torch.tensor([[[0.9]]], dtype=torch.float64), torch.tensor([[[-0.3]]], dtype=torch.float64)
    moved = solve(steps[-2:-1], lambda x, t: clean, x, torch.zeros(1, 1, 1, 1))
    noisy = n_next / n * (math.exp(-h) if solver.startswith("sde") else 1)
    assert float(moved) == pytest.approx(noisy * 0.9 + s_next * (1 - decay) * -0.3, rel=1e-6)


def test_networks_see_every_timestep_once_in_order() -> None:
    seen: list[int] = []

    def predict(x: Tensor, t: int) -> Tensor:
        seen.append(t)
        return x

    steps = solver_steps(COSINE, SolverConfig("ddim", 4))
    solve(steps, predict, torch.zeros(1, 1, 1), torch.zeros(0, 1, 1, 1))
    assert seen == [6, 4, 2, 0]


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++"])
def test_more_steps_than_training_timesteps_are_refused(solver: str) -> None:
    with pytest.raises(ConfigError, match=r"num_inference_steps = 6: must be at most .* 5"):
        solver_steps(ScheduleConfig(5), SolverConfig(solver, 6))


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++"])
def test_a_flow_has_a_solver_of_its_own(solver: str) -> None:
    with pytest.raises(ConfigError, match=r"must be euler for a policy with the schedule rectified_flow"):
        solver_steps(FLOW, SolverConfig(solver))
    with pytest.raises(ConfigError, match=r"solver = 'euler': must be ddpm, ddim"):
        solver_steps(COSINE, SolverConfig("euler"))


def test_what_is_not_asked_for_is_the_policys_own() -> None:
    own = SolverConfig("ddim", 5, 0.5, "trailing")
    assert SolverConfig().over(own, COSINE) == own
    assert SolverConfig(num_inference_steps=3).over(own, COSINE) == SolverConfig("ddim", 3, 0.5, "trailing")
    assert SolverConfig(timestep_spacing="leading").over(own, COSINE) == SolverConfig("ddim", 5, 0.5, "leading")
    assert SolverConfig("ddim").over(own, COSINE) == SolverConfig("ddim", 5, 0.0, "trailing")
    assert SolverConfig("dpmsolver++").over(own, COSINE) == SolverConfig("dpmsolver++")
    assert SolverConfig("ddpm", 4).over(SolverConfig(), COSINE) == SolverConfig("ddpm", 4)


def test_naming_the_default_solver_changes_nothing() -> None:
    own = SolverConfig(num_inference_steps=5)
    assert solver_steps(COSINE, SolverConfig("ddpm").over(own, COSINE)) == solver_steps(COSINE, own)
