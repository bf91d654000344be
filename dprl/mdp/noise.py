"""How much noise the denoising steps make: the solver's own with floors, or what is learned.

Shapes: B decisions or pairs, K denoising and K' tuned steps, H actions of a chunk, A action size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dprl.diffusion import ScheduleConfig, SolverConfig, Step
from dprl.errors import check
from dprl.mdp.base import ExplorationConfig
from dprl.networks.noise import Eta, NoiseStd
from dprl.policy import DiffusionPolicy
from dprl.seeding import seeded_init


class ChainSteps(NamedTuple):
    """x' = noisy x + clean x̂_0 + std z for each step, noisiest first; what is learned differs between decisions."""

    noisy: Sequence[float | Tensor]
    clean: Sequence[float | Tensor]
    std: Tensor
    """(K, 1 or B, 1 or H, 1 or A), what is drawn with."""
    density_std: Tensor
    """(K', 1 or B, 1 or H, 1 or A), what the density of the tuned steps has."""


class PairSteps(NamedTuple):
    """The same of one tuned step each: (B, 1 or H, 1 or A)."""

    noisy: Tensor
    clean: Tensor
    density_std: Tensor


class FlooredNoise(nn.Module):
    """The solver's own standard deviations, with floors."""

    floor: Tensor
    density_floor: Tensor
    table: Tensor
    solver_std: Tensor
    std: Tensor
    density_std: Tensor

    def __init__(self, grid: Sequence[Step], tuned_steps: int, exploration: ExplorationConfig) -> None:
        super().__init__()
        self.n, self.exploration = tuned_steps, exploration
        self.noisy, self.clean = [step.noisy for step in grid], [step.clean for step in grid]
        std = torch.tensor([step.std for step in grid]).view(-1, 1, 1, 1)
        by_k = [[s.noisy, s.clean] for s in reversed(grid)]
        for name, value in (
            ("solver_std", std), ("std", std.clone()), ("density_std", std[-tuned_steps:].clone()),
            ("floor", torch.zeros(())), ("density_floor", torch.zeros(())),
            ("table", torch.tensor(by_k)[..., None, None]),
        ):  # fmt: skip
            self.register_buffer(name, value, persistent=False)
        self.set_floor(exploration.min_sampling_std)

    def begin_iteration(self, iteration: int) -> None:
        """Set the floors that the schedule has in this iteration."""
        self.set_floor(self.exploration.anneal.at(iteration, self.exploration.min_sampling_std))

    def set_floor(self, floor: float) -> None:
        """Draw with at least this standard deviation; the density's floor is no lower."""
        self.floor.fill_(floor)
        self.density_floor.fill_(max(floor, self.exploration.min_log_prob_std))
        self.std.copy_(self.solver_std.clamp(min=self.floor))
        self.density_std.copy_(self.solver_std[-self.n :].clamp(min=self.density_floor))

    def of_chain(self, condition: Tensor) -> ChainSteps:
        """Return all steps, for conditions (B, O, F)."""
        return ChainSteps(self.noisy, self.clean, self.std, self.density_std)

    def of_pairs(self, condition: Tensor, k: Tensor) -> PairSteps:
        """Return steps k (B,), for conditions (B, O, F)."""
        noisy, clean = self.table[k].unbind(1)
        return PairSteps(noisy, clean, self.density_std.flatten().flip(0)[k].view(-1, 1, 1))


