"""Denoising as a Markov decision process (DPPO, arXiv:2409.00588, section 4).

One environment decision is K denoising steps of a solver. Step k, counted down from K-1 to 0, has the state
(obs, x_{k+1}) and the action x_k ~ N(mean, std²); only x_0 reaches the environment. The last K' steps are trainable.
This is the one place where the density of a denoising step is written.

Shapes: B decisions, K' tuned steps, O observation steps, F features, H actions of a chunk, A action size. All x are
normalised.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from dprl.config import validate
from dprl.diffusion import ScheduleConfig, SolverConfig, Step, normal_log_prob, posterior_steps, solver_steps
from dprl.errors import check
from dprl.networks.noise import LEAST_STD, Eta, LearnedNoiseConfig, NoiseStd
from dprl.observations import TensorObservation
from dprl.policy import DiffusionPolicy, Policy
from dprl.schedules import Anneal
from dprl.seeding import seeded_init


@dataclass(frozen=True)
class ExplorationConfig:
    """How the chain explores while it collects."""

    min_sampling_std: float = 0.1
    """Floor of every step's standard deviation while sampling, frozen steps included; normalised units."""
    min_log_prob_std: float = 0.1
    """Floor of the standard deviation in the density."""
    noise_clip: float = 3.0
    """Noise draws of the denoising steps are clamped to this many standard deviations."""
    anneal: Anneal | None = None
    """Of `min_sampling_std`, over iterations."""
    learned: LearnedNoiseConfig | None = None
    """Learn how much noise the tuned steps make. A learned std has no floors; η has."""

    def __post_init__(self) -> None:
        validate(self, at_least={"min_log_prob_std": LEAST_STD}, above={"min_sampling_std": 0, "noise_clip": 0})
        final = None if self.anneal is None else self.anneal.final
        check(final is None or final > 0, "anneal.final", final, "must be above 0, as min_sampling_std")


@dataclass(frozen=True)
class Chain:
    """The denoising trajectory of B decisions."""

    steps: Tensor
    """(B, K'+1, H, A): what the first tuned step starts from, then what each tuned step made, x_0 last."""
    log_probs: Tensor
    """(B, K', H, A): the log-density of each of them, number by number."""
    actions: Tensor
    """(B, H, A) in the environment's units."""


class Gaussian(NamedTuple):
    """What a step draws from, number by number: (B, H, A) each, or shapes that broadcast to it."""

    mean: Tensor
    std: Tensor


