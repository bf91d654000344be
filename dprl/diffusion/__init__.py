"""Noise schedules and solvers."""

from dprl.diffusion.schedule import NoiseSchedule, ScheduleConfig
from dprl.diffusion.solvers import SolverConfig, Step, n_draws, posterior_steps, solve, solver_steps

__all__ = [
    "NoiseSchedule",
    "ScheduleConfig",
    "SolverConfig",
    "Step",
    "n_draws",
    "posterior_steps",
    "solve",
    "solver_steps",
]
