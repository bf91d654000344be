"""Solvers: from noise to actions, chosen at inference.

Every solver here is linear in what it knows: one step takes x, the x_0 predicted from it and perhaps the one before to

    x <- noisy · x + clean · x̂_0 + previous · x̂_0 of the step before + std · z,   z ~ N(0, I).

So a solver is a function from a noise schedule and a number of steps to these coefficients, and there is one loop. With
signal s, noise n and λ = log(s / n) at the step's timestep, and primes for the next visited one:

ddpm              the posterior of arXiv:2006.11239 eq. 7, on any grid; the same as ddim with eta = 1
ddim              arXiv:2010.02502 eq. 12 and 16; eta from 0 (deterministic) to 1. Where x̂_0 is clamped, the noise is
                  what the clamped x̂_0 implies: diffusers with use_clipped_model_output=True, and DPPO
dpmsolver++       2M, arXiv:2211.01095 algorithm 2
sde-dpmsolver++   its stochastic form, as in the diffusers package
euler             for rectified flows, x <- x + (n - n') velocity; this is ddim with eta = 0 for such a schedule
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
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
Advance = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(noisy actions (B, H, A), which of the steps) -> these, where a guide moves them, and x̂_0 (B, H, A)."""


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
    """`ddpm`, `ddim`, `dpmsolver++`, `sde-dpmsolver++`; `euler` for rectified flows. Default: the policy's own, which
    is ddpm or euler where nothing was chosen."""
    num_inference_steps: int | None = None
    """How often the network is evaluated, or once less where rounding makes two timesteps one. Default: the policy's
    own number; without one, for each training timestep (the dpmsolvers skip timestep 0, which their last step
    includes)."""
    eta: float = 0.0
    """ddim's noise, from 0 (deterministic) to 1 (as ddpm). Naming a solver without it means 0."""
    timestep_spacing: Spacing | None = None
    """Which timesteps are visited. Default, as in diffusers: leading for ddpm and ddim, linspace for the dpmsolvers,
    trailing for euler. With few steps take `trailing`: leading begins below the noise there is, and a single leading
    step visits timestep 0 alone."""

    def __post_init__(self) -> None:
        validate(self, at_least={"num_inference_steps": 1, "eta": 0})
        check(self.eta <= 1, "eta", self.eta, "must be from 0 to 1")
        check(self.eta == 0 or self.solver == "ddim", "eta", self.eta, "must be 0: only the solver ddim has it")

    def over(self, own: SolverConfig, schedule: ScheduleConfig) -> SolverConfig:
        """Return a policy's `own` way with what is set here. Another solver does not inherit steps, eta or spacing."""
        usual = own.solver or default_solver(schedule)
        if self.solver not in (None, usual):
            return SolverConfig(self.solver, self.num_inference_steps, self.eta, self.timestep_spacing)
        return SolverConfig(
            usual,
            self.num_inference_steps or own.num_inference_steps,
            own.eta if self.solver is None else self.eta,
            self.timestep_spacing or own.timestep_spacing,
        )


def default_solver(schedule: ScheduleConfig) -> SolverName:
    """Return euler for a rectified flow, else ddpm."""
    return "euler" if schedule.is_flow else "ddpm"


@lru_cache(maxsize=256)
def solver_steps(schedule: ScheduleConfig, config: SolverConfig) -> tuple[Step, ...]:
    """Return the steps of a solver, noisiest first.

    Raises:
        ConfigError: a solver of the other family, or more steps than training timesteps.
    """
    solver = config.solver or default_solver(schedule)
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
        return _ddpm(grid, levels)
    return _ddim(grid, levels, config.eta)


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
    return solve_guided(steps, lambda noisy, i: (noisy, predict(noisy, steps[i].timestep)), x, draws, temperature)


def solve_guided(
    steps: tuple[Step, ...], advance: Advance, x: Tensor, draws: Tensor, temperature: float = 1.0
) -> Tensor:
    """Run `steps` from `x` as `solve` does, where what the network says may be moved."""
    before: Tensor | None = None
    remaining = iter(draws)
    for i, step in enumerate(steps):
        x, clean = advance(x, i)
        x = torch.add(step.noisy * x, clean, alpha=step.clean) if step.noisy else step.clean * clean
        if step.previous:  # the first of the last steps alone knows of none before it: first order
            x = torch.add(x, clean if before is None else before, alpha=step.previous)
        if step.std > 0:
            x = torch.add(x, next(remaining), alpha=temperature * step.std)
        before = clean
    return x


