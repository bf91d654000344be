"""Diffuser: plans of actions and states, denoised up the gradient of what they earn (arXiv:2205.09991).

In the paper's order. A plan τ is of H rows [a_i, s_i]. A model of the data's plans is learned as any diffusion policy
is (section 3.1), its first state given (section 3.3),

    L_θ = E ||prediction(τ_t, t) - target||²              the first action's error counts more: `PlannerConfig`

beside it what noisy plans earn (section 3.2),

    L_J = E (J(τ_t, t) - R(τ))²                           see `Outcome`

where R is the return that the data's episode earned from there on. Acting (algorithm 1) is denoising plans from the
present state, each step moved up the gradient of J, taking the best of several, executing its first actions:

    InferenceConfig(candidates=16), 64 in the paper, and a guide: `DiffuserGuide(planner.scorer)` as in the paper, or
    `ValueGuide(planner.scorer, gradient="noisy")`

Of a route that has to be put together from the pieces of several episodes R tells only where they cross. Critics
learned from the same data (`IDQL`) may guide and choose in place of J; they judge a plan by its first actions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from dprl import checkpoint
from dprl.agents.bc import BC, BCConfig
from dprl.agents.outcome import Outcome, OutcomeConfig
from dprl.data import Episodes
from dprl.errors import check, check_count
from dprl.policy import Planner, Policy
from dprl.training import Agent, LoopConfig, train


@dataclass(frozen=True)
class DiffuserConfig:
    """How a planner and what its plans earn are learned."""

    bc: BCConfig = field(default_factory=lambda: BCConfig(batch_size=64, learning_rate=2e-4, final_learning_rate=2e-5))
    """Of the model of plans."""
    value: OutcomeConfig = field(default_factory=OutcomeConfig)
    """Of what they earn."""

    def __post_init__(self) -> None:
        returns = self.value.of == "return"
        check(returns, "value.of", self.value.of, "must be return: what plans are told apart by")
        for name in ("steps_per_iteration", "validation_share", "num_workers"):
            usual, own = getattr(OutcomeConfig, name), getattr(self.value, name)
            check(own == usual, f"value.{name}", own, "must be left out: it is bc's")


class Picks(NamedTuple):
    """The minibatches of one iteration, (steps, B) indices each."""

    plans: Tensor
    outcomes: Tensor


class Diffuser(Agent[Picks]):
    """Learns a model of plans, and what they earn."""

    name = "diffuser"
    policy: Planner
    config: DiffuserConfig

    def __init__(
        self,
        policy: Policy,
        config: DiffuserConfig | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Prepare to learn.

        Args:
            policy: a planner of whole rows; its `scorer` becomes what plans earn.
            config: the numbers.
            seed: of the networks, minibatches and noise.

        Raises:
            ConfigError: a policy of another kind.
        """
        planner = isinstance(policy, Planner) and policy.config.denoised == "rows"
        check(planner, "policy", policy.name, "must be a planner that denoises rows of actions and states")
        assert isinstance(policy, Planner)
        self.policy, self.config, self.seed = policy, config or DiffuserConfig(), seed
        bc = self.config.bc
        value = replace(
            self.config.value,
            steps_per_iteration=bc.steps_per_iteration,
            validation_share=bc.validation_share,
            num_workers=bc.num_workers,
        )
        self.model = BC(policy, bc, seed=seed)
        self.value = Outcome(policy, value, seed=seed)

    @property
    def timesteps(self) -> int:  # type: ignore[override]
        """Gradient steps taken."""
        return self.model.timesteps

    def fit(self, data: Episodes, steps: int, *, progress_bar: bool = False) -> Planner:
        """Take `steps` more gradient steps on `data`; return the planner, whose `scorer` is J.

        Raises:
            ConfigError: no steps.
            DatasetError: the data have no rewards, or do not fit the planner.
        """
        check_count("steps", steps)
        total = self.timesteps + steps
        self.set_data(data, total)
        train(self, LoopConfig(total), progress_bar=progress_bar)
        return self.policy

    def set_data(self, data: Episodes, total_steps: int) -> None:
        """Take `data` to learn from; `total_steps` shapes the learning rates' decay."""
        self.model.set_data(data, total_steps)
        self.value.set_data(data, total_steps)

    def collect(self) -> Picks:
        """Draw the minibatches of one iteration."""
        return Picks(self.model.collect(), self.value.collect())

    def update(self, batch: Picks) -> dict[str, float]:
        """Take one gradient step of model and value for each minibatch."""
        return self.value.update(batch.outcomes) | self.model.update(batch.plans)

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs beside the policy."""
        return {"model": self.model.state(), "value": self.value.state()}

    def restore(self, state: checkpoint.StateTree) -> None:
        """Take up what `state` returned; the policy must be loaded."""
        self.model.restore(state["model"])
        self.value.restore(state["value"])
