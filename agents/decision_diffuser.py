"""Decision Diffuser: plans of states alone, told what they shall earn (arXiv:2211.15657). In the paper's order.

A plan is of states s_0 ... s_{H-1}, the first one given. A model of the data's plans is learned with a command y, the
return as a share of the data's range, kept from it for a share β of the plans (section 3.2), and with it the inverse
dynamics that turn states into actions (section 3.1), eq. 8:

    L = E ||prediction(s_t, y or nothing, t) - target||² + E ||a_i - f(s_i, s_{i+1})||²

y is of the return that the data's episode earned from there on, as in the paper, or of how much better it gets by the
plan as critics judge it (`prospects`), which also know of routes that no episode shows as a whole. Acting (algorithm 1)
is denoising plans told a large return, x̂_0 <- x̂_0(s_t) + w (x̂_0(s_t, y) - x̂_0(s_t)), with little noise, and executing
their first actions:

    InferenceConfig(temperature=0.5), and the guide `CommandGuide(1.0, 1.2)`
"""

from __future__ import annotations

import numpy as np

from dprl.agents.bc import BC, BCConfig
from dprl.agents.prospects import StateValue, prospects
from dprl.data import Episodes
from dprl.errors import check
from dprl.policy import Planner, PlannerConfig, Policy
from dprl.spec import FloatArray

EXTREME = 0.05
"""Share of the plans at either end that are told the same as the next: what few plans fulfil leads nowhere."""


class DecisionDiffuser(BC[Planner]):
    """Clones plans of states with a command, and the actions that lead from one state to the next.

    Both are the planner's own loss: without critics it is behaviour cloning.
    """

    name = "decision-diffuser"

    def __init__(
        self,
        policy: Policy,
        config: BCConfig | None = None,
        *,
        critics: Policy | StateValue | None = None,
        seed: int = 0,
    ) -> None:
        """Prepare to learn.

        Args:
            policy: a planner of states, which can be told a return.
            config: the numbers.
            critics: V, or a policy whose critics say what follows a plan. Default: what followed in the data.
            seed: of minibatches and noise.

        Raises:
            ConfigError: a policy of another kind.
        """
        planner = isinstance(policy, Planner) and policy.config.denoised == "states"
        check(planner, "policy", policy.name, "must be a planner that denoises states")
        assert isinstance(policy, Planner)
        command = policy.config.command
        check(command == "return", "policy.command", command, "must be return: what plans are told")
        gamma, usual = policy.config.command_gamma, PlannerConfig.command_gamma
        own = critics is None or gamma == usual
        check(own, "policy.command_gamma", gamma, "must be left out: critics have their own")
        super().__init__(policy, config, seed=seed)
        self._critics = critics

    def set_data(self, data: Episodes, total_steps: int) -> None:
        """See `BC.set_data`; commands are shares of the range of what the plans learned from earn."""
        if self._critics is not None:
            shown, _ = data.split(self.config.validation_share, self.seed)
            outcomes = self._outcomes(shown)
            for policy in (self.policy, self._online):
                policy.fit_commands(outcomes)
        super().set_data(data, total_steps)

    def commands(self, data: Episodes) -> FloatArray:
        """See `BC.commands`."""
        return self.policy.commands(data, None if self._critics is None else self._outcomes(data))

    def _outcomes(self, data: Episodes) -> FloatArray:
        """How much better it gets by plans that begin at each step, extremes left out: (S, 1). H - 1 actions each."""
        assert self._critics is not None
        better = prospects(data, self.policy.config.horizon - 1, self._critics)
        return better.clip(*np.quantile(better, (EXTREME, 1 - EXTREME)).astype(np.float32))[:, None]
