"""Implicit behaviour cloning: an energy of observation and action whose minimum is the action (arXiv:2109.00137).

Shapes: B samples, O observation steps, F features of one observation step, H actions of a chunk, A action size,
S candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from dprl.config import validate
from dprl.networks.mlp import ResidualMLP
from dprl.observations import TensorObservation, batch_size
from dprl.policy.base import Policy
from dprl.policy.explicit import ExplicitConfig, draw_category
from dprl.seeding import draw_normal, draw_uniform, torch_generator

BOX = 1.05
"""Candidates lie within ± this, in normalised units."""


@dataclass(frozen=True)
class IBCConfig(ExplicitConfig):
    """An energy-based policy trained by InfoNCE."""

    n_negatives: int = 64
    """Counter-examples for each demonstrated chunk, uniform in the box of actions."""
    inference: Literal["derivative_free", "langevin"] = "derivative_free"
    """How it searches for low energy."""
    n_candidates: int = 256
    """S, chunks that the search moves."""
    n_iterations: int = 3
    """Rounds of the derivative-free search: resample by exp(-energy), then disturb."""
    search_std: float = 0.33
    """Disturbance of its first round; it halves with each."""
    langevin_steps: int = 50
    """Steps of the Langevin search."""
    langevin_step_size: float = 0.1
    """Its first step size, which decays quadratically to a hundred-thousandth."""
    langevin_noise_scale: float = 1.0
    """Standard deviation of a step's noise over its size."""
    langevin_clip: float = 0.1
    """Largest move in one step, in normalised units."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("n_negatives", "n_candidates", "n_iterations", "langevin_steps")
        positive = ("search_std", "langevin_step_size", "langevin_clip")
        least = {**dict.fromkeys(counts, 1), "langevin_noise_scale": 0}
        validate(self, at_least=least, above=dict.fromkeys(positive, 0))


class IBCPolicy(Policy):
    """Outputs the energy of a chunk."""

    name = "ibc"
    weighs_samples = False
    config_class = IBCConfig
    config: IBCConfig

    def _build(self, feature_size: int) -> None:
        config = self.config
        n_inputs = config.n_obs_steps * feature_size + config.horizon * self.features.action_size
        self.net = ResidualMLP(n_inputs, 1, config.hidden_size, config.n_blocks, config.activation)

    def energy(self, condition: Tensor, chunks: Tensor) -> Tensor:
        """(B, O, F) and (B, S, H, A) -> (B, S)."""
        seen = condition.flatten(1)[:, None].expand(-1, chunks.shape[1], -1)
        return cast("Tensor", self.net(torch.cat([seen, chunks.flatten(2)], dim=-1)).squeeze(-1))

    def loss(
        self, obs: TensorObservation, actions: Tensor, *, valid: Tensor | None = None, generator: torch.Generator
    ) -> Tensor:
        """Return InfoNCE: the cross-entropy of telling the demonstrated chunk from uniform ones, see `Policy.loss`."""
        shown = self.targets(obs, actions, valid)[:, None]
        shape = (len(actions), self.config.n_negatives, *actions.shape[1:])
        negatives = BOX * (2 * draw_uniform(shape, generator, actions.device) - 1)
        chunks = torch.cat([shown, negatives], dim=1)
        if valid is not None:  # what only fills up is the same in all of them
            chunks = chunks * valid[:, None, :, None]
        condition = self.condition(obs, generator if self.training else None)
        return -(-self.energy(condition, chunks).float()).log_softmax(-1)[:, 0].mean()

    @torch.no_grad()
    def sample(
        self, obs: TensorObservation, *, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Search for low energy and draw among what was found, see `Policy.sample`.

        At temperature 0 it takes the lowest, and the search draws the same for every observation. The derivative-free
        search weighs the candidates anew in every round, so that likelier modes are drawn more often than they were
        demonstrated.
        """
        if temperature == 0:
            same = [torch_generator(0, "deterministic", device=self.device) for _ in range(batch_size(obs))]
            rows = self.condition(self.checked(obs)).split(1)
            return torch.cat([self._search(row, one, 0.0) for row, one in zip(rows, same, strict=True)])
        return self._search(self.condition(self.checked(obs)), generator, temperature)

    def _search(self, condition: Tensor, generator: torch.Generator | None, temperature: float) -> Tensor:
        """(B, O, F) -> (B, H, A) in the environment's units."""
        shape = (len(condition), self.config.n_candidates, self.config.horizon, self.features.action_size)
        chunks = BOX * (2 * draw_uniform(shape, generator, condition.device) - 1)
        search = self._derivative_free if self.config.inference == "derivative_free" else self._langevin
        chunks = search(condition, chunks, generator)
        picked = draw_category(-self.energy(condition, chunks), temperature, generator)
        return self.action_normalizer.unnormalize(chunks[torch.arange(len(picked)), picked])

    def _derivative_free(self, condition: Tensor, chunks: Tensor, generator: torch.Generator | None) -> Tensor:
        """Algorithm 1 of the paper: resample in proportion to exp(-energy), disturb, shrink."""
        std = self.config.search_std
        rows = torch.arange(len(chunks), device=chunks.device)[:, None]
        for _ in range(self.config.n_iterations):
            weights = (-self.energy(condition, chunks)).softmax(-1)
            if generator is not None and generator.device != weights.device:
                weights = weights.to(generator.device)
            picked = torch.multinomial(weights, chunks.shape[1], replacement=True, generator=generator)
            chunks = chunks[rows, picked.to(chunks.device)]
            chunks = (chunks + std * draw_normal(chunks.shape, generator, chunks.device)).clamp(-BOX, BOX)
            std /= 2
        return chunks

    def _langevin(self, condition: Tensor, chunks: Tensor, generator: torch.Generator | None) -> Tensor:
        """Stochastic gradient Langevin dynamics with a decaying step, appendix B.3."""
        config = self.config
        n, first = config.langevin_steps, config.langevin_step_size
        for i in range(n):
            size = max(first * (1 - i / max(n - 1, 1)) ** 2, 1e-5 * first)
            with torch.enable_grad():
                chunks.requires_grad_(True)
                (gradient,) = torch.autograd.grad(self.energy(condition, chunks).sum(), chunks)
            noise = draw_normal(chunks.shape, generator, chunks.device)
            move = -size * (0.5 * gradient - config.langevin_noise_scale * noise)
            chunks = (chunks.detach() + move.clamp(-config.langevin_clip, config.langevin_clip)).clamp(-BOX, BOX)
        return chunks
