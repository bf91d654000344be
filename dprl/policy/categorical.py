"""Policies over discrete bins: one softmax per number, and k-means bins of whole chunks with learned offsets (BeT).

Competitors of arXiv:2303.04137, section V; BeT is arXiv:2206.11251.

Shapes: B samples, O observation steps, H actions of a chunk, A action size, C bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from dprl.config import validate
from dprl.errors import DatasetError, check
from dprl.observations import TensorObservation
from dprl.policy.base import masked_mean
from dprl.policy.explicit import ExplicitConfig, ExplicitMLP, draw_category
from dprl.seeding import torch_generator

if TYPE_CHECKING:
    from dprl.data import Episodes

KMEANS_ITERATIONS = 50


@dataclass(frozen=True)
class CategoricalConfig(ExplicitConfig):
    """One softmax over equal bins for each number of the chunk, independent of the others."""

    n_bins: int = 31
    """C."""

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self, at_least={"n_bins": 2})


@dataclass(frozen=True)
class BeTConfig(ExplicitConfig):
    """One softmax over k-means clusters of demonstrated chunks, and an offset from each cluster's centre."""

    n_bins: int = 32
    """C, clusters."""
    offset_loss_scale: float = 100.0
    """Weight of the offset's squared error against the classification loss."""
    focal_gamma: float = 2.0
    """Of the focal classification loss (arXiv:1708.02002); 0 is cross-entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self, at_least={"n_bins": 1, "offset_loss_scale": 0, "focal_gamma": 0})
        smooth = self.focal_gamma == 0 or self.focal_gamma >= 1
        check(smooth, "focal_gamma", self.focal_gamma, "must be 0 or at least 1: the loss has no gradient otherwise")


class CategoricalPolicy(ExplicitMLP):
    """Outputs logits (H, A, C)."""

    name = "categorical"
    config_class = CategoricalConfig
    config: CategoricalConfig

    def _n_outputs(self) -> int:
        return self._chunk_size * self.config.n_bins

    def _logits(self, obs: TensorObservation, generator: torch.Generator | None = None) -> Tensor:
        shape = (self.config.horizon, self.features.action_size, self.config.n_bins)
        logits: Tensor = self._outputs(obs, generator).unflatten(-1, shape)
        return logits

    def loss(
        self, obs: TensorObservation, actions: Tensor, *, valid: Tensor | None = None, generator: torch.Generator
    ) -> Tensor:
        """Return the cross-entropy of the bins that hold the actions, see `Policy.loss`."""
        n = self.config.n_bins
        bins = ((self.targets(obs, actions, valid) + 1) / 2 * n).long().clamp(0, n - 1)
        logits = self._logits(obs, generator)
        entropy = nn.functional.cross_entropy(logits.flatten(0, 2), bins.flatten(), reduction="none")
        return masked_mean(entropy.view(bins.shape), valid)

    @torch.no_grad()
    def sample(
        self, obs: TensorObservation, *, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Return the centres of drawn bins; at temperature 0 of the likeliest. See `Policy.sample`."""
        bins = draw_category(self._logits(self.checked(obs)), temperature, generator)
        return self.action_normalizer.unnormalize((bins + 0.5) / self.config.n_bins * 2 - 1)


class BeTPolicy(ExplicitMLP):
    """Outputs logits (C,) and offsets (C, H, A); the centres come from the data."""

    name = "bet"
    weighs_samples = False
    config_class = BeTConfig
    config: BeTConfig
    centers: Tensor

    def _build(self, feature_size: int) -> None:
        super()._build(feature_size)
        self.register_buffer("centers", torch.zeros(self.config.n_bins, self._chunk_size))

    def _n_outputs(self) -> int:
        return self.config.n_bins * (1 + self._chunk_size)

    def fit_actions(self, data: Episodes, seed: int) -> None:
        """Cluster the demonstrated chunks; DatasetError where there are fewer of them than clusters."""
        horizon = self.config.horizon
        rows = data.chunks(self.config.n_obs_steps, horizon, pad_after=horizon - 1).action_rows
        if len(rows) < self.config.n_bins:
            raise DatasetError(f"{len(rows)} chunks of {self.config.horizon} actions make no {self.config.n_bins} bins")
        chunks = self.action_normalizer.normalize(torch.as_tensor(np.asarray(data.actions)[rows])).flatten(1)
        self.centers.copy_(kmeans(chunks, self.config.n_bins, torch_generator(seed, "bins")))

    def _heads(self, obs: TensorObservation, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        logits, offsets = self._outputs(obs, generator).split(
            [self.config.n_bins, self.config.n_bins * self._chunk_size], dim=-1
        )
        return logits, offsets.unflatten(-1, (self.config.n_bins, self._chunk_size))

    def loss(
        self, obs: TensorObservation, actions: Tensor, *, valid: Tensor | None = None, generator: torch.Generator
    ) -> Tensor:
        """Return focal loss of the nearest centre plus scaled squared error of its offset, see `Policy.loss`."""
        target = self.targets(obs, actions, valid)
        if valid is None:
            valid = torch.ones(target.shape[:2], device=target.device)
        mask = valid[..., None].expand_as(target).flatten(1).to(target)
        distance = ((target.flatten(1)[:, None] - self.centers) ** 2 * mask[:, None]).sum(-1)
        nearest = distance.argmin(-1)
        logits, offsets = self._heads(obs, generator)
        log_prob = logits.log_softmax(-1).gather(-1, nearest[:, None]).squeeze(-1)
        focal = -((1 - log_prob.exp()) ** self.config.focal_gamma) * log_prob
        rows = torch.arange(len(nearest), device=nearest.device)
        predicted = self._chunk(self.centers[nearest] + offsets[rows, nearest])
        return focal.mean() + self.config.offset_loss_scale * masked_mean((predicted - target) ** 2, valid)

    @torch.no_grad()
    def sample(
        self, obs: TensorObservation, *, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Return a drawn centre moved by its offset; at temperature 0 the likeliest. See `Policy.sample`."""
        logits, offsets = self._heads(self.checked(obs))
        drawn = draw_category(logits, temperature, generator)
        rows = torch.arange(len(drawn), device=drawn.device)
        return self.action_normalizer.unnormalize(self._chunk(self.centers[drawn] + offsets[rows, drawn]))


def kmeans(points: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Cluster `points` (n, size) by Lloyd's algorithm from k-means++ seeds; return the centres (n_clusters, size)."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = torch.full((len(points),), torch.inf)
    for _ in range(n_clusters - 1):
        nearest = torch.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(-1))
        weights = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    centers = points[chosen].clone()
    for _ in range(KMEANS_ITERATIONS):
        label = torch.cdist(points, centers).argmin(-1)
        count = torch.bincount(label, minlength=n_clusters)[:, None]
        mean = torch.zeros_like(centers).index_add_(0, label, points) / count.clamp(min=1)
        moved = torch.where(count > 0, mean, centers)
        if moved.equal(centers):
            break
        centers = moved
    return centers
