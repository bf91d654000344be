"""Denoising as a Markov decision process (DPPO, arXiv:2409.00588, section 4).

One environment decision is K denoising steps. Step k, counted down from K-1 to 0, has the state (obs, x_{k+1}) and
the action x_k ~ N(mean, std²); only x_0 reaches the environment. The last K' steps are trainable. This is the one
place where the density of a denoising step is written.

Shapes: B decisions, K' tuned steps, H actions of a chunk, A action size. All x are normalised.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dprl.config import validate
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

    def __init__(self, policy: DiffusionPolicy, tuned_steps: int, exploration: ExplorationConfig) -> None:
        """Give `policy` a trainable copy of its network for its last `tuned_steps` steps, if it has none yet.

        Raises:
            ConfigError: more tuned steps than denoising steps.
        """
        policy.tune_below(tuned_steps)
        self.policy = policy
        self.tuned_steps = tuned_steps
        self.exploration = exploration

    def cpu(self) -> DenoisingMDP:
        """Return this MDP, or a copy of it on the CPU, for workers without an accelerator."""
        if self.policy.device.type == "cpu":
            return self
        return DenoisingMDP(copy.deepcopy(self.policy).cpu(), self.tuned_steps, self.exploration)

    @torch.no_grad()
    def sample(self, obs: Tensor, generator: torch.Generator) -> Chain:
        """Draw a chain for each observation (B, O, D), with exploration noise in every step."""
        policy, explore = self.policy, self.exploration
        condition = policy.condition(obs.to(policy.device))
        shape = (policy.config.num_train_timesteps + 1, len(obs), policy.config.horizon, policy.config.action_size)
        draws = torch.randn(shape, generator=generator, device=generator.device).to(policy.device)
        draws[1:] = draws[1:].clamp(-explore.noise_clip, explore.noise_clip)
        x, steps = draws[0], []
        for k in reversed(range(policy.config.num_train_timesteps)):
            if k == self.tuned_steps - 1:
                steps.append(x)
            mean, std = self._transition(condition, x, k, policy.denoiser_at(k))
            x = mean + std.clamp(min=explore.min_sampling_std) * draws[-1 - k]
            if k < self.tuned_steps:
                steps.append(x)
        return Chain(torch.stack(steps, dim=1), policy.action_normalizer.unnormalize(x))

    def log_prob(self, condition: Tensor, x: Tensor, x_next: Tensor, k: Tensor) -> Tensor:
        """Log-density of tuned steps, number by number.

        Args:
            condition: (B, C), `policy.condition(obs)`.
            x: (B, H, A) before the step.
            x_next: (B, H, A) after it.
            k: (B,) which step, from K'-1 (noisiest) to 0.

        Returns:
            log N(x_next; mean(x, k, obs), max(std_k, floor)²), (B, H, A). Of the unclamped Gaussian.
        """
        assert self.policy.tuned is not None
        mean, std = self._transition(condition, x, k, self.policy.tuned)
        std = std.clamp(min=self.exploration.min_log_prob_std)
        return -0.5 * ((x_next - mean) / std) ** 2 - std.log() - LOG_SQRT_2PI

    def _transition(
        self, condition: Tensor, x: Tensor, k: Tensor | int, denoiser: torch.nn.Module
    ) -> tuple[Tensor, Tensor]:
        """Mean and unfloored std of a DDPM step, by the one network it belongs to."""
        schedule, clip = self.policy.schedule, self.policy.config.clip_sample
        timestep = torch.tensor([k], device=x.device) if isinstance(k, int) else k
        clean = schedule.predict_clean(x, denoiser(x, timestep, condition), k, clip)
        return schedule.posterior(clean, x, k)
