"""Solvers: from noise to actions, chosen at inference.

Every solver here is linear in what it knows: one step takes x, the x_0 predicted from it and perhaps the one before to

    x <- noisy · x + clean · x̂_0 + previous · x̂_0 of the step before + std · z,   z ~ N(0, I).

So a solver is a function from a noise schedule and a number of steps to these coefficients, and there is one loop. With
signal s, noise n and λ = log(s / n) at the step's timestep, and primes for the next visited one:

ddpm              the posterior of arXiv:2006.11239 eq. 7, on any grid; the same as ddim with eta = 1
ddim              arXiv:2010.02502 eq. 12 and 16; eta from 0 (deterministic) to 1
dpmsolver++       2M, arXiv:2211.01095 algorithm 2
sde-dpmsolver++   its stochastic form, as in the diffusers package
euler             for rectified flows, x <- x + (n - n') velocity; this is ddim with eta = 0 for such a schedule
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dprl.config import validate
from dprl.diffusion.schedule import ScheduleConfig
from dprl.errors import check

SolverName = Literal["ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++", "euler"]
Spacing = Literal["leading", "linspace", "trailing"]

PredictClean = Callable[[Tensor, int], Tensor]
"""(noisy actions (B, H, A), timestep) -> predicted clean actions x̂_0 (B, H, A)."""


class Step(NamedTuple):
    """One step's timestep and coefficients."""

    timestep: int
    noisy: float
    clean: float
    previous: float
    std: float


@dataclass(frozen=True)
class SolverConfig:
    """How to turn noise into actions: any of it may differ from one call to the next, on any checkpoint."""

    solver: SolverName | None = None
    """`ddpm`, `ddim`, `dpmsolver++`, `sde-dpmsolver++`; `euler` for rectified flows. Default: ddpm or euler."""
    num_inference_steps: int | None = None
    """How often the network is evaluated. Default: once for each training timestep."""
    eta: float = 0.0
    """ddim's noise, from 0 (deterministic) to 1 (as ddpm)."""
    timestep_spacing: Spacing | None = None
    """Which timesteps are visited, as in diffusers. Default: leading for ddpm and ddim, linspace for the dpmsolvers,
    trailing for euler."""

    def __post_init__(self) -> None:
        validate(self, at_least={"num_inference_steps": 1, "eta": 0})
        check(self.eta <= 1, "eta", self.eta, "must be from 0 to 1")
        check(self.eta == 0 or self.solver == "ddim", "eta", self.eta, "only the solver ddim has it")

    def over(self, default: SolverConfig) -> SolverConfig:
        """Return `default` with what is set here. Another solver does not inherit steps, eta or spacing."""
        if self.solver not in (None, default.solver):
            return SolverConfig(self.solver, self.num_inference_steps, self.eta, self.timestep_spacing)
        return SolverConfig(
            default.solver,
            self.num_inference_steps or default.num_inference_steps,
            default.eta if self.solver is None else self.eta,
            self.timestep_spacing or default.timestep_spacing,
        )


@lru_cache(maxsize=256)
def solver_steps(schedule: ScheduleConfig, config: SolverConfig) -> tuple[Step, ...]:
    """Return the steps of a solver, noisiest first.

    Raises:
        ConfigError: a solver of the other family, or more steps than training timesteps.
    """
    solver = config.solver or ("euler" if schedule.is_flow else "ddpm")
    fits = (solver == "euler") == schedule.is_flow
    allowed = "euler" if schedule.is_flow else "ddpm, ddim, dpmsolver++ or sde-dpmsolver++"
    check(fits, "solver", solver, f"must be {allowed} for a policy with the schedule {schedule.schedule}")
    n, k = config.num_inference_steps or schedule.num_train_timesteps, schedule.num_train_timesteps
    check(n <= k, "num_inference_steps", n, f"must be at most the policy's training timesteps, which are {k}")
    grid = _grid(solver, config.timestep_spacing, n, k)
    signal, noise = (table.tolist() for table in schedule.levels())
    levels = [(signal[t], noise[t]) for t in grid] + [(1.0, 0.0)]
    if solver.endswith("dpmsolver++"):
        return _dpmsolver(grid, levels, stochastic=solver.startswith("sde"))
    if solver == "ddpm":
        return _ddpm(grid, levels, schedule.betas().float().tolist())
    return tuple(_ddim_step(t, *levels[i], *levels[i + 1], config.eta) for i, t in enumerate(grid))


def n_draws(steps: tuple[Step, ...]) -> int:
    """Return how many normal draws a solver takes: the initial noise, and one for each step with noise."""
    return 1 + sum(step.std > 0 for step in steps)


