"""Noise schedules and solvers: the mathematics of diffusion, free of networks and environments."""

from dprl.diffusion.schedule import NoiseSchedule
from dprl.diffusion.solvers import SOLVERS, Solver, ddpm

__all__ = ["SOLVERS", "NoiseSchedule", "Solver", "ddpm"]
