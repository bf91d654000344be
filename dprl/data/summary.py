"""What is in a data set, for people to look at: read one episode at a time.

Shapes: n episodes, D observation size, A action size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dprl.data.source import Source
from dprl.spec import BoolArray, FloatArray, IntArray

SAMPLED = 100_000
"""About so many actions are kept for histograms, drawn from all steps."""


@dataclass(frozen=True)
class Summary:
    """What a data set holds."""

    format: str
    env_id: str | None
    observation_size: int
    action_size: int
    parts: dict[str, int]
    """What the numbers of an observation are, in their order: name -> how many; empty where they have no names."""
    cameras: dict[str, tuple[int, ...]]
    """Name -> (height, width, channels)."""
    lengths: IntArray
    """(n,) steps."""
    returns: FloatArray | None
    """(n,) sums of rewards; None where there are none."""
    success: BoolArray | None
    """(n,); None where nobody knows."""
    terminated: BoolArray
    """(n,)."""
    final_known: BoolArray
    """(n,) whether it is known what the last action led to."""
    observation_limits: FloatArray
    """(2, D) least and largest."""
    action_limits: FloatArray
    """(2, A)."""
    action_mean: FloatArray
    """(A,)."""
    actions: FloatArray
    """(about SAMPLED or fewer, A) some of them."""


def summarize(source: Source, on_progress: Callable[[int], None] | None = None) -> Summary:
    """Read all episodes, without their images.

    Args:
        source: from `open_dataset`.
        on_progress: called with the number of episodes that were just read.

    Raises:
        DatasetError: an episode is damaged.
    """
    steps, rng = sum(source.lengths), np.random.default_rng(0)
    returns, success, terminated, known, actions = [], [], [], [], []
    lows, highs, sums = [], [], []
    cameras, parts = dict[str, tuple[int, ...]](), dict[str, int]()
    for episode in source:
        returns.append(None if episode.rewards is None else float(episode.rewards.sum(dtype=np.float64)))
        success.append(episode.success)
        terminated.append(episode.terminated)
        known.append(episode.final_known)
        kept = rng.random(len(episode)) * steps < SAMPLED  # all, where there are no more
        actions.append(episode.actions[kept])
        sums.append(episode.actions.sum(axis=0, dtype=np.float64))
        both = np.concatenate([episode.observations[: len(episode)], episode.actions], axis=1)
        lows.append(both.min(axis=0))
        highs.append(both.max(axis=0))
        sizes = episode.observations.shape[1], episode.actions.shape[1]
        parts = dict(episode.parts)
        cameras = cameras or {name: frames.shape for name, frames in episode.images.items()}
        if on_progress is not None:
            on_progress(1)
    limits = np.stack([np.min(lows, axis=0), np.max(highs, axis=0)])
    return Summary(
        source.format, source.env_id, *sizes, parts, cameras, np.asarray(source.lengths),
        None if None in returns else np.array(returns),
        None if None in success else np.array(success, np.bool_),
        np.array(terminated), np.array(known), limits[:, : sizes[0]], limits[:, sizes[0] :],
        np.sum(sums, axis=0) / steps, np.concatenate(actions),
    )  # fmt: skip