class LearnedStd(FlooredNoise):
    """The tuned steps' standard deviations come from a network, in sampling and density alike (ReinFlow)."""

    timesteps: Tensor

    def __init__(self, grid: Sequence[Step], tuned_steps: int, exploration: ExplorationConfig, net: NoiseStd) -> None:
        super().__init__(grid, tuned_steps, exploration)
        self.net = net
        by_k = torch.tensor([step.timestep for step in reversed(grid)])[:tuned_steps]
        self.register_buffer("timesteps", by_k, persistent=False)

    def of_chain(self, condition: Tensor) -> ChainSteps:
        """See `FlooredNoise.of_chain`."""
        std = torch.stack([self.net(condition, t[None]) for t in self.timesteps.flip(0)])
        frozen = self.std[: -self.n].expand(-1, *std.shape[1:])
        return ChainSteps(self.noisy, self.clean, torch.cat([frozen, std]), std)

    def of_pairs(self, condition: Tensor, k: Tensor) -> PairSteps:
        """See `FlooredNoise.of_pairs`."""
        return super().of_pairs(condition, k)._replace(density_std=self.net(condition, self.timesteps[k]))


class LearnedEta(FlooredNoise):
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
        reach = float(largest[-tuned_steps:].max()) * exploration.learned.highest
        for name in ("min_sampling_std", "min_log_prob_std"):
            floor = getattr(exploration, name)
            check(
                floor < reach, f"exploration.{name}", floor, f"must be below {reach:.3f}, which no learned eta exceeds"
            )
        by_k = torch.stack([s, n, s_next, n_next, largest], dim=1).flip(0)[:tuned_steps]
        self.register_buffer("levels", by_k.float()[..., None, None], persistent=False)

    def of_chain(self, condition: Tensor) -> ChainSteps:
        """See `FlooredNoise.of_chain`."""
        eta = self.net(condition)
        steps = [self._step(eta, level) for level in self.levels.flip(0)]
        noisy, clean, std = zip(*steps, strict=True)
        frozen = self.std[: -self.n].expand(-1, *std[0].shape)
        return ChainSteps(
            [*self.noisy[: -self.n], *noisy],
            [*self.clean[: -self.n], *clean],
            torch.cat([frozen, torch.stack(std).clamp(min=self.floor)]),
            torch.stack(std).clamp(min=self.density_floor),
        )

    def of_pairs(self, condition: Tensor, k: Tensor) -> PairSteps:
        """See `FlooredNoise.of_pairs`."""
        noisy, clean, std = self._step(self.net(condition), self.levels[k].transpose(0, 1))
        return PairSteps(noisy, clean, std.clamp(min=self.density_floor))

    def _step(self, eta: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients of x and x̂_0, and σ: η (B, 1, A or 1) and five levels, each (1, 1) or (B, 1, 1)."""
        s, n, s_next, n_next, largest = level
        std = eta * largest
        noisy = (n_next**2 - std**2).clamp(min=1e-20).sqrt() / n  # the root of 0 has no gradient
        return noisy, s_next - noisy * s, std


def step_noise(
    policy: DiffusionPolicy,
    grid: Sequence[Step],
    tuned_steps: int,
    exploration: ExplorationConfig,
    solver: SolverConfig,
    seed: int,
) -> FlooredNoise:
    """Return the noise that `exploration` asks for.

    Raises:
        ConfigError: eta is to be learned of a solver that has none.
    """
    learned = exploration.learned
    if learned.what == "none":
        return FlooredNoise(grid, tuned_steps, exploration)
    moves = exploration.anneal.iterations == 0 or learned.what == "eta" or tuned_steps < len(grid)
    check(moves, "exploration.anneal.iterations", exploration.anneal.iterations,
          "must be 0: a learned std has no floor, and every step's is learned")  # fmt: skip
    features, horizon = policy.features, policy.config.horizon
    size = policy.config.n_obs_steps * policy.feature_size
    with seeded_init(seed, "noise"):
        if learned.what == "std":
            return LearnedStd(grid, tuned_steps, exploration, NoiseStd(size, horizon, features.action_size, learned))
        check(solver.solver == "ddim", "solver", solver.solver, "has no eta to learn; use ddim, or learn the std")
        eta = Eta(size, features.action_size, learned)
        return LearnedEta(grid, tuned_steps, exploration, eta, policy.schedule.config)
