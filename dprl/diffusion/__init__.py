"""Noise schedules, solvers and Gaussians."""

from dprl.diffusion.gaussian import normal_kl, normal_log_prob, normal_w2
from dprl.diffusion.schedule import CLEAN, Level, NoiseSchedule, ScheduleConfig
from dprl.diffusion.solvers import (
    Advance,
    SolverConfig,
    Step,
    n_draws,
    posterior_steps,
    solve,
    solve_guided,
    solver_steps,
)

__all__ = [
    "CLEAN",
    "Advance",
    "Level",
    "NoiseSchedule",
    "ScheduleConfig",
    "SolverConfig",
    "Step",
    "n_draws",
    "normal_kl",
    "normal_log_prob",
    "normal_w2",
    "posterior_steps",
    "solve",
    "solve_guided",
    "solver_steps",
]
