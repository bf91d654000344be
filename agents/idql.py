"""IDQL: critics learned from data choose among a cloned policy's samples (arXiv:2304.10573). In the paper's order.

The behaviour policy is cloned from the data (`BC`), whatever they are worth. Beside it, from the data's own actions,

    L_V = E f(min Q̄(s, a) - V(s))            f: `dprl.implicit`                                                  eq. 6
    L_Q = E (r + γ V(s') - Q(s, a))²          for each Q; Q̄ follows Q by a Polyak average                        eq. 7

and acting is drawing N chunks from the behaviour policy and taking the one of the largest Q̄, or drawing one by the
weights that f implies (algorithm 2): `InferenceConfig.candidates` and `selection`, chosen when the policy acts.

A decision is a chunk of E actions: r is the n-step return of its steps, Σ γ^i r_i, and γ that of as many steps.

Shapes: B decisions, O observation steps, D observation size, E executed actions, A action size.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dprl import checkpoint
from dprl.agents.bc import BC, BCConfig, require_action_chunks
from dprl.config import validate
from dprl.data import Episodes
from dprl.data.loader import Batch, DecisionBatch, DecisionBatches
from dprl.data.transitions import decisions
from dprl.errors import DatasetError, check
from dprl.implicit import ActorObjective, actor_weight
from dprl.networks import polyak_update
from dprl.observations import TensorObservation
from dprl.policy import ChunkCritic, CriticConfig, Policy
from dprl.policy.critic import ValueTerms
from dprl.seeding import seeded_init, torch_generator
from dprl.training import Agent, LoopConfig, train
from dprl.training.learner import Learner


@dataclass(frozen=True)
class IDQLConfig:
    """How critics and behaviour policy learn."""

    bc: BCConfig = field(default_factory=BCConfig)
    """Of the behaviour policy."""
    actor_objective: ActorObjective = "bc"
    """What its loss weighs samples by: `bc` all alike (IDQL), or `soft`, `hard` or `exponential` in the advantage."""
    advantage_scale: float = 3.0
    """β of the exponential weights exp(β A). In IQL's paper 3, on antmaze 10."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """Their networks, and how V is learned from Q."""
    batch_size: int = 256
    """Decisions per gradient step of the critics."""
    learning_rate: float = 3e-4
    """The critics'."""
    gamma: float = 0.99
    """Discount of one environment step."""
    bootstrap_truncated: bool | None = None
    """Whether something follows where an episode of the data was cut off. Default: unless the data have no rewards and
    they were made of success."""
    return_range: float | None = None
    """Rewards are multiplied by what brings the returns of the data's worst and best episode so far apart (1000 in the
    paper on locomotion): what critics learn soonest is of the size of 1. Default: rewards stay as they are."""
    tau: float = 0.005
    """How far the target critics move towards the others at each step."""

    def __post_init__(self) -> None:
        validate(self, at_least={"batch_size": 1}, above={"learning_rate": 0, "tau": 0, "advantage_scale": 0})
        fits = self.return_range is None or self.return_range > 0
        check(fits, "return_range", self.return_range, "must be above 0, or None")
        check(0 <= self.gamma <= 1, "gamma", self.gamma, "must be from 0 to 1")
        check(self.tau <= 1, "tau", self.tau, "must be at most 1")


log = logging.getLogger(__name__)
Settings = TypeVar("Settings", IDQLConfig, CriticConfig)


def _as_learned(config: IDQLConfig, scorer: ChunkCritic, terms: ValueTerms) -> IDQLConfig:
    """The numbers with those that `scorer` was learned by; what differs from the defaults is said."""
    shape = {name: value for name, value in vars(scorer.config).items() if name not in FREE}
    names = ("gamma", "bootstrap_truncated", "return_range")
    config = replace(config, critic=_with(config.critic, shape, "critic."))
    config = _with(config, {name: getattr(terms, name) for name in names})
    usual = IDQLConfig()
    kept = [f"critic.{n} {v}" for n, v in shape.items() if v != getattr(usual.critic, n)]
    kept += [f"{n} {getattr(terms, n)}" for n in ("gamma", "return_range") if getattr(terms, n) != getattr(usual, n)]
    kept += [] if terms.bootstrap_truncated else ["bootstrap_truncated False"]
    if kept:
        log.warning("note: the critics go on as they were learned: %s", ", ".join(kept))
    return config


FREE = ("minimum_over",)
"""What may change while critics go on."""


