"""Whole trajectories equal those of the diffusers package, to 1e-5 of a tensor's largest number.

Both see the same fixed nonlinear "network" and the same noise. Where definitions differ, a test says how. Diffusers
works in float32, where 1 - ᾱ, 1 - ᾱ/ᾱ' and 1 - ᾱ' - σ² lose digits. So ddpm and ddim are compared with it in float64 as
well: the same float32 ᾱ, no further rounding.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dprl.agents import BC, BCConfig
from dprl.diffusion import NoiseSchedule, ScheduleConfig, SolverConfig, n_draws, solve, solver_steps
from dprl.errors import ConfigError
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features

diffusers = pytest.importorskip("diffusers")
training_utils = pytest.importorskip("diffusers.training_utils")

TOLERANCE = 1e-5
SHAPE = (4, 3, 2)  # (B, H, A)
SCHEDULES = ("squaredcos_cap_v2", "linear", "scaled_linear")
PREDICTIONS = ("epsilon", "sample", "v_prediction")

FLOAT32 = {"ddim eta 1.0": 1e-4}
"""Whole trajectories in float32: where the signal is tiny, x̂_0 is many times x, and roundings grow from step to step.
Step by step, from the same x, all is equal to 1e-5."""
FLOAT64 = {"ddpm": 1e-4, "ddim eta 1.0": 2e-5}
"""Our coefficients of steps with noise are diffusers' own in float32; with its tables cast up it has others."""

deviations: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def _report() -> Iterator[None]:
    yield
    for what, value in sorted(deviations.items()):
        print(f"diffusers {what:<28} {value:.1e}")


def network(x: Tensor, t: int) -> Tensor:
    """Any smooth function of x and the timestep that mixes a chunk's numbers."""
    return 0.8 * torch.sin(2 * x + 0.1 * t) + 0.3 * x.mean(dim=(1, 2), keepdim=True).cos() - 0.1


def numbers(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype)


