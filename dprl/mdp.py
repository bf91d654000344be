"""Denoising as a Markov decision process (DPPO, arXiv:2409.00588, section 4).

One environment decision is K denoising steps of a solver. Step k, counted down from K-1 to 0, has the state
(obs, x_{k+1}) and the action x_k ~ N(mean, std²); only x_0 reaches the environment. The last K' steps are trainable.
This is the one place where the density of a denoising step is written.

Shapes: B decisions, K' tuned steps, H actions of a chunk, A action size. All x are normalised.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dprl.config import validate
from dprl.diffusion import SolverConfig, posterior_steps, solver_steps
from dprl.errors import check
from dprl.observations import TensorObservation
from dprl.policy import DiffusionPolicy

LOG_SQRT_2PI = math.log(math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class ExplorationConfig:
    """How the chain explores while it collects."""

    min_sampling_std: float = 0.1
    """Floor of every step's standard deviation while sampling, frozen steps included; normalised units."""
    min_log_prob_std: float = 0.1
    """Floor of the standard deviation in the density."""
    noise_clip: float = 3.0
    """Noise draws of the denoising steps are clamped to this many standard deviations."""

    def __post_init__(self) -> None:
        # Below e^-2 / √(2π) the density peaks above the clamp of log-probs at 2, and its gradient is lost.
        validate(self, at_least={"min_log_prob_std": 0.054}, above={"min_sampling_std": 0, "noise_clip": 0})


@dataclass(frozen=True)
class Chain:
    """The denoising trajectory of B decisions."""

    steps: Tensor
    """(B, K'+1, H, A): what the first tuned step starts from, then what each tuned step made, x_0 last."""
    actions: Tensor
    """(B, H, A) in the environment's units."""


class DenoisingMDP:
    """A policy whose last `tuned_steps` denoising steps are a stochastic policy to be trained."""

    def __init__(
        self,
        policy: DiffusionPolicy,
        tuned_steps: int,
        exploration: ExplorationConfig,
        solver: SolverConfig | None = None,
    ) -> None:
        """Give `policy` a trainable copy of its network for its last `tuned_steps` steps, if it has none yet.

        Args:
            policy: the pretrained policy.
            tuned_steps: K'.
            exploration: how it explores.
            solver: whose steps they are; default: the policy's own way. Only where a step depends on nothing but x.

        Raises:
            ConfigError: more tuned steps than denoising steps, or a solver whose steps are not Markovian.
        """
        schedule = policy.schedule.config
        solver = (solver or SolverConfig()).over(policy.config.sampling, schedule)
        grid = solver_steps(schedule, solver)
        if solver.solver == "ddpm" and len(grid) == schedule.num_train_timesteps:
            grid = posterior_steps(schedule)
        markov = not any(step.previous for step in grid)
        check(markov, "solver", solver.solver, "cannot be tuned: its steps look back; use ddpm, ddim or euler")
        fits = 1 <= tuned_steps <= len(grid)
        check(
            fits, "tuned_steps", tuned_steps, f"must be from 1 to the policy's denoising steps, which are {len(grid)}"
        )
        below = grid[-tuned_steps].timestep + 1
        agrees = policy.tuned is None or policy.tuned_below == below
        already = sum(step.timestep < policy.tuned_below for step in grid)
        check(agrees, "tuned_steps", tuned_steps, f"must be {already}: this policy is already tuned in its last steps")
        policy.tune_below(below)
        self.policy = policy
        self.tuned_steps = tuned_steps
        self.exploration = exploration
        self.solver = solver
        self._grid = grid[::-1]  # indexed by k
        # (4, K) by k: timestep, and the coefficients of the mean and the std
        columns = zip(*((s.timestep, s.noisy, s.clean, s.std) for s in self._grid), strict=True)
        self._table = [torch.tensor(column, device=policy.device) for column in columns]

    def cpu(self) -> DenoisingMDP:
        """Return this MDP, or a copy of it on the CPU, for workers without an accelerator."""
        if self.policy.device.type == "cpu":
            return self
        return DenoisingMDP(copy.deepcopy(self.policy).cpu(), self.tuned_steps, self.exploration, self.solver)

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(K+1, H, A), the normal draws of one decision: x_K, then one for each denoising step."""
        return len(self._grid) + 1, self.policy.config.horizon, self.policy.features.action_size

    @property
    def n_action_steps(self) -> int:
        """E, how many actions of a chunk are executed."""
        return self.policy.n_action_steps

    @torch.no_grad()
    def sample(
        self, obs: TensorObservation, *, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Chain:
        """Draw a chain for each observation, with exploration noise in every step.

        Args:
            obs: (B, O, D), or named parts; not normalised.
            noise: (K+1, B, H, A), every normal draw in the order of its use. Replays a chain exactly.
            generator: draws the noise where `noise` is not given. Default: torch's own.
        """
        policy, explore = self.policy, self.exploration
        condition = policy.condition(policy.checked(obs))
        n_draws, *chunk = self.noise_shape
        draws = policy.drawn((n_draws, len(condition), *chunk), noise, generator)
        x, chain = draws[0], []
        draws = draws[1:].clamp(-explore.noise_clip, explore.noise_clip)
        known = policy.prepare_steps([step.timestep for step in reversed(self._grid)], condition)
        for k in reversed(range(len(self._grid))):
            step = self._grid[k]
            if k == self.tuned_steps - 1:
                chain.append(x)
            prediction = policy.denoiser_at(step.timestep).denoise(x, next(known))
            clean = policy.schedule.predict_clean(x, prediction, step.timestep, policy.config.clip_sample)
            std = max(step.std, explore.min_sampling_std)
            x = torch.add(step.noisy * x, clean, alpha=step.clean).add_(draws[-1 - k], alpha=std)
            if k < self.tuned_steps:
                chain.append(x)
        return Chain(torch.stack(chain, dim=1), policy.action_normalizer.unnormalize(x))

    def log_prob(self, condition: Tensor, x: Tensor, x_next: Tensor, k: Tensor) -> Tensor:
        """Log-density of tuned steps, number by number.

        Args:
            condition: (B, O, F), `policy.condition(obs)`.
            x: (B, H, A) before the step.
            x_next: (B, H, A) after it.
            k: (B,) which step, from K'-1 (noisiest) to 0.

        Returns:
            log N(x_next; mean(x, k, obs), max(std_k, floor)²), (B, H, A). Of the unclamped Gaussian.
        """
        policy = self.policy
        assert policy.tuned is not None
        timestep = self._table[0][k]
        noisy, clean, std = (column[k][:, None, None] for column in self._table[1:])
        prediction = policy.tuned(x, timestep, condition)
        predicted = policy.schedule.predict_clean(x, prediction, timestep, policy.config.clip_sample)
        mean = noisy * x + clean * predicted
        std = std.clamp(min=self.exploration.min_log_prob_std)
        return -0.5 * ((x_next - mean) / std) ** 2 - std.log() - LOG_SQRT_2PI
