"""The schedules' tables against their definitions and invariants."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dprl.diffusion import NoiseSchedule, ScheduleConfig, SolverConfig, solve, solver_steps
from dprl.errors import ConfigError

DIFFUSION = ("squaredcos_cap_v2", "linear", "scaled_linear", "vp")
PREDICTIONS = ("epsilon", "sample", "v_prediction")

timesteps = st.integers(1, 200)
beta_ranges = st.tuples(st.floats(1e-5, 0.05), st.floats(1.0, 20.0))
"""First β, and the last one over it."""


@st.composite
def schedules(draw: st.DrawFn, flows: bool = True) -> ScheduleConfig:
    """Any schedule with any prediction type that goes with it."""
    start, ratio = draw(beta_ranges)
    schedule = draw(st.sampled_from((*DIFFUSION, "rectified_flow") if flows else DIFFUSION))
    prediction = "velocity" if schedule == "rectified_flow" else draw(st.sampled_from(PREDICTIONS))
    return ScheduleConfig(draw(timesteps), schedule, prediction, start, min(start * ratio, 0.5))


@given(schedules())
@settings(max_examples=100, deadline=None)
def test_invariants_of_the_levels(config: ScheduleConfig) -> None:
    signal, noise = config.levels()
    assert signal.shape == noise.shape == (config.num_train_timesteps,)
    assert (signal.diff() < 0).all()
    assert (noise.diff() >= 0).all()
    assert (signal <= 1).all()
    assert (noise > 0).all()
    if config.is_flow:
        torch.testing.assert_close(signal + noise, torch.ones_like(signal))
        assert (signal[-1], noise[-1]) == (0, 1), "the noisiest level is noise alone"
    else:
        torch.testing.assert_close(signal**2 + noise**2, torch.ones_like(signal))
        assert (signal > 0).all()
        betas, alphas_bar = config.betas(), signal**2
        assert ((betas > 0) & (betas < 1)).all()
        assert (alphas_bar.diff() < 0).all()
        steps = alphas_bar / torch.cat([torch.ones(1, dtype=torch.float64), alphas_bar[:-1]])
        torch.testing.assert_close(steps, 1 - betas.double(), rtol=1e-5, atol=1e-6)


@given(schedules(flows=False))
@settings(max_examples=60, deadline=None)
def test_posterior_variance_is_positive_and_at_most_beta(config: ScheduleConfig) -> None:
    betas = config.betas().tolist()
    *steps, last = solver_steps(config, SolverConfig("ddpm"))
    for step in steps:
        assert 0 < step.std**2 <= betas[step.timestep] * (1 + 1e-5)
    assert last.std == 0
    assert (last.noisy, last.timestep) == (0, 0)


@given(schedules(), st.integers(0, 2**31), st.data())
@settings(max_examples=100, deadline=None)
def test_predict_clean_is_the_inverse_of_target(config: ScheduleConfig, seed: int, data: st.DataObject) -> None:
    """Whatever is predicted. In float32 an ε-prediction loses the last bits over the signal."""
    schedule = NoiseSchedule(config)
    t = data.draw(st.integers(0, config.num_train_timesteps - 1))
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.rand(3, 2, 2, generator=generator) * 2 - 1, torch.randn(3, 2, 2, generator=generator)
    noisy = schedule.add_noise(clean, noise, torch.full((3,), t))
    target = schedule.target(clean, noise, torch.full((3,), t))
    largest = float(noise.abs().max()) + 1
    tolerance = 1e-6 * largest / (float(schedule.signal[t]) if config.prediction_type == "epsilon" else 1)
    back = schedule.predict_clean(noisy, target, t, None)
    torch.testing.assert_close(back, clean, rtol=0, atol=tolerance)


DETERMINISTIC = {
    "ddim": (*((s, p) for s in DIFFUSION for p in PREDICTIONS),),
    "dpmsolver++": (*((s, p) for s in DIFFUSION for p in PREDICTIONS),),
    "euler": (("rectified_flow", "velocity"),),
}


@given(st.sampled_from(sorted(DETERMINISTIC)), st.data(), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_a_deterministic_solver_stays_on_its_ray(solver: str, data: st.DataObject, seed: int) -> None:
    """With a perfect x̂_0, signal x_0 + noise ε becomes the next level's signal x_0 + noise ε, and at last x_0."""
    name, prediction = data.draw(st.sampled_from(DETERMINISTIC[solver]))
    config = ScheduleConfig(data.draw(timesteps), name, prediction)
    n = data.draw(st.integers(1, config.num_train_timesteps))
    spacing = data.draw(st.sampled_from([None, "leading", "trailing", "linspace"]))
    assume(not (solver.endswith("dpmsolver++") and spacing == "leading" and n == config.num_train_timesteps))
    steps = solver_steps(config, SolverConfig(solver, n, timestep_spacing=spacing))
    signal, noise = config.levels()
    clean, epsilon = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    nothing = torch.zeros(0, 3, 2, 2)
    for skipped in {0, len(steps) // 2, len(steps) - 1}:  # and so does what a warm start leaves of it
        part = steps[skipped:]
        following = [(float(signal[s.timestep]), float(noise[s.timestep])) for s in part[1:]] + [(1.0, 0.0)]
        x = signal[part[0].timestep] * clean + noise[part[0].timestep] * epsilon
        for length, (s, n_) in enumerate(following, start=1):
            moved = solve(part[:length], lambda x, t: clean, x, nothing)
            torch.testing.assert_close(moved, s * clean + n_ * epsilon, rtol=1e-6, atol=1e-6)


@given(schedules(flows=False), st.floats(0, 1), st.data(), st.sampled_from(["ddpm", "ddim", "sde-dpmsolver++"]))
@settings(max_examples=100, deadline=None)
def test_a_stochastic_solver_keeps_every_levels_distribution(
    config: ScheduleConfig, eta: float, data: st.DataObject, solver: str
) -> None:
    """With a perfect x̂_0, x given x_0 is N(signal x_0, noise²) at every visited level, of which float32 products ᾱ know
    noise² to 1e-7."""
    n = data.draw(st.integers(1, config.num_train_timesteps))
    spacing = data.draw(st.sampled_from([None, "leading", "trailing", "linspace"]))
    assume(not (solver.endswith("dpmsolver++") and spacing == "leading" and n == config.num_train_timesteps))
    steps = solver_steps(config, SolverConfig(solver, n, eta if solver == "ddim" else 0.0, spacing))
    signal, noise = (table.tolist() for table in config.levels())
    for step, following in pairwise([*steps, None]):
        s, n_ = (1.0, 0.0) if following is None else (signal[following.timestep], noise[following.timestep])
        mean = step.noisy * signal[step.timestep] + step.clean + step.previous
        tolerance = 1e-6 + 1e-7 / noise[step.timestep] ** 2
        assert mean == pytest.approx(s, abs=tolerance)
        assert (step.noisy * noise[step.timestep]) ** 2 + step.std**2 == pytest.approx(n_**2, abs=tolerance)


# ---------------------------------------------------------------------------------------------------- known values


def test_cosine_betas_by_hand() -> None:
    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = ScheduleConfig(4).betas()
    assert betas[0] == pytest.approx(1 - f(0.25) / f(0))
    assert betas[2] == pytest.approx(1 - f(0.75) / f(0.5))
    assert betas[3] == pytest.approx(0.999)


def test_linear_betas_by_hand() -> None:
    assert ScheduleConfig(3, "linear", beta_start=0.1, beta_end=0.3).betas().tolist() == pytest.approx([0.1, 0.2, 0.3])
    scaled = ScheduleConfig(3, "scaled_linear", beta_start=0.04, beta_end=0.16).betas().tolist()
    assert scaled == pytest.approx([0.2**2, 0.3**2, 0.4**2])


def test_levels_of_the_flow_by_hand() -> None:
    signal, noise = ScheduleConfig(4, "rectified_flow", "velocity").levels()
    assert (signal.tolist(), noise.tolist()) == ([0.75, 0.5, 0.25, 0], [0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("epsilon", lambda x, e, s, n: e),
        ("sample", lambda x, e, s, n: x),
        ("v_prediction", lambda x, e, s, n: s * e - n * x),
    ],
    ids=PREDICTIONS,
)
def test_targets_by_their_definitions(prediction: str, expected: object) -> None:
    schedule = NoiseSchedule(ScheduleConfig(20, prediction_type=prediction))
    clean, noise = torch.randn(2, 20, 3, 2, generator=torch.Generator().manual_seed(0))
    alphas_bar = torch.cumprod(1 - schedule.config.betas(), 0)
    s, n = (x.sqrt().float()[:, None, None] for x in (alphas_bar, 1 - alphas_bar))
    t = torch.arange(20)
    torch.testing.assert_close(schedule.target(clean, noise, t), expected(clean, noise, s, n), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(schedule.add_noise(clean, noise, t), s * clean + n * noise, rtol=1e-4, atol=1e-4)


def test_velocity_is_the_flows_derivative_towards_the_data() -> None:
    schedule = NoiseSchedule(ScheduleConfig(10, "rectified_flow", "velocity"))
    clean, noise = torch.randn(2, 10, 3, 2, generator=torch.Generator().manual_seed(0))
    t = torch.arange(10)
    velocity = schedule.target(clean, noise, t)
    moved = schedule.add_noise(clean, noise, t) + 0.1 * velocity
    torch.testing.assert_close(moved[1:], schedule.add_noise(clean[1:], noise[1:], t[:-1]))
    torch.testing.assert_close(moved[0], clean[0])


def test_predicting_the_clean_action_undoes_the_noising() -> None:
    schedule = NoiseSchedule(ScheduleConfig(20))
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.rand(20, 3, 2, generator=generator) * 2 - 1, torch.randn(20, 3, 2, generator=generator)
    t = torch.arange(20)
    noisy = schedule.add_noise(clean, noise, t)
    back = schedule.predict_clean(noisy, noise, t, None)
    torch.testing.assert_close(back[:19], clean[:19], atol=1e-4, rtol=1e-4)  # at t = 19 almost no signal is left
    assert schedule.predict_clean(noisy, -noise, t, 1.0).abs().max() <= 1
    assert schedule.predict_clean(noisy, -noise, t, 0.5).abs().max() == 0.5


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "velocity"])
def test_one_timestep_for_all_equals_a_batch_of_it(prediction: str) -> None:
    name = "rectified_flow" if prediction == "velocity" else "squaredcos_cap_v2"
    schedule = NoiseSchedule(ScheduleConfig(10, name, prediction))
    x, clean = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(0))
    for t in range(10):
        batch = torch.full((5,), t)
        for clip in (1.0, None):
            one, many = schedule.predict_clean(x, clean, t, clip), schedule.predict_clean(x, clean, batch, clip)
            torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-5)


