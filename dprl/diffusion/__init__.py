"""Noise schedules, solvers and Gaussians."""

from dprl.diffusion.gaussian import normal_kl, normal_log_prob, normal_w2
from dprl.diffusion.schedule import NoiseSchedule, ScheduleConfig
from dprl.diffusion.solvers import SolverConfig, Step, n_draws, posterior_steps, solve, solver_steps

__all__ = [
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
    "solver_steps",
]
