"""A diffusion or flow policy as a decision process of one step, whose density is followed through its ODE.

The ablation of arXiv:2409.00588 ("PPO with exact likelihood"): sampling is deterministic after the initial draw, so a
chunk x_0 has the density of the noise x_K that leads to it, times how much the way there contracts. The way is that of
the solver's own grid, taken backwards: between two levels with signal s and noise n (arXiv:2010.02502, section 4.3)

    x' = s' x̂_0 + n' ε̂,    x̂_0 and ε̂ as the network has them of x, at the noisier level's timestep,

and log p(x_0) = log N(x_K; 0, I) + Σ log |det ∂x'/∂x|, with the Jacobians in full: chunks are small.

Shapes: B decisions, O observation steps, F features, H actions of a chunk, A action size, D = H·A.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn

from dprl.diffusion import SolverConfig, normal_log_prob, solver_steps
from dprl.errors import ConfigError, check
from dprl.mdp.base import Chain, ExplorationConfig, Gaussian, PolicyMDP
from dprl.networks import Denoiser
from dprl.observations import TensorObservation
from dprl.policy import DiffusionPolicy

MAX_NUMBERS = 64
"""Of a chunk; its Jacobian has the square of this."""


class ExactMDP(PolicyMDP):
    """K' = 1: x_1 is the initial noise, x_0 the chunk; every denoising step is tuned."""

    policy: DiffusionPolicy
    tuned_steps = 1
    is_gaussian = False
    is_replayable = False

    def __init__(
        self, policy: DiffusionPolicy, exploration: ExplorationConfig, solver: SolverConfig | None = None
    ) -> None:
        """Give `policy` a trainable copy of its network for all of its steps, if it has none yet.

        From then on the policy samples so, and without clamping its predictions: a clamped chunk would have no density.

        Raises:
            ConfigError: the solver draws noise, the chunk is too large, or noise is to be learned.
        """
        schedule = policy.schedule.config
        own = policy.config.sampling
        if (solver or SolverConfig()) == SolverConfig() and own.solver not in ("ddim", "euler"):
            solver = SolverConfig("euler" if schedule.is_flow else "ddim", own.num_inference_steps)
        solver = (solver or SolverConfig()).over(own, schedule)
        grid = solver_steps(schedule, solver)
        ode = not any(step.std or step.previous for step in grid)
        check(ode, "solver", solver.solver, "draws noise or looks back: the density is followed through ddim or euler")
        size = policy.config.horizon * policy.features.action_size
        check(size <= MAX_NUMBERS, "horizon * action_size", size, f"must be at most {MAX_NUMBERS}: Jacobians are whole")
        learned = exploration.learned
        remedy = "must be none: the only noise is the initial one"
        check(learned.what == "none", "exploration.learned.what", learned.what, remedy)
        for name, usual in vars(ExplorationConfig()).items():
            own = getattr(exploration, name)
            check(own == usual, f"exploration.{name}", own, "must be left as it is: the only noise is the initial one")
        known = schedule.prediction_type != "sample"
        check(known, "prediction_type", schedule.prediction_type, "says nothing of the noise in a clean chunk")
        policy.tune_below(schedule.num_train_timesteps)
        policy.set_sampling(solver, clip_sample=None)
        self.policy, self.exploration, self.solver = policy, exploration, solver
        self._steps = grid
        signal, noise = (table.tolist() for table in schedule.levels())
        # from clean to noisy: each level, and the timestep at which the network leads to the next one
        self._levels = [(1.0, 0.0), *((signal[step.timestep], noise[step.timestep]) for step in reversed(grid))]
        self._timesteps = [step.timestep for step in reversed(grid)]

    def trainable(self) -> nn.Module:
        """See `PolicyMDP.trainable`."""
        parts = [self.policy.tuned, self.policy.tuned_encoder]
        return nn.ModuleList([part for part in parts if part is not None])

    def state(self) -> dict[str, Tensor]:
        """See `PolicyMDP.state`."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `PolicyMDP.restore`."""

    def begin_iteration(self, iteration: int) -> None:
        """See `PolicyMDP.begin_iteration`: nothing is annealed."""

    def cpu(self) -> Self:
        """See `PolicyMDP.cpu`."""
        if self.policy.device.type == "cpu":
            return self
        return type(self)(copy.deepcopy(self.policy).cpu(), self.exploration, self.solver)

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(1, H, A): the initial noise is all that is drawn."""
        return 1, self.policy.config.horizon, self.policy.features.action_size

    def condition(
        self, obs: TensorObservation, generator: torch.Generator | None = None, *, pretrained: bool = False
    ) -> Tensor:
        """See `PolicyMDP.condition`."""
        return self.policy.condition(obs, generator, encoder=None if pretrained else self.policy.tuned_encoder)

    def chain(
        self, condition: Tensor, draws: Tensor, *, frozen: Tensor | None = None, pretrained: bool = False
    ) -> Chain:
        """See `PolicyMDP.chain`; draws (1, B, H, A)."""
        policy, x = self.policy, draws[0]
        timesteps = [step.timestep for step in self._steps]
        known = policy.prepare_steps(timesteps, condition, condition, pretrained=pretrained)
        network = policy.base if pretrained else policy.tuned
        assert network is not None
        with torch.no_grad():
            for step, prepared in zip(self._steps, known, strict=True):
                clean = policy.schedule.predict_clean(x, network.denoise(x, prepared), step.timestep, None)
                x = step.noisy * x + step.clean * clean
        log_prob = self._log_prob(network, condition, x).detach()
        return Chain(torch.stack([draws[0], x], dim=1), log_prob[:, None], policy.action_normalizer.unnormalize(x))

    def log_prob(self, condition: Tensor, x: Tensor, x_next: Tensor, k: Tensor) -> Tensor:
        """Log-density of chunks `x_next`, each number of which gets the same share; see `PolicyMDP.log_prob`."""
        assert self.policy.tuned is not None
        return self._log_prob(self.policy.tuned, condition, x_next)

    def _log_prob(self, network: Denoiser, condition: Tensor, x_next: Tensor) -> Tensor:
        start, log_det = self._noise_of(network, condition, x_next)
        joint = normal_log_prob(start, 0.0, torch.ones_like(start)).sum((1, 2)) + log_det
        return (joint / start[0].numel())[:, None, None].expand_as(x_next)

    def noise_of(self, condition: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Follow chunks back to the noise they come from: (B, H, A) -> (B, H, A), and log |det| of the way (B,)."""
        assert self.policy.tuned is not None
        return self._noise_of(self.policy.tuned, condition, x)

    def _noise_of(self, network: Denoiser, condition: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = torch.zeros(len(x), device=x.device)
        with torch.enable_grad():
            for (now, following), timestep in zip(pairwise(self._levels), self._timesteps, strict=True):
                x = x if x.requires_grad else x.detach().requires_grad_()
                prediction = network(x, torch.tensor([timestep], device=x.device), condition)
                clean, noise = _clean_and_noise(self.policy.schedule.config.prediction_type, x, prediction, *now)
                after = following[0] * clean + following[1] * noise
                rows = [torch.autograd.grad(n.sum(), x, create_graph=True)[0] for n in after.flatten(1).unbind(1)]
                jacobian = torch.stack([row.flatten(1) for row in rows], dim=1)
                log_det = log_det + torch.linalg.slogdet(jacobian).logabsdet
                x = after
        return x, log_det

    def gaussian(self, condition: Tensor, x: Tensor, k: Tensor, *, pretrained: bool = False) -> Gaussian:
        """There is none.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("a policy whose density is followed through its ODE draws from no Gaussian")


def _clean_and_noise(kind: str, x: Tensor, prediction: Tensor, signal: float, noise: float) -> tuple[Tensor, Tensor]:
    """What a prediction says of the clean chunk and of the noise in x = signal x̂_0 + noise ε̂."""
    if kind == "epsilon":
        return (x - noise * prediction) / signal, prediction
    if kind == "v_prediction":
        return signal * x - noise * prediction, noise * x + signal * prediction
    return x + noise * prediction, x - signal * prediction  # velocity