def _grid(solver: str, spacing: Spacing | None, n: int, k: int) -> list[int]:
    """The visited timesteps, descending, as diffusers spaces them."""
    multistep = solver.endswith("dpmsolver++")
    if spacing is None:
        spacing = "linspace" if multistep else "trailing" if solver == "euler" else "leading"
    # The dpmsolvers' n intervals end beyond timestep 0, which they do not visit. numpy's own numbers, because rounding
    # decides by their last digits.
    if spacing == "leading":
        stride = k // (n + multistep)
        fits = stride > 0
        check(fits, "num_inference_steps", n, f"must be below {k} for the dpmsolvers with the spacing leading")
        grid = np.arange(float(multistep), n + multistep) * stride
    elif spacing == "trailing":
        grid = np.arange(k, 0, -k / n).round()[:n] - 1
    else:
        grid = np.linspace(0, k - 1, n + multistep).round()[int(multistep) :]
    return sorted({int(t) for t in grid}, reverse=True)  # rounding may visit one twice where n is close to k


def posterior_steps(schedule: ScheduleConfig) -> tuple[Step, ...]:
    """Return ddpm's steps through every timestep with β from the schedule's table (arXiv:2006.11239 eq. 7).

    `solver_steps` takes β from the ratio of two ᾱ instead, as diffusers does: the same but for float32's rounding, on
    which densities of steps depend. DPPO's authors used the table.
    """
    signal, noise = schedule.levels()
    signal_next, noise_next = signal.roll(1), noise.roll(1)
    signal_next[0], noise_next[0] = 1.0, 0.0
    betas = schedule.betas().float().double()
    noisy = (1 - betas).sqrt() * (noise_next / noise) ** 2
    clean = betas * signal_next / noise**2
    std = betas.sqrt() * noise_next / noise
    rows = zip(noisy.tolist(), clean.tolist(), std.tolist(), strict=True)
    return tuple(Step(t, a, b, 0.0, c) for t, (a, b, c) in reversed(list(enumerate(rows))))


def _ddpm(grid: list[int], levels: list[tuple[float, float]]) -> tuple[Step, ...]:
    """The posterior q(x_next | x, x_0) between visited timesteps.

    In float32 and operation by operation as diffusers: at little noise 1 - ᾱ has few digits, and checkpoints were made
    with those.
    """
    alphas_bar = _alphas_bar(levels)
    steps = []
    for t, (now, following) in zip(grid, pairwise(alphas_bar), strict=True):
        alpha = now / following
        clean = following**0.5 * (1 - alpha) / (1 - now)
        noisy = alpha**0.5 * (1 - following) / (1 - now)
        variance = (1 - following) / (1 - now) * (1 - alpha)
        steps.append(Step(t, float(noisy), float(clean), 0.0, float(variance**0.5)))
    return tuple(steps)


def _ddim(grid: list[int], levels: list[tuple[float, float]], eta: float) -> tuple[Step, ...]:
    """X' = s' x̂_0 + √(n'² - σ²) ε̂ + σ z with the ε̂ that x̂_0, clamped or not, implies; also Euler's step of a flow."""
    stds, remaining = [0.0] * len(grid), [noise for _, noise in levels[1:]]
    if eta > 0:  # in float32, as in diffusers, because 1 - ᾱ - σ² loses digits
        alphas_bar = _alphas_bar(levels)
        for i, (now, following) in enumerate(pairwise(alphas_bar)):
            std = eta * ((1 - following) / (1 - now) * (1 - now / following)) ** 0.5
            stds[i], remaining[i] = float(std), float((1 - following - std**2).clamp(min=0) ** 0.5)
    steps = []
    for i, t in enumerate(grid):
        (signal, noise), (signal_next, _) = levels[i], levels[i + 1]
        noisy = remaining[i] / noise
        steps.append(Step(t, noisy, signal_next - noisy * signal, 0.0, stds[i]))
    return tuple(steps)


def _alphas_bar(levels: list[tuple[float, float]]) -> list[Tensor]:
    """ᾱ of each level as a float32 number."""
    return [torch.tensor(signal**2, dtype=torch.float32) for signal, _ in levels]


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