def solve(steps: tuple[Step, ...], predict: PredictClean, x: Tensor, draws: Tensor, temperature: float = 1.0) -> Tensor:
    """Run `steps` from `x`.

    Args:
        steps: what `solver_steps` returned, or the last of them.
        predict: the network.
        x: (B, H, A) where to start: noise at the first step's level.
        draws: (number of steps with noise, B, H, A), in the order of their use.
        temperature: scales these draws.

    Returns:
        (B, H, A).
    """
    before: Tensor | None = None
    remaining = iter(draws)
    for step in steps:
        clean = predict(x, step.timestep)
        x = torch.add(step.noisy * x, clean, alpha=step.clean) if step.noisy else step.clean * clean
        if step.previous and before is not None:
            x = torch.add(x, before, alpha=step.previous)
        if step.std > 0:
            x = torch.add(x, next(remaining), alpha=temperature * step.std)
        before = clean
    return x


def _grid(solver: str, spacing: Spacing | None, n: int, k: int) -> list[int]:
    """The visited timesteps, descending, as diffusers spaces them."""
    multistep = solver.endswith("dpmsolver++")
    if spacing is None:
        spacing = "linspace" if multistep else "trailing" if solver == "euler" else "leading"
    if spacing == "leading":
        grid = [i * (k // n) for i in reversed(range(n))]
    elif spacing == "trailing":
        grid = [round(k - i * k / n) - 1 for i in range(n)]
    elif multistep:  # n intervals, of which the last ends beyond timestep 0
        grid = [round((k - 1) * (n - i) / n) for i in range(n)]
    else:
        grid = [round((k - 1) * (n - 1 - i) / max(n - 1, 1)) for i in range(n)]
    return sorted(set(grid), reverse=True)  # rounding may visit one twice where n is close to k


def _ddpm(grid: list[int], levels: list[tuple[float, float]], betas: list[float]) -> tuple[Step, ...]:
    """The posterior q(x_next | x, x_0), with the β that leads from one visited timestep to the other."""
    steps = []
    for i, (t, following) in enumerate(zip(grid, [*grid[1:], -1], strict=True)):
        (signal, noise), (signal_next, noise_next) = levels[i], levels[i + 1]
        beta = betas[t] if following == t - 1 else 1 - (signal / signal_next) ** 2
        noisy = math.sqrt(1 - beta) * noise_next**2 / noise**2
        steps.append(Step(t, noisy, beta * signal_next / noise**2, 0.0, math.sqrt(beta) * noise_next / noise))
    return tuple(steps)


def _ddim_step(t: int, signal: float, noise: float, signal_next: float, noise_next: float, eta: float) -> Step:
    """X' = s' x̂_0 + √(n'² - σ²) ε̂ + σ z with the ε̂ that x̂_0, clamped or not, implies."""
    std, remaining = 0.0, noise_next
    if eta > 0:  # in float32, where 1 - ᾱ - σ² loses digits, as those did by whose code checkpoints were tuned
        alpha_bar, alpha_bar_next = np.float32(signal**2), np.float32(signal_next**2)
        one = np.float32(1)
        variance = (one - alpha_bar_next) / (one - alpha_bar) * (one - alpha_bar / alpha_bar_next)
        std = eta * float(np.sqrt(variance))
        remaining = math.sqrt(max(float(one - alpha_bar_next - np.float32(std) ** 2), 0.0))
    noisy = remaining / noise
    return Step(t, noisy, signal_next - noisy * signal, 0.0, std)


def _dpmsolver(grid: list[int], levels: list[tuple[float, float]], *, stochastic: bool) -> tuple[Step, ...]:
    """Second order from the second step on; the last one, to zero noise, gives x̂_0 itself."""
    lambdas = [math.log(s / n) for s, n in levels[:-1]]
    steps = []
    for i, t in enumerate(grid[:-1]):
        (_, noise), (signal_next, noise_next) = levels[i], levels[i + 1]
        h = lambdas[i + 1] - lambdas[i]
        decay = math.exp(-2 * h) if stochastic else math.exp(-h)
        noisy = noise_next / noise * (math.exp(-h) if stochastic else 1.0)
        clean = signal_next * (1 - decay)
        # D = x̂_0 + (x̂_0 - x̂_0 before) / (2r), r = the last interval of λ over this one
        extrapolation = 0.5 * h / (lambdas[i] - lambdas[i - 1]) if i > 0 else 0.0
        std = noise_next * math.sqrt(1 - decay) if stochastic else 0.0
        steps.append(Step(t, noisy, clean * (1 + extrapolation), -clean * extrapolation, std))
    return (*steps, Step(grid[-1], 0.0, 1.0, 0.0, 0.0))
