"""Choosing among a policy's samples (best-of-N; IDQL, arXiv:2304.10573, section 4.3).

Shapes: B observations, N candidates, O observation steps, D observation size, H actions of a chunk, A action size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dprl.errors import ConfigError, check
from dprl.observations import TensorObservation, batch_size, repeated
from dprl.policy.critic import ChunkCritic
from dprl.seeding import draw_uniform

Selection = Literal["argmax", "implicit", "softmax"]


@runtime_checkable
class Scorer(Protocol):
    """Ranks chunks: any critic, or a function of a user's own."""

    def score(self, obs: TensorObservation, actions: Tensor) -> Tensor:
        """(B, O, D), or named parts, and chunks (B, H, A) in the environment's units -> (B,); higher is better."""
        ...


def best_of(
    draw: Callable[[TensorObservation], Tensor],
    obs: TensorObservation,
    candidates: int,
    scorer: Scorer | None,
    *,
    selection: Selection = "argmax",
    scale: float = 1.0,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """Draw `candidates` chunks for each observation and choose one.

    Args:
        draw: samples a chunk for each observation, (M, O, D) -> (M, H, A).
        obs: (B, O, D), or named parts.
        candidates: N.
        scorer: ranks them.
        selection: `argmax` takes the best; `softmax` draws with probability proportional to exp(score * scale);
            `implicit` by the weights that the critic's value objective implies.
        scale: of the softmax.
        generator: makes the choice. Default: torch's own.
        uniform: (B,) numbers in [0, 1) that make the choice instead.

    Returns:
        (B, H, A).

    Raises:
        ConfigError: there is no scorer, it returns what it must not, or it has no implicit weights.
    """
    if scorer is None:
        raise ConfigError(
            f"candidates = {candidates}: choosing among samples needs a scorer; set policy.scorer, or load a policy "
            "that was saved with a critic ('dprl offline' makes one)"
        )
    check(isinstance(scorer, Scorer), "scorer", type(scorer).__name__, "must have a method score(obs, actions)")
    n = batch_size(obs)
    every = repeated(obs, candidates)
    chunks = draw(every)
    scores = _scores(scorer, every, chunks, selection).view(n, candidates)
    if selection == "argmax":
        chosen = scores.argmax(1)
    else:
        best = scores.amax(1, keepdim=True)  # taken off first, so that no product is too large
        weight = scores if selection == "implicit" else torch.softmax(scale * (scores - best), dim=1)
        chosen = _pick(weight, draw_uniform((n,), generator, weight.device) if uniform is None else uniform)
    return chunks.view(n, candidates, *chunks.shape[1:])[torch.arange(n, device=chunks.device), chosen]


def _scores(scorer: Scorer, obs: TensorObservation, chunks: Tensor, selection: Selection) -> Tensor:
    """What the choice is made by: (B·N,)."""
    if selection != "implicit":
        return checked_scores(scorer.score(obs, chunks), chunks)
    if not isinstance(scorer, ChunkCritic):
        raise ConfigError(f"selection = 'implicit': {type(scorer).__name__} has no value objective; use argmax")
    return scorer.config.objective.weight(checked_scores(scorer.advantage(obs, chunks), chunks))


def checked_scores(scores: Tensor, chunks: Tensor) -> Tensor:
    """Return what a scorer said of chunks (B, H, A), where they are.

    Raises:
        ConfigError: there is no finite score for every chunk.
    """
    try:
        scores = torch.as_tensor(scores)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"scorer = {type(scores).__name__}: must return one score for each chunk: {error}") from error
    shape = tuple(scores.shape)
    check(shape == (len(chunks),), "scorer", shape, f"must return one score for each of {len(chunks)} chunks")
    check(not scores.is_complex(), "scorer", str(scores.dtype), "must return real numbers")
    scores = scores if scores.is_floating_point() else scores.float()
    check(bool(scores.isfinite().all()), "scorer", "not finite", "must return finite scores")
    return scores.to(chunks.device)


def _pick(weight: Tensor, uniform: Tensor) -> Tensor:
    """Pick a column of each row (B, N) with probability proportional to its weight; all alike where none has any."""
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, 1.0)
    edges = weight.cumsum(1)
    return (edges < uniform[:, None] * edges[:, -1:]).sum(1).clamp(max=weight.shape[1] - 1)
