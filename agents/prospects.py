"""How much better it gets by a plan, if what follows it is as good as critics take it to be.

    A = Σ_{i<H} γ^i r_i + γ^H V(s_H) - V(s_0)       nothing follows where an episode terminated before

where V is that of critics learned from the same data (`IDQL`), or of how a policy came to act online (`DPPO`). A return
of the data alone says what those who were in a state earned; of a route that has to be put together from the pieces of
several episodes it says little. What the start is worth is taken off: plans are told apart from others of their start,
and the most that one may be told to earn is much the same wherever it starts.

Shapes: S steps, H rows of a plan, B batch, O observation steps, D observation size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dprl import checkpoint
from dprl.agents.critic import Critic
from dprl.agents.dppo_config import DPPOConfig
from dprl.data import Episodes
from dprl.data.transitions import decisions
from dprl.errors import ConfigError
from dprl.observations import IMAGES, STATE, Observation, TensorObservation, map_parts
from dprl.policy import ChunkCritic, Policy
from dprl.policy.critic import ValueTerms
from dprl.returns import RunningReturnStd
from dprl.spec import FloatArray, IntArray

AT_ONCE = 1_024


@dataclass(frozen=True)
class StateValue:
    """V that was learned, of what a policy observes."""

    policy: Policy
    of: Callable[[TensorObservation], Tensor]
    """(B, O, D), or named parts, on the policy's device -> (B,)."""
    terms: ValueTerms
    """What it is a value of."""

    @staticmethod
    def of_critics(policy: Policy) -> StateValue:
        """V of the critics that a policy has.

        Raises:
            ConfigError: it has none that were learned.
        """
        scorer = policy.scorer
        if not isinstance(scorer, ChunkCritic) or scorer.terms is None:
            raise ConfigError(
                "critics: the policy has none that were learned; 'dprl offline' makes them, DPPO's runs have one"
            )
        return StateValue(policy, lambda obs: scorer.v(scorer.see(obs)), scorer.terms)

    @staticmethod
    def of_dppo(policy: Policy, config: DPPOConfig, state: checkpoint.StateTree, reward_kind: str) -> StateValue:
        """V of the critic that DPPO has, or had where it stopped.

        Args:
            policy: what it tunes.
            config: its numbers.
            state: what `DPPO.state` returned.
            reward_kind: of its environment, sparse or dense.
        """
        critic = Critic(policy, 0, config.critic_hidden_size, config.critic_activation).to(policy.device)
        own = "0."  # beside it there may be a baseline
        learned = {name.removeprefix(own): v for name, v in state["critic"].items() if name.startswith(own)}
        critic.load_state_dict(learned)
        scaler = RunningReturnStd(len(state["reward_scaler"]["returns"]), config.gamma)
        scaler.restore(state["reward_scaler"])
        gamma = config.gamma if config.gamma_per == "step" else config.gamma ** (1 / policy.n_action_steps)
        bootstraps = reward_kind != "sparse" if config.bootstrap_truncated is None else config.bootstrap_truncated
        return StateValue(policy, critic, ValueTerms(gamma, 1 / scaler.std, bootstraps, reward_kind=reward_kind))

    @torch.no_grad()
    def __call__(self, obs: Observation) -> FloatArray:
        """(B, O, D), or named parts -> (B,)."""
        return np.asarray(self.of(self.policy.checked(map_parts(torch.as_tensor, obs))).cpu())


def prospects(data: Episodes, horizon: int, critics: Policy | StateValue) -> FloatArray:
    """Return A of every step: (S,), in units of the critics' rewards; 0 where nobody knows what followed.

    Args:
        data: with rewards.
        horizon: H.
        critics: V, or a policy with learned critics, of the same observations.

    Raises:
        ConfigError: a policy without, or of other observations or another kind of rewards.
        DatasetError: the data have no rewards.
    """
    value = critics if isinstance(critics, StateValue) else StateValue.of_critics(critics)
    shapes, ours = value.policy.part_shapes(), {IMAGES + name: images.shape[1:] for name, images in data.images.items()}
    ours |= {STATE: data.observations.shape[1:]} if data.observations.shape[1] else {}
    if shapes != ours:
        raise ConfigError(f"critics: they are of observations {shapes}, the data have {ours}")
    terms, n_obs_steps = value.terms, value.policy.config.n_obs_steps
    kind = "sparse" if data.rewards_from == "success" else data.reward_kind
    if None not in (kind, terms.reward_kind) and kind != terms.reward_kind:
        raise ConfigError(f"critics: they are of {terms.reward_kind} rewards, the data's are {kind}: values are of one "
                          "kind")  # fmt: skip
    cut = decisions(data, n_obs_steps, horizon, terms.gamma, bootstrap_truncated=terms.bootstrap_truncated)
    steps = cut.action_rows[:, 0]
    start = _in_parts(value, data.observe, cut.observation_rows)
    following = _in_parts(value, data.observe_outcomes, cut.next_rows)
    better = np.zeros(len(data.actions), np.float32)
    better[steps] = terms.reward_scale * cut.rewards + cut.discounts * following - start
    return better


def _in_parts(value: StateValue, observe: Callable[[IntArray], Observation], rows: IntArray) -> FloatArray:
    """V of observations (n, O) rows: (n,)."""
    parts = (observe(rows[first : first + AT_ONCE]) for first in range(0, len(rows), AT_ONCE))
    return np.concatenate([value(part) for part in parts])