def require_equal(what: str, ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal to 1e-5, or another part, of the largest number."""
    assert ours.dtype == theirs.dtype
    difference = float((ours - theirs).detach().abs().max() / theirs.abs().max())
    name = f"{what} {str(ours.dtype).removeprefix('torch.')}"
    deviations[name] = max(deviations.get(name, 0.0), difference)
    assert difference < tolerance


def our_trajectory(config: ScheduleConfig, solver: SolverConfig, draws: Tensor, clip: float | None) -> list[Tensor]:
    """What stands after each step. `draws` may be more than are needed."""
    steps, schedule = solver_steps(config, solver), NoiseSchedule(config).to(draws.dtype)
    trajectory: list[Tensor] = []

    def predict(x: Tensor, t: int) -> Tensor:
        trajectory.append(x)
        return schedule.predict_clean(x, network(x, t), t, clip)

    trajectory.append(solve(steps, predict, draws[0], draws[1 : n_draws(steps)]))
    assert len(trajectory) == len(steps) + 1
    return trajectory[1:]


def require_equal_steps(what: str, config: ScheduleConfig, solver: SolverConfig, theirs: list[Tensor], draws: Tensor,
                        clip: float | None) -> None:  # fmt: skip
    """Each of our steps, from where theirs stood, goes where theirs went."""
    schedule = NoiseSchedule(config).to(draws.dtype)
    for i, step in enumerate(solver_steps(config, solver)):
        x = draws[0] if i == 0 else theirs[i - 1]

        def predict(noisy: Tensor, t: int) -> Tensor:
            return schedule.predict_clean(noisy, network(noisy, t), t, clip)

        ours = solve((step,), predict, x, draws[1 + i : 2 + i])
        require_equal(f"{what}, one step", ours, theirs[i])


def their_trajectory(scheduler: Any, n: int, draws: Tensor, **options: Any) -> list[Tensor]:
    """What stands after each step; `draws` are given wherever it asks for noise."""
    scheduler.set_timesteps(n)
    for table in ("alphas_cumprod", "final_alpha_cumprod", "one"):
        if hasattr(scheduler, table):
            setattr(scheduler, table, getattr(scheduler, table).to(draws.dtype))
    given = iter(draws[1:])
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    x, trajectory = draws[0], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *_, **__: next(given), raising=False)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, int(t)), t, x, **options).prev_sample
            trajectory.append(x)
    return trajectory


def require_equal_trajectories(what: str, ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    rounding = FLOAT32 if ours[0].dtype == torch.float32 else FLOAT64
    require_equal(what, torch.stack(ours), torch.stack(theirs), rounding.get(what, TOLERANCE))


def common(k: int, schedule: str, prediction: str, **options: Any) -> dict[str, Any]:
    return {
        "num_train_timesteps": k, "beta_schedule": schedule, "prediction_type": prediction, "beta_start": 1e-4,
        "beta_end": 0.02, **options,
    }  # fmt: skip


GRIDS = [(20, 20), (20, 5), (20, 1), (50, 7), (100, 100), (100, 10), (100, 33), (50, 12), (7, 6), (100, 47)]
"""(K, number of steps). In the last three a step falls halfway between two timesteps."""
SPACINGS = ("leading", "trailing", "linspace")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm(schedule: str, prediction: str, spacing: str, clip: float | None, dtype: torch.dtype) -> None:
    """Diffusers floors the posterior's variance at 1e-20, which no other digit sees."""
    for k, n in GRIDS:
        config, draws = ScheduleConfig(k, schedule, prediction), numbers(n + 1, dtype)
        theirs = diffusers.DDPMScheduler(
            **common(k, schedule, prediction, clip_sample=clip is not None, timestep_spacing=spacing)
        )
        ours = our_trajectory(config, SolverConfig("ddpm", n, timestep_spacing=spacing), draws, clip)
        require_equal_trajectories("ddpm", ours, their_trajectory(theirs, n, draws))


def evenly_spaced(k: int, n: int, spacing: str) -> bool:
    """Whether diffusers' DDIM goes from each timestep to the next one that it visits.

    It goes from t to t - K // n, whatever it visits next. With leading that is the same; with trailing where n divides
    K; with linspace only where all K are visited, or the first from t = 0.
    """
    return spacing == "leading" or (k % n == 0 and spacing == "trailing") or n == k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim(schedule: str, prediction: str, spacing: str, eta: float, clip: float | None, dtype: torch.dtype) -> None:
    """Ours always takes the direction that the clamped x̂_0 implies: `use_clipped_model_output`."""
    for k, n in GRIDS:
        if not evenly_spaced(k, n, spacing):
            continue
        config, draws = ScheduleConfig(k, schedule, prediction), numbers(n + 1, dtype)
        theirs = diffusers.DDIMScheduler(
            **common(k, schedule, prediction, clip_sample=clip is not None, timestep_spacing=spacing)
        )
        ours = our_trajectory(config, SolverConfig("ddim", n, eta, spacing), draws, clip)
        expected = their_trajectory(theirs, n, draws, eta=eta, use_clipped_model_output=clip is not None)
        require_equal_trajectories(f"ddim eta {eta}", ours, expected)
        if dtype == torch.float32:
            require_equal_steps(f"ddim eta {eta}", config, SolverConfig("ddim", n, eta, spacing), expected, draws, clip)


def test_ddim_visits_the_same_timesteps_but_diffusers_steps_past_them() -> None:
    """With linspace over 20 timesteps in 5 steps: 19, 14, 10, 5, 0. Ours goes from one to the next, as diffusers' DDPM;
    diffusers' DDIM goes from each to 4 below, and so to levels it does not visit."""
    theirs = diffusers.DDIMScheduler(**common(20, "squaredcos_cap_v2", "sample", timestep_spacing="linspace"))
    theirs.set_timesteps(5)
    steps = solver_steps(ScheduleConfig(20), SolverConfig("ddim", 5, timestep_spacing="linspace"))
    assert [step.timestep for step in steps] == theirs.timesteps.tolist() == [19, 14, 10, 5, 0]
    signal, noise = ScheduleConfig(20).levels()
    x, clean = torch.tensor(0.7), torch.tensor(-0.2)
    epsilon = (x - signal[19] * clean) / noise[19]
    moved = theirs.step(clean, 19, x).prev_sample
    assert float(moved) == pytest.approx(float(signal[15] * clean + noise[15] * epsilon), rel=1e-5)
    ours = steps[0].noisy * x + steps[0].clean * clean
    assert float(ours) == pytest.approx(float(signal[14] * clean + noise[14] * epsilon), rel=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dpmsolver(schedule: str, prediction: str, algorithm: str, spacing: str) -> None:
    """Of order 2, midpoint, with its default last step, to no noise. It does not clamp x̂_0.

    Not where linspace visits a timestep twice, and leading none but 0 (n near K): see below.
    """
    for k, n in GRIDS:
        if n == k and spacing != "trailing":
            continue
        config, draws = ScheduleConfig(k, schedule, prediction), numbers(n + 1)
        theirs = diffusers.DPMSolverMultistepScheduler(
            **common(k, schedule, prediction, algorithm_type=algorithm, solver_order=2, timestep_spacing=spacing)
        )
        ours = our_trajectory(config, SolverConfig(algorithm, n, timestep_spacing=spacing), draws, None)
        require_equal_trajectories(algorithm, ours, their_trajectory(theirs, n, draws))


def test_dpmsolver_visits_no_timestep_twice() -> None:
    """In K steps linspace has a timestep twice, where h = 0: diffusers divides by it, ours goes on to the next."""
    theirs = diffusers.DPMSolverMultistepScheduler(**common(20, "squaredcos_cap_v2", "sample"))
    theirs.set_timesteps(20)
    visited = theirs.timesteps.tolist()
    steps = solver_steps(ScheduleConfig(20), SolverConfig("dpmsolver++"))
    assert len(set(visited)) == 19
    assert [step.timestep for step in steps] == sorted(set(visited), reverse=True)
    draws = numbers(1)
    assert not torch.isfinite(their_trajectory(theirs, 20, draws)[-1]).any()
    assert torch.isfinite(our_trajectory(ScheduleConfig(20), SolverConfig("dpmsolver++"), draws, None)[-1]).all()


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpmsolver_has_no_leading_grid_of_every_timestep(algorithm: str) -> None:
    """Diffusers visits timestep 0 over and over."""
    theirs = diffusers.DPMSolverMultistepScheduler(
        **common(20, "squaredcos_cap_v2", "sample", timestep_spacing="leading")
    )
    theirs.set_timesteps(20)
    assert not theirs.timesteps.any()
    with pytest.raises(ConfigError, match=r"num_inference_steps = 20: must be below 20"):
        solver_steps(ScheduleConfig(20), SolverConfig(algorithm, 20, timestep_spacing="leading"))


@pytest.mark.parametrize("k", [1, 7, 50, 64, 100, pytest.param(1000, marks=pytest.mark.full)])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_grid_is_diffusers(spacing: str, k: int) -> None:
    """Where diffusers repeats a timestep or goes below 0, ours does not. Of many numbers of steps some."""
    kinds = {"ddpm": diffusers.DDPMScheduler, "dpmsolver++": diffusers.DPMSolverMultistepScheduler}
    for solver, scheduler in kinds.items():
        for n in range(1, k + (solver == "ddpm" or spacing != "leading"), 1 + k // 80):
            theirs = scheduler(num_train_timesteps=k, timestep_spacing=spacing)
            theirs.set_timesteps(n)
            expected = [t for t in dict.fromkeys(theirs.timesteps.tolist()) if t >= 0]
            steps = solver_steps(ScheduleConfig(k), SolverConfig(solver, n, timestep_spacing=spacing))
            assert [step.timestep for step in steps] == expected, n


@pytest.mark.parametrize("n", [1, 4, 5, 20])
def test_euler(n: int) -> None:
    """Its velocity is ε - x_0, ours x_0 - ε; it is given our noise levels, and its timesteps are K times those."""
    config = ScheduleConfig(20, "rectified_flow", "velocity")
    steps = solver_steps(config, SolverConfig("euler", n))
    draws = numbers(1)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=20, shift=1.0)
    theirs.set_timesteps(sigmas=[(step.timestep + 1) / 20 for step in steps])
    x, expected = draws[0], []
    for t, step in zip(theirs.timesteps, steps, strict=True):
        assert float(t) == pytest.approx(step.timestep + 1)
        x = theirs.step(-network(x, step.timestep), t, x).prev_sample
        expected.append(x)
    require_equal_trajectories("euler", our_trajectory(config, SolverConfig("euler", n), draws, None), expected)


@pytest.mark.parametrize("k", [1, 10, 100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noising_and_targets(schedule: str, k: int) -> None:
    ours = {p: NoiseSchedule(ScheduleConfig(k, schedule, p)) for p in PREDICTIONS}
    theirs = diffusers.DDPMScheduler(**common(k, schedule, "epsilon"))
    t = torch.arange(k)
    clean, noise = torch.randn(2, k, 3, 2, generator=torch.Generator().manual_seed(0))
    require_equal("add_noise", ours["epsilon"].add_noise(clean, noise, t), theirs.add_noise(clean, noise, t))
    require_equal("get_velocity", ours["v_prediction"].target(clean, noise, t), theirs.get_velocity(clean, noise, t))
    require_equal("betas", ours["sample"].config.betas().float(), theirs.betas)
    require_equal("alphas_cumprod", ours["sample"].signal ** 2, theirs.alphas_cumprod)


def test_noising_of_the_flow() -> None:
    ours = NoiseSchedule(ScheduleConfig(10, "rectified_flow", "velocity"))
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=10, shift=1.0)
    clean, noise = torch.randn(2, 10, 3, 2, generator=torch.Generator().manual_seed(0))
    noisy = theirs.scale_noise(clean, theirs.timesteps, noise)
    require_equal("flow add_noise", ours.add_noise(clean, noise, torch.arange(10).flip(0)), noisy)


@pytest.mark.parametrize("ema_decay", [0.9999, 0.5])
def test_averaging_of_weights_warms_up_as_theirs(ema_decay: float) -> None:
    config = DiffusionConfig(horizon=2, num_train_timesteps=4)
    agent = BC(DiffusionPolicy(Features(2, 1), config), BCConfig(ema_decay=ema_decay, ema_power=0.75))
    theirs = training_utils.EMAModel(
        agent.policy.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75, inv_gamma=1.0
    )
    from dprl.networks import polyak_update

    for step in range(1, 31):
        with torch.no_grad():
            for i, parameter in enumerate(agent._online.parameters()):
                parameter.add_(torch.full_like(parameter, 0.1 * (i + 1) / step))
        agent.timesteps = step
        polyak_update(agent._online, agent.policy, 1 - agent._ema_decay())
        theirs.step(agent._online.parameters())
        assert agent._ema_decay() == pytest.approx(theirs.cur_decay_value, abs=1e-12)
        for ours, other in zip(agent.policy.parameters(), theirs.shadow_params, strict=True):
            require_equal("ema", nn.utils.parameters_to_vector([ours]), nn.utils.parameters_to_vector([other]))