class PolicyMDP(ABC):
    """A policy whose decisions are chains of `tuned_steps` actions of known density, to be trained. See `Chain`."""

    policy: Policy
    tuned_steps: int
    """K'."""

    @property
    @abstractmethod
    def noise_shape(self) -> tuple[int, int, int]:
        """(draws, H, A), the normal draws of one decision."""

    @property
    def n_action_steps(self) -> int:
        """E, how many actions of a chunk are executed."""
        return self.policy.n_action_steps

    @abstractmethod
    def trainable(self) -> nn.Module:
        """Return what is trained."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs and the policy does not hold."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` returned."""

    @abstractmethod
    def begin_iteration(self, iteration: int) -> None:
        """Explore as the schedules have it in this iteration, counted from 0."""

    @abstractmethod
    def chain(self, condition: Tensor, draws: Tensor, *, pretrained: bool = False) -> Chain:
        """Make chains of normal draws, for conditions (B, O, F); see `sample`."""

    @torch.no_grad()
    def sample(
        self,
        obs: TensorObservation,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        pretrained: bool = False,
    ) -> Chain:
        """Draw a chain for each observation, exploring.

        Args:
            obs: (B, O, D), or named parts; not normalised.
            noise: (draws, B, H, A), every normal draw in the order of its use. Replays a chain exactly.
            generator: draws the noise where `noise` is not given. Default: torch's own.
            pretrained: what the policy would have drawn before it was tuned.

        Raises:
            ConfigError: an observation or noise that does not fit, or is not finite.
        """
        condition = self.policy.condition(self.policy.checked(obs))
        n_draws, *chunk = self.noise_shape
        shape = (n_draws, len(condition), *chunk)
        return self.chain(condition, self.policy.drawn(shape, noise, generator), pretrained=pretrained)

    @abstractmethod
    def log_prob(self, condition: Tensor, x: Tensor, x_next: Tensor, k: Tensor) -> Tensor:
        """Log-density of tuned steps, number by number.

        Args:
            condition: (B, O, F), `policy.condition(obs)`.
            x: (B, H, A) before the step.
            x_next: (B, H, A) after it.
            k: (B,) which step, from K'-1 (noisiest) to 0.

        Returns:
            (B, H, A).
        """

    @abstractmethod
    def gaussian(self, condition: Tensor, x: Tensor, k: Tensor, *, pretrained: bool = False) -> Gaussian:
        """Return what tuned steps draw from, now or before the policy was tuned; see `log_prob`."""

    @abstractmethod
    def cpu(self) -> Self:
        """Return this, or a copy of it on the CPU, for workers without an accelerator."""


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
        self.policy = policy
        self.tuned_steps = tuned_steps
        self.exploration = exploration
        self.solver = solver
        self._seed = seed
        self._grid = grid
        self._timesteps = torch.tensor([step.timestep for step in reversed(grid)], device=policy.device)  # by k
        self.noise = _noise(policy, grid, tuned_steps, exploration, solver, seed).to(policy.device)

    def trainable(self) -> nn.Module:
        """See `PolicyMDP.trainable`: the tuned network, and the noise where it is learned."""
        assert self.policy.tuned is not None
        return nn.ModuleList([self.policy.tuned, self.noise])

    def state(self) -> dict[str, Tensor]:
        """See `PolicyMDP.state`."""
        return self.noise.state_dict()

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `PolicyMDP.restore`."""
        self.noise.load_state_dict(state)

    def begin_iteration(self, iteration: int) -> None:
        """See `PolicyMDP.begin_iteration`."""
        self.noise.begin_iteration(iteration)

    def cpu(self) -> Self:
        """See `PolicyMDP.cpu`."""
        if self.policy.device.type == "cpu":
            return self
        copied = type(self)(copy.deepcopy(self.policy).cpu(), self.tuned_steps, self.exploration, self.solver)
        copied.noise.load_state_dict(self.noise.state_dict())
        return copied

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(K+1, H, A), the normal draws of one decision: x_K, then one for each denoising step."""
        return len(self._grid) + 1, self.policy.config.horizon, self.policy.features.action_size

    @torch.no_grad()
    def chain(self, condition: Tensor, draws: Tensor, *, pretrained: bool = False) -> Chain:
        """See `PolicyMDP.chain`; draws (K+1, B, H, A)."""
        policy, clip = self.policy, self.policy.config.clip_sample
        x, z = draws[0], draws[1:].clamp(-self.exploration.noise_clip, self.exploration.noise_clip)
        steps = self.noise.of_chain(condition)
        made, chain = steps.std * z, []
        timesteps = [step.timestep for step in self._grid]
        known = policy.prepare_steps(timesteps, condition, pretrained=pretrained)
        for i, t in enumerate(timesteps):
            if len(timesteps) - i <= self.tuned_steps:
                chain.append(x)
            network = policy.base if pretrained else policy.denoiser_at(t)
            clean = policy.schedule.predict_clean(x, network.denoise(x, next(known)), t, clip)
            x = steps.noisy[i] * x + steps.clean[i] * clean + made[i]
        log_probs = normal_log_prob(made[-self.tuned_steps :], 0.0, steps.density_std)
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
        step = self.noise.of_pairs(condition, k)
        return Gaussian(step.noisy * x + step.clean * clean, step.density_std)


# ------------------------------------------------------------------------------------------- how much noise is made


class _Chains(NamedTuple):
    """x' = noisy x + clean x̂_0 + std z for each step, noisiest first; what is learned differs between decisions."""

    noisy: Sequence[float | Tensor]
    clean: Sequence[float | Tensor]
    std: Tensor
    """(K, 1 or B, 1 or H, 1 or A), what is drawn with."""
    density_std: Tensor
    """(K', 1 or B, 1 or H, 1 or A), what the density of the tuned steps has."""


class _Pairs(NamedTuple):
    """The same of one tuned step each: (B, 1 or H, 1 or A)."""

    noisy: Tensor
    clean: Tensor
    density_std: Tensor


class _FlooredNoise(nn.Module):
    """The solver's own standard deviations, with floors."""

    table: Tensor
    solver_std: Tensor
    std: Tensor
    density_std: Tensor

    def __init__(self, grid: Sequence[Step], tuned_steps: int, exploration: ExplorationConfig) -> None:
        super().__init__()
        self.n, self.exploration = tuned_steps, exploration
        self.floor, self.density_floor = exploration.min_sampling_std, exploration.min_log_prob_std
        self.noisy, self.clean = [step.noisy for step in grid], [step.clean for step in grid]
        std = torch.tensor([step.std for step in grid]).view(-1, 1, 1, 1)
        density_std = std[-tuned_steps:].clamp(min=self.density_floor)
        self.register_buffer("solver_std", std, persistent=False)
        self.register_buffer("std", std.clamp(min=self.floor), persistent=False)
        self.register_buffer("density_std", density_std, persistent=False)
        by_k = [[s.noisy, s.clean, max(s.std, self.density_floor)] for s in reversed(grid)]
        self.register_buffer("table", torch.tensor(by_k)[..., None, None], persistent=False)

    def begin_iteration(self, iteration: int) -> None:
        """Set the floor of sampling that the schedule has in this iteration."""
        if self.exploration.anneal is not None:
            self.floor = self.exploration.anneal.at(iteration, self.exploration.min_sampling_std)
            self.std = self.solver_std.clamp(min=self.floor)

    def of_chain(self, condition: Tensor) -> _Chains:
        """Return all steps, for conditions (B, O, F)."""
        return _Chains(self.noisy, self.clean, self.std, self.density_std)

    def of_pairs(self, condition: Tensor, k: Tensor) -> _Pairs:
        """Return steps k (B,), for conditions (B, O, F)."""
        noisy, clean, std = self.table[k].unbind(1)
        return _Pairs(noisy, clean, std)


