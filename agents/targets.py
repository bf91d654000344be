"""A rollout made ready for updates, and the minibatches of it.

Shapes: D = T·N decisions, B pairs of (decision, denoising step), K' tuned steps, O observation steps, H actions of a
chunk, A action size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dprl.observations import TensorObservation, map_parts


class Pairs(NamedTuple):
    """Denoising steps of decisions, (B,) each; an index into what is (D, K')."""

    decision: Tensor
    k: Tensor

    def at(self, rows: slice) -> Pairs:
        """Some of them."""
        return Pairs(self.decision[rows], self.k[rows])


class Targets(NamedTuple):
    """A rollout made ready for updates; the rows are its D = T·N decisions, the columns their tuned steps k."""

    observation: TensorObservation
    """(D, O, ...), not normalised."""
    chains: Tensor
    """(D, K'+1, H, A), noisiest first."""
    executed: Tensor
    """(D,) how many actions of the chunk were."""
    old_log_prob: Tensor
    """(D, K') by k."""
    advantage: Tensor
    """(D, K') by k, the denoising discount not yet applied."""
    value: Tensor
    """(D,)."""
    returns: Tensor
    """(D,)."""

    def in_place_of(self, former: Targets | None) -> Targets:
        """Return these; on a GPU, copied into `former` where its shapes are the same: see `Replayed`."""
        if not self.returns.is_cuda:
            return self
        if former is None or former._shapes() != self._shapes():
            return Targets(*(map_parts(_copy, part) for part in self))
        for place, part in zip(former, self, strict=True):
            map_parts(Tensor.copy_, place, part)
        return former

    def _shapes(self) -> list[Any]:
        return [map_parts(lambda tensor: tensor.shape, part) for part in self]

    def x(self, pairs: Pairs) -> Tensor:
        """What each step starts from, x_{k+1}: (B, H, A)."""
        return self.chains[pairs.decision, self.chains.shape[1] - 2 - pairs.k]

    def x_next(self, pairs: Pairs) -> Tensor:
        """What it made, x_k: (B, H, A)."""
        return self.chains[pairs.decision, self.chains.shape[1] - 1 - pairs.k]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)  # also of one that is expanded


def epoch(
    n_decisions: int, tuned_steps: int, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Pairs]]:
    """Yield every decision and every pair of it with the last `tuned_steps` steps once, in equal numbers of parts.

    `batch_size` is of pairs, and met as nearly as equal parts allow. A value of the state counts once for a decision,
    not once for each of its denoising steps.
    """
    n_pairs = n_decisions * tuned_steps
    parts = max(1, min(round(n_pairs / batch_size), n_pairs // 2, n_decisions))
    decisions, pairs = (torch.randperm(n, generator=generator, device=generator.device) for n in (n_decisions, n_pairs))
    for own, pair in zip(decisions.tensor_split(parts), pairs.tensor_split(parts), strict=True):
        yield own, Pairs(pair.div(tuned_steps, rounding_mode="floor"), pair % tuned_steps)
