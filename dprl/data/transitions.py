"""Decisions cut out of episodes, for algorithms that learn values from data.

A decision is a chunk of E actions that are executed one after the other, then what they led to. Every step of an
episode begins one. A chunk that reaches its episode's end is executed up to there; what lies beyond repeats the last
action, so that what was not executed says nothing.

Shapes: N decisions, O observation steps, E executed actions.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dprl.data.episodes import Episodes
from dprl.errors import DatasetError, check, check_count
from dprl.spec import BoolArray, FloatArray, IntArray

MUCH = 0.5
"""Share of what was earned; if more than this is left out, it is told."""
UNUSUAL = 3.0
"""How much more decisions that are left out earned than others, on average; if more, it is told."""


@dataclass(frozen=True)
class Decisions:
    """Which steps each decision is made of, and what it earned."""

    observation_rows: IntArray
    """(N, O) of what it saw."""
    action_rows: IntArray
    """(N, E); past the episode's end the last action's."""
    n_steps: IntArray
    """(N,) how many of them were executed."""
    next_rows: IntArray
    """(N, O) of what it led to: rows of the observations, followed by those of the final ones."""
    rewards: FloatArray
    """(N,) what the executed steps earned, see `chunk_return`."""
    discounts: FloatArray
    """(N,) of what follows: gamma to the power of the executed steps, 0 where the episode terminated."""

    def __len__(self) -> int:
        return len(self.action_rows)


def chunk_return(rewards: FloatArray, gamma: float) -> FloatArray:
    """Return the n-step return of chunks, the sum of gamma^i r_i: rewards (..., E), 0 where none was executed -> (...).

    Float32, summed in float64.
    """
    returns: FloatArray = (rewards @ gamma ** np.arange(rewards.shape[-1])).astype(np.float32)
    return returns


def returns_to_go(data: Episodes, gamma: float, termination_penalty: float = 0.0) -> FloatArray:
    """Return what is earned from each step to its episode's end, the sum of gamma^i r_i: (S,) float32.

    Args:
        data: with rewards. Where an episode was cut off nothing is taken to follow.
        gamma: discount of one environment step.
        termination_penalty: taken from the last reward of an episode that terminated.

    Raises:
        DatasetError: the data have no rewards.
    """
    _require_any_rewards(data)
    rewards = np.asarray(data.rewards, np.float64)
    rewards[data.ends[data.terminated] - 1] -= termination_penalty
    last, returns, following = set((data.ends - 1).tolist()), np.empty(len(rewards), np.float32), 0.0
    for step in range(len(rewards) - 1, -1, -1):
        following = rewards[step] + (0.0 if step in last else gamma * following)
        returns[step] = following
    return returns


def decisions(
    data: Episodes, n_obs_steps: int, n_action_steps: int, gamma: float, *, bootstrap_truncated: bool | None = None
) -> Decisions:
    """Cut every decision out of `data`.

    Left out is a decision after which nobody knows what follows: its episode was cut off there, and what its last
    action led to was not kept. There is a warning where most of what was earned is left out with them, or where nothing
    was earned at all.

    Args:
        data: with rewards.
        n_obs_steps: O; before an episode's start its first observation is repeated.
        n_action_steps: E.
        gamma: discount of one environment step.
        bootstrap_truncated: whether something follows where an episode was cut off. Default: unless rewards were made
            of success, see `Episodes.rewards_from`.

    Raises:
        DatasetError: the data have no rewards, no decision is left, or none that earned anything.
    """
    check_count("n_obs_steps", n_obs_steps)
    check_count("n_action_steps", n_action_steps)
    check(0 <= gamma <= 1, "gamma", gamma, "must be from 0 to 1")
    _require_any_rewards(data)
    lengths = data.lengths
    episode = np.repeat(np.arange(data.n_episodes), lengths)
    first, end = data.starts[episode], data.ends[episode]
    step = np.arange(len(episode))
    n_steps = np.minimum(n_action_steps, end - step)
    after = step + n_steps
    is_last = after == end
    if bootstrap_truncated is None:
        bootstrap_truncated = data.rewards_from == "data"
    terminated = is_last & (data.terminated[episode] | (not bootstrap_truncated))
    known = np.ones(len(episode), np.bool_) if data.final_known is None else data.final_known[episode]
    kept = ~is_last | terminated | known
    if not kept.any():
        raise DatasetError("no decision is left: what follows is known of none")
    observation_rows = np.maximum(step[:, None] + np.arange(1 - n_obs_steps, 1), first[:, None])
    next_rows = np.maximum(after[:, None] + np.arange(1 - n_obs_steps, 1), first[:, None])
    beyond = next_rows >= end[:, None]
    next_rows = np.where(beyond, data.ends[-1] + episode[:, None], next_rows)
    action_rows = np.minimum(step[:, None] + np.arange(n_action_steps), end[:, None] - 1)
    executed = np.arange(n_action_steps) < n_steps[:, None]
    rewards = chunk_return(np.where(executed, np.asarray(data.rewards)[action_rows], 0), gamma)
    _require_rewards(np.abs(rewards, dtype=np.float64), kept)
    discounts = np.where(terminated, 0.0, gamma**n_steps).astype(np.float32)
    columns = (observation_rows, action_rows, n_steps, next_rows, rewards, discounts)
    return Decisions(*(column[kept] for column in columns))


def _require_any_rewards(data: Episodes) -> None:
    if data.rewards_from == "none":
        raise DatasetError("the data have neither rewards nor success: values cannot be learned from them")


def _require_rewards(earned: npt.NDArray[np.float64], kept: BoolArray) -> None:
    """Raise DatasetError where every decision that `earned` anything, positive or not, is left out; tell of less."""
    total, left_out = earned.sum(), earned[~kept].sum()
    remedy = ("what the last action of an episode led to was not kept; if nothing follows where episodes end, set "
              "bootstrap_truncated to False")  # fmt: skip
    if total == 0:
        warnings.warn("all rewards of the data are 0: there is nothing to choose actions by", stacklevel=3)
        return
    if not earned[kept].any():
        raise DatasetError(f"all rewards are in decisions that must be left out: {remedy}")
    if left_out > MUCH * total or left_out * kept.sum() > UNUSUAL * earned[kept].sum() * (~kept).sum():
        warnings.warn(
            f"{left_out / total:.0%} of the rewards are in decisions that are left out: {remedy}", stacklevel=3
        )