class _LearnedStd(_FlooredNoise):
    """The tuned steps' standard deviations come from a network, in sampling and density alike (ReinFlow)."""

    timesteps: Tensor

    def __init__(self, grid: Sequence[Step], tuned_steps: int, exploration: ExplorationConfig, net: NoiseStd) -> None:
        super().__init__(grid, tuned_steps, exploration)
        self.net = net
        by_k = torch.tensor([step.timestep for step in reversed(grid)])[:tuned_steps]
        self.register_buffer("timesteps", by_k, persistent=False)

    def of_chain(self, condition: Tensor) -> _Chains:
        """See `_FlooredNoise.of_chain`."""
        std = torch.stack([self.net(condition, t[None]) for t in self.timesteps.flip(0)])
        frozen = self.std[: -self.n].expand(-1, *std.shape[1:])
        return _Chains(self.noisy, self.clean, torch.cat([frozen, std]), std)

    def of_pairs(self, condition: Tensor, k: Tensor) -> _Pairs:
        """See `_FlooredNoise.of_pairs`."""
        return super().of_pairs(condition, k)._replace(density_std=self.net(condition, self.timesteps[k]))


class _LearnedEta(_FlooredNoise):
    """DDIM's η of the tuned steps comes from a network; it is in the mean too (arXiv:2010.02502, eq. 12)."""

    levels: Tensor

    def __init__(
        self,
        grid: Sequence[Step],
        tuned_steps: int,
        exploration: ExplorationConfig,
        net: Eta,
        schedule: ScheduleConfig,
    ) -> None:
        super().__init__(grid, tuned_steps, exploration)
        self.net = net
        signal, noise = schedule.levels()
        visited = [step.timestep for step in grid]
        s, n = signal[visited], noise[visited]
        s_next, n_next = torch.cat([s[1:], torch.ones(1)]), torch.cat([n[1:], torch.zeros(1)])
        largest = n_next / n * (1 - (s / s_next) ** 2).sqrt()  # σ at η = 1
        by_k = torch.stack([s, n, s_next, n_next, largest], dim=1).flip(0)[:tuned_steps]
        self.register_buffer("levels", by_k.float()[..., None, None], persistent=False)

    def of_chain(self, condition: Tensor) -> _Chains:
        """See `_FlooredNoise.of_chain`."""
        eta = self.net(condition)
        steps = [self._step(eta, level) for level in self.levels.flip(0)]
        noisy, clean, std = zip(*steps, strict=True)
        frozen = self.std[: -self.n].expand(-1, *std[0].shape)
        return _Chains(
            [*self.noisy[: -self.n], *noisy],
            [*self.clean[: -self.n], *clean],
            torch.cat([frozen, torch.stack(std).clamp(min=self.floor)]),
            torch.stack(std).clamp(min=self.density_floor),
        )

    def of_pairs(self, condition: Tensor, k: Tensor) -> _Pairs:
        """See `_FlooredNoise.of_pairs`."""
        noisy, clean, std = self._step(self.net(condition), self.levels[k].transpose(0, 1))
        return _Pairs(noisy, clean, std.clamp(min=self.density_floor))

    def _step(self, eta: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients of x and x̂_0, and σ: η (B, 1, A or 1) and five levels, each (1, 1) or (B, 1, 1)."""
        s, n, s_next, n_next, largest = level
        std = eta * largest
        noisy = (n_next**2 - std**2).clamp(min=1e-20).sqrt() / n  # the root of 0 has no gradient
        return noisy, s_next - noisy * s, std


def _noise(
    policy: DiffusionPolicy,
    grid: Sequence[Step],
    tuned_steps: int,
    exploration: ExplorationConfig,
    solver: SolverConfig,
    seed: int,
) -> _FlooredNoise:
    learned = exploration.learned
    if learned is None:
        return _FlooredNoise(grid, tuned_steps, exploration)
    features, horizon = policy.features, policy.config.horizon
    size = policy.config.n_obs_steps * policy.feature_size
    with seeded_init(seed, "noise"):
        if learned.what == "std":
            return _LearnedStd(grid, tuned_steps, exploration, NoiseStd(size, horizon, features.action_size, learned))
        check(solver.solver == "ddim", "solver", solver.solver, "has no eta to learn; use ddim, or learn the std")
        eta = Eta(size, features.action_size, learned)
        return _LearnedEta(grid, tuned_steps, exploration, eta, policy.schedule.config)
