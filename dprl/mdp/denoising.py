"""Denoising as a Markov decision process (DPPO, arXiv:2409.00588, section 4).

One environment decision is K denoising steps of a solver. Step k, counted down from K-1 to 0, has the state
(obs, x_{k+1}) and the action x_k ~ N(mean, std²); only x_0 reaches the environment. The last K' steps are trainable.
This is the one place where the density of a denoising step is written.

Shapes: B decisions, K' tuned steps, O observation steps, F features, H actions of a chunk, A action size. All x are
normalised.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from dprl.diffusion import SolverConfig, normal_log_prob, posterior_steps, solver_steps
from dprl.errors import check
from dprl.mdp.base import Chain, ExplorationConfig, Gaussian, PolicyMDP
from dprl.mdp.noise import FlooredNoise, step_noise
from dprl.networks.mlp import FlatDenoiser
from dprl.observations import TensorObservation
from dprl.policy import DiffusionPolicy


class DenoisingMDP(PolicyMDP):
    """A policy whose last `tuned_steps` denoising steps are a stochastic policy to be trained."""

    policy: DiffusionPolicy

    def __init__(
        self,
        policy: DiffusionPolicy,
        tuned_steps: int,
        exploration: ExplorationConfig,
        solver: SolverConfig | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Give `policy` a trainable copy of its network for its last `tuned_steps` steps, if it has none yet.

        Args:
            policy: the pretrained policy.
            tuned_steps: K'.
            exploration: how it explores.
            solver: whose steps they are; default: the policy's own way. Only where a step depends on nothing but x.
                If the policy's own way visits other timesteps, which are not tuned, this becomes its own way (ddim's
                with the eta that it had, or 0).
            seed: of the initial weights of learned noise.

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
        visited = {step.timestep for step in grid}
        if any(step.timestep not in visited for step in solver_steps(schedule, policy.config.sampling)):
            own = policy.config.sampling  # it knows no other steps so well
            eta = own.eta if own.solver == solver.solver else 0.0
            policy.set_sampling(replace(solver, eta=eta), policy.config.clip_sample)
        self.policy = policy
        self.tuned_steps = tuned_steps
        self.exploration = exploration
        self.solver = solver
        self._seed = seed
        self._grid = grid
        self._timesteps = torch.tensor([step.timestep for step in reversed(grid)], device=policy.device)  # by k
        self.noise = step_noise(policy, grid, tuned_steps, exploration, solver, seed).to(policy.device)

    def trainable(self) -> nn.Module:
        """See `PolicyMDP.trainable`: the tuned network, and the noise where it is learned."""
        policy = self.policy
        parts = [policy.tuned, self.noise, policy.tuned_encoder]
        return nn.ModuleList([part for part in parts if part is not None])

    def state(self) -> dict[str, Tensor]:
        """See `PolicyMDP.state`."""
        return self.noise.state_dict()

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `PolicyMDP.restore`."""
        self.noise.load_state_dict(state)

    def begin_iteration(self, iteration: int) -> None:
        """See `PolicyMDP.begin_iteration`."""
        self.noise.begin_iteration(iteration)

    def compile(self) -> None:
        """See `PolicyMDP.compile`. Networks larger than an MLP are compiled themselves: whole chains take too long."""
        if isinstance(self.policy.base, FlatDenoiser):
            super().compile()
        elif self.policy.device.type == "cpu":
            for network in (self.policy.base, self.policy.tuned):
                assert network is not None
                network.compile(dynamic=False)

    def cpu(self) -> Self:
        """See `PolicyMDP.cpu`."""
        if self.policy.device.type == "cpu":
            return self
        copied = type(self)(copy.deepcopy(self.policy).cpu(), self.tuned_steps, self.exploration, self.solver)
        copied.noise.load_state_dict(self.noise.state_dict())
        copied.noise.set_floor(float(self.noise.floor))
        return copied

    def condition(
        self, obs: TensorObservation, generator: torch.Generator | None = None, *, pretrained: bool = False
    ) -> Tensor:
        """See `PolicyMDP.condition`."""
        return self.policy.condition(obs, generator, encoder=None if pretrained else self.policy.tuned_encoder)

    def conditions(self, obs: TensorObservation) -> tuple[Tensor, Tensor]:
        """See `PolicyMDP.conditions`."""
        return self.policy.conditions(obs, [step.timestep for step in self._grid])

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(K+1, H, A), the normal draws of one decision: x_K, then one for each denoising step."""
        return len(self._grid) + 1, self.policy.config.horizon, self.policy.features.action_size

    @torch.no_grad()
    def chain(
        self, condition: Tensor, draws: Tensor, *, frozen: Tensor | None = None, pretrained: bool = False
    ) -> Chain:
        """See `PolicyMDP.chain`; draws (K+1, B, H, A)."""
        policy, clip = self.policy, self.policy.config.clip_sample
        x, z = draws[0], draws[1:].clamp(-self.exploration.noise_clip, self.exploration.noise_clip)
        steps = (FlooredNoise.of_chain if pretrained else type(self.noise).of_chain)(self.noise, condition)
        made, chain = (steps.std * z).unbind(0), []
        timesteps = [step.timestep for step in self._grid]
        known = policy.prepare_steps(
            timesteps, condition, condition if frozen is None else frozen, pretrained=pretrained
        )
        for i, t in enumerate(timesteps):
            if len(timesteps) - i <= self.tuned_steps:
                chain.append(x)
            network = policy.base if pretrained else policy.denoiser_at(t)
            clean = policy.schedule.predict_clean(x, network.denoise(x, next(known)), t, clip)
            x = _plus(_plus(made[i], steps.noisy[i], x), steps.clean[i], clean)
        log_probs = normal_log_prob(torch.stack(made[-self.tuned_steps :]), 0.0, steps.density_std)
        return Chain(
            torch.stack([*chain, x], dim=1), log_probs.transpose(0, 1), policy.action_normalizer.unnormalize(x)
        )

    def log_prob(self, condition: Tensor, x: Tensor, x_next: Tensor, k: Tensor) -> Tensor:
        """Log N(x_next; mean(x, k, obs), std²), see `PolicyMDP.log_prob`. Of the unclamped Gaussian."""
        return normal_log_prob(x_next, *self.gaussian(condition, x, k))

    def gaussian(self, condition: Tensor, x: Tensor, k: Tensor, *, pretrained: bool = False) -> Gaussian:
        """See `PolicyMDP.gaussian`."""
        policy = self.policy
        network = policy.base if pretrained else policy.tuned
        assert network is not None
        prediction = network.denoise(x, network.prepare(embedding(k, network.embed(self._timesteps)), condition))
        clean = policy.schedule.predict_clean(x, prediction, self._timesteps[k], policy.config.clip_sample)
        step = (FlooredNoise.of_pairs if pretrained else type(self.noise).of_pairs)(self.noise, condition, k)
        return Gaussian(step.noisy * x + step.clean * clean, step.density_std)


def _plus(total: Tensor, coefficient: float | Tensor, x: Tensor) -> Tensor:
    """Total + coefficient x, in one kernel."""
    if isinstance(coefficient, Tensor):
        return torch.addcmul(total, coefficient, x)
    return torch.add(total, x, alpha=coefficient)