def _with(asked: Settings, learned: dict[str, Any], where: str = "") -> Settings:
    """Settings with the values that critics were learned with; others may not be asked for."""
    for name, value in learned.items():
        own, usual = getattr(asked, name), getattr(type(asked)(), name)
        agrees = own in (value, usual)
        check(agrees, f"{where}{name}", own, f"must be left out: the policy's critics were learned with {value}")
    return replace(asked, **learned)


Figures = tuple[Tensor, ...]


def metrics_of(figures: list[Figures], prefix: str = "idql") -> dict[str, float]:
    """Means of what `IDQL.update_critic` returned."""
    names = ("value_loss", "q_loss", "q_mean", "value_mean", "advantage_std")
    means = torch.stack([torch.stack(row) for row in figures]).mean(0).tolist()
    return {f"{prefix}/{name}": value for name, value in zip(names, means, strict=True)}


class Picks(NamedTuple):
    """The minibatches of one iteration: (steps, B) indices each."""

    chunks: Tensor
    """Of the behaviour policy's."""
    decisions: Tensor
    """Of the critics'."""


class IDQL(Agent[Picks]):
    """Clones the data's behaviour and learns critics that choose among its samples; nothing is simulated."""

    name = "idql"
    config: IDQLConfig

    def __init__(self, policy: Policy, config: IDQLConfig | None = None, *, seed: int = 0) -> None:
        """Prepare to train `policy` and its critics.

        Args:
            policy: the behaviour policy, of any kind; untrained, or cloned before. Critics that it has go on.
            config: the numbers. Where the policy has critics, theirs are `critic`, `gamma`, `bootstrap_truncated` and
                the scale of the rewards.
            seed: of the critics, minibatches and noise.

        Raises:
            ConfigError: settings at odds, also with those that the policy's critics were learned with.
        """
        require_action_chunks(policy)
        self.policy, self.config = policy, config or IDQLConfig()
        had = policy.scorer if isinstance(policy.scorer, ChunkCritic) else None
        terms = None if had is None else had.terms
        if had is not None and terms is not None:
            check(policy.n_action_steps == had.n_action_steps, "n_action_steps", policy.n_action_steps,
                  f"must be {had.n_action_steps}: the policy's critics were learned of as many actions")  # fmt: skip
            self.config = _as_learned(self.config, had, terms)
        objective = self.config.actor_objective
        fits = objective == "bc" or policy.weighs_samples
        check(fits, "actor_objective", objective, f"must be bc: a {policy.name} policy's loss weighs all samples alike")
        self.seed = seed
        self.actor = BC(policy, self.config.bc, seed=seed)
        with seeded_init(seed, "critic"):
            self.critic, self.target = (ChunkCritic(policy, self.config.critic).to(policy.device) for _ in range(2))
        if had is not None and terms is not None:  # or nothing was learned yet
            self.critic.load_state_dict(had.state_dict())
            self.target.terms = terms
        self.target.load_state_dict(self.critic.state_dict())
        policy.scorer = self.target.requires_grad_(False)
        if self.config.bc.compile:
            for net in (self.critic.q_net, self.critic.v_net):
                net.compile(dynamic=False)
        self._learner = Learner(self.critic, self.config.learning_rate)
        self._generator = torch_generator(seed, "idql", device=policy.device)

    @property
    def timesteps(self) -> int:  # type: ignore[override]
        """Gradient steps taken."""
        return self.actor.timesteps

    def fit(self, data: Episodes, steps: int, *, progress_bar: bool = False) -> Policy:
        """Take `steps` more gradient steps on `data`; return the policy, whose `scorer` are the critics.

        Raises:
            ConfigError: no steps.
            DatasetError: the data have no rewards, or do not fit the policy.
        """
        check(isinstance(steps, int) and steps >= 1, "steps", steps, "must be a whole number of at least 1")
        total = self.timesteps + steps
        self.set_data(data, total)
        train(self, LoopConfig(total), progress_bar=progress_bar)
        return self.policy

    def set_data(self, data: Episodes, total_steps: int, terms: ValueTerms | None = None) -> None:
        """Take `data` to learn from; `total_steps` shapes the learning rate's decay.

        Without `terms`, critics that had been learned keep theirs, and new ones have the config's.
        """
        policy, bc = self.policy, self.config.bc
        shown = self.shown(data)
        terms = terms or self.target.terms or self._terms_of(shown)
        self.target.terms = terms
        if terms.reward_scale != 1:
            shown = replace(shown, rewards=np.asarray(shown.rewards) * np.float32(terms.reward_scale))
        cut = decisions(
            shown, policy.config.n_obs_steps, policy.n_action_steps, terms.gamma,
            bootstrap_truncated=terms.bootstrap_truncated,
        )  # fmt: skip
        self.actor.set_data(data, total_steps)
        self.decisions = DecisionBatches(shown, cut, policy.device, num_workers=bc.num_workers)

    def shown(self, data: Episodes) -> Episodes:
        """Return the part of `data` that is learned from, as the behaviour policy's own."""
        return data.split(self.config.bc.validation_share, self.seed)[0]

    def _terms_of(self, data: Episodes) -> ValueTerms:
        asked = self.config.bootstrap_truncated
        bootstraps = data.rewards_from == "data" if asked is None else asked
        kind = data.reward_kind
        return ValueTerms(self.config.gamma, self.scale_of(data), bootstraps, self.config.return_range, kind)

    def scale_of(self, data: Episodes) -> float:
        """What `return_range` multiplies the rewards of `data` by."""
        asked, returns = self.config.return_range, data.returns
        if asked is None or data.rewards_from == "none":  # which is refused for itself
            return 1.0
        if returns.min() == returns.max():
            raise DatasetError(f"return_range = {asked}: every episode has the return {returns[0]:g}, so that there is "
                               "nothing to scale by; leave it out")  # fmt: skip
        return float(asked / (returns.max() - returns.min()))

    def collect(self) -> Picks:
        """Draw the minibatches of one iteration, with replacement."""
        chunks = self.actor.collect()
        shape = (len(chunks), self.config.batch_size)
        picks = torch.randint(len(self.decisions), shape, generator=self._generator, device=self.policy.device)
        return Picks(chunks, picks)

    def update(self, batch: Picks) -> dict[str, float]:
        """Take one gradient step of critics and behaviour policy for each minibatch."""
        start = time.perf_counter()
        losses, figures = [], []
        for chunks, decision in zip(self.actor.read(batch.chunks), self.decisions.read(batch.decisions), strict=True):
            figures.append(self.update_critic(decision))
            losses.append(self.update_actor(chunks))
        return {
            **metrics_of(figures, self.name),
            **self.actor.metrics(torch.stack(losses)),
            "time/samples_per_s": batch.decisions.numel() / (time.perf_counter() - start),
        }

    def update_critic(self, batch: DecisionBatch) -> Figures:
        """One gradient step of Q and V; return figures of it."""
        critic, target = self.critic, self.target
        augmentation = self._generator if self.policy.features.cameras else None
        with torch.no_grad():
            q_target = self.least(target.q(target.see(batch.obs), batch.actions))
            bootstrapped = batch.reward + batch.discount * self.future(batch.next_obs)
        seen = critic.see(batch.obs, augmentation)
        q, value = critic.q(seen, batch.actions), critic.v(seen)
        value_loss = self.config.critic.objective.loss(q_target - value).mean()
        q_loss = ((q - bootstrapped) ** 2).mean()
        self._learner.zero_grad()
        (value_loss + len(q) * q_loss).backward()
        self._learner.step()
        polyak_update(critic, target, self.config.tau)
        return tuple(
            x.detach() for x in (value_loss, q_loss, q.mean(), value.mean(), (q_target - value).std(correction=0))
        )

    def future(self, next_obs: TensorObservation) -> Tensor:
        """What follows is worth, without gradient: observations (B, O, D), or named parts, -> (B,)."""
        return self.critic.v(self.critic.see(next_obs))

    def least(self, q: Tensor) -> Tensor:
        """Return the least of the critics' values (n, B), of all or of some drawn ones: (B,)."""
        over = self.config.critic.minimum_over
        if over is not None:
            q = q[torch.randperm(len(q), generator=self._generator, device=q.device)[:over]]
        return q.amin(0)

    def update_actor(self, chunks: Batch) -> Tensor:
        """One gradient step of the behaviour policy; return its loss."""
        weight, objective = None, self.config.actor_objective
        if objective != "bc":
            advantage = self.target.advantage(chunks.obs, chunks.actions)
            scale = self.config.advantage_scale
            weight = actor_weight(objective, advantage, self.config.critic.objective, scale)
        return self.actor.step(chunks, weight)

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs beside the policy."""
        return {
            "actor": self.actor.state(),
            "critic": self.critic.state_dict(),
            "target": self.target.state_dict(),
            "critic_optimizer": self._learner.state(),
            "generator": self._generator.get_state(),
        }

    def restore(self, state: checkpoint.StateTree) -> None:
        """Take up what `state` returned; the policy must be loaded."""
        self.actor.restore(state["actor"])
        self.critic.load_state_dict(state["critic"])
        self.target.load_state_dict(state["target"])
        self._learner.restore(state.get("critic_optimizer", {}))
        self._generator.set_state(state["generator"])
