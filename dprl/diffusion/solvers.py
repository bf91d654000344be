"""Solvers: from noise to actions, given any function that predicts the noise. Chosen at inference.

A solver visits a descending grid of timesteps. `n_draws` says how many normal draws it takes, in the order it takes
them, the initial noise first, so that any sample can be replayed exactly from (n_draws, B, H, A).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from dprl.diffusion.schedule import NoiseSchedule
from dprl.errors import check

PredictNoise = Callable[[Tensor, int], Tensor]
"""(noisy actions (B, H, A), timestep) -> predicted noise (B, H, A)."""


class Solver(Protocol):
    """What `SOLVERS` holds."""

    def n_draws(self, schedule: NoiseSchedule, num_inference_steps: int | None) -> int:
        """Return how many normal draws one sample takes. Raises ConfigError where the step count does not fit."""
        ...

    def solve(
        self, schedule: NoiseSchedule, predict: PredictNoise, draws: Tensor, clip: float | None, temperature: float
    ) -> Tensor:
        """Turn `draws` (n_draws, B, H, A) into actions (B, H, A)."""
        ...


class _DDPM:
    """Ancestral sampling, arXiv:2006.11239 algorithm 2: one step for every training timestep."""

    def n_draws(self, schedule: NoiseSchedule, num_inference_steps: int | None) -> int:
        steps = schedule.num_train_timesteps
        fits = num_inference_steps in (None, steps)
        check(fits, "num_inference_steps", num_inference_steps, f"ddpm visits all {steps} training timesteps")
        return steps  # the initial noise and one draw for every step but the last

    def solve(
        self, schedule: NoiseSchedule, predict: PredictNoise, draws: Tensor, clip: float | None, temperature: float
    ) -> Tensor:
        x = draws[0]
        for draw, timestep in enumerate(reversed(range(schedule.num_train_timesteps)), start=1):
            clean = schedule.predict_clean(x, predict(x, timestep), timestep, clip)
            mean, std = schedule.posterior(clean, x, timestep)
            x = mean + temperature * std * draws[draw] if timestep > 0 else mean
        return x


ddpm = _DDPM()
SOLVERS: dict[str, Solver] = {"ddpm": ddpm}
