"""What is earned from each step on, if what follows a plan is as good as critics take it to be.

    R = Σ_{i<H} γ^i r_i + γ^H V(s_H)                nothing follows where an episode terminated before

where V is that of critics learned from the same data (`IDQL`). A return of the data alone says what those who were in a
state earned; of a route that has to be put together from the pieces of several episodes it says nothing.

Shapes: S steps, H rows of a plan, B batch, O observation steps, D observation size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dprl.data import Episodes
from dprl.data.transitions import decisions
from dprl.errors import ConfigError
from dprl.observations import Observation, TensorObservation, map_parts
from dprl.policy import ChunkCritic, Policy
from dprl.spec import FloatArray, IntArray

AT_ONCE = 4_096


def prospects(data: Episodes, horizon: int, critics: Policy) -> FloatArray:
    """Return R of every step: (S,), in units of the critics' rewards.

    Args:
        data: with rewards.
        horizon: H.
        critics: a policy with learned critics, of the same observations.

    Raises:
        ConfigError: a policy without, or of other observations.
        DatasetError: the data have no rewards.
    """
    scorer = critics.scorer
    if not isinstance(scorer, ChunkCritic) or scorer.terms is None:
        raise ConfigError("critics: the policy has none that were learned; 'dprl offline' makes them")
    shapes, ours = critics.part_shapes(), data.observations.shape[1:]
    if list(shapes.values()) != [ours]:
        raise ConfigError(f"critics: they are of observations {shapes}, the data have {ours}")
    terms, n_obs_steps = scorer.terms, critics.config.n_obs_steps
    cut = decisions(data, n_obs_steps, horizon, terms.gamma, bootstrap_truncated=terms.bootstrap_truncated)
    steps = cut.action_rows[:, 0]
    value = _value(critics, scorer)
    worth = _in_parts(value, data.observe, data.chunks(n_obs_steps, 1).observation_rows)  # where no more is known
    following = _in_parts(value, data.observe_outcomes, cut.next_rows)
    worth[steps] = terms.reward_scale * cut.rewards + cut.discounts * following
    return worth


def _value(critics: Policy, scorer: ChunkCritic) -> Callable[[TensorObservation], FloatArray]:
    @torch.no_grad()
    def value(obs: TensorObservation) -> FloatArray:
        return np.asarray(scorer.v(scorer.see(critics.checked(obs))).cpu())

    return value


def _in_parts(
    value: Callable[[TensorObservation], FloatArray], observe: Callable[[IntArray], Observation], rows: IntArray
) -> FloatArray:
    """V of observations (n, O) rows: (n,)."""
    parts = (observe(rows[first : first + AT_ONCE]) for first in range(0, len(rows), AT_ONCE))
    return np.concatenate([value(map_parts(torch.as_tensor, part)) for part in parts])