def test_posterior_is_bayes_rule() -> None:
    """q(x_{t-1} | x_t, x_0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add."""
    config = ScheduleConfig(20)
    betas = config.betas().tolist()
    alphas_bar = [math.prod(1 - beta for beta in betas[: t + 1]) for t in range(20)]
    for step in solver_steps(config, SolverConfig("ddpm"))[:-1]:
        beta, previous = betas[step.timestep], alphas_bar[step.timestep - 1]
        precision = (1 - beta) / beta + 1 / (1 - previous)
        assert step.noisy == pytest.approx(math.sqrt(1 - beta) / beta / precision, rel=1e-4)
        assert step.clean == pytest.approx(math.sqrt(previous) / (1 - previous) / precision, rel=1e-4)
        assert step.std**2 == pytest.approx(1 / precision, rel=1e-4)
        assert step.previous == 0


def test_tables_are_no_part_of_a_checkpoint() -> None:
    assert NoiseSchedule(ScheduleConfig()).state_dict() == {}


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_flow_predicts_its_velocity_only(prediction: str) -> None:
    with pytest.raises(ConfigError, match=rf"prediction_type = '{prediction}': must be velocity"):
        ScheduleConfig(schedule="rectified_flow", prediction_type=prediction)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("beta_start", {"beta_start": 1e-9, "beta_end": 1e-9}),
        ("beta_end", {"num_train_timesteps": 1000, "beta_end": 0.3}),
    ],
)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_betas_that_leave_no_noise_or_no_signal_are_refused(
    schedule: str, field: str, changes: dict[str, float]
) -> None:
    with pytest.raises(ConfigError, match=rf"{field} = {changes[field]}: "):
        ScheduleConfig(**{"num_train_timesteps": 10, "schedule": schedule, **changes})
