"""IQL: a policy with a density clones what turned out better than usual (arXiv:2110.06169). In the paper's order.

V and Q are learned as in IDQL, which has them from here: V as an expectile of Q (eq. 5), Q from the V of what follows
(eq. 6).
The policy is extracted by advantage-weighted regression (eq. 7),

    L_π = -E exp(β (min Q̄(s, a) - V̄(s))) log π(a | s)          the weights at most 100, over their mean in a minibatch

where V̄ as Q̄ is a Polyak average, and acts by itself: nothing is chosen among its samples.
"""

from __future__ import annotations

from dataclasses import replace

from dprl.agents.idql import IDQL, IDQLConfig
from dprl.errors import check
from dprl.policy import DiffusionPolicy, Policy


class IQL(IDQL):
    """Learns critics as IDQL does, and by their advantages the policy itself."""

    name = "iql"

    def __init__(self, policy: Policy, config: IDQLConfig | None = None, *, seed: int = 0) -> None:
        """Prepare to train `policy` and its critics.

        Args:
            policy: of a kind whose loss is that of a density and can weigh samples, such as a Gaussian.
            config: the numbers; β is its `advantage_scale`, and `actor_objective` is the exponential one.
            seed: of the critics, minibatches and noise.

        Raises:
            ConfigError: a policy of another kind, or another objective.
        """
        config = config or IDQLConfig()
        fits = policy.weighs_samples and not isinstance(policy, DiffusionPolicy)
        check(fits, "policy", policy.name, "must be gaussian, categorical or mse; a diffusion policy is for idql")
        known = config.actor_objective in ("bc", "exponential")
        check(known, "actor_objective", config.actor_objective, "must be left out: it is exponential")
        super().__init__(policy, replace(config, actor_objective="exponential"), seed=seed)
