"""IQL: a policy with a density clones what turned out better than usual (arXiv:2110.06169). In the paper's order.

V and Q are learned as in IDQL, which has them from here: V as an expectile of Q (eq. 5), Q from the V of what follows
(eq. 6).
The policy is extracted by advantage-weighted regression (eq. 7),

    L_π = -E exp(3 (min Q̄(s, a) - V(s))) log π(a | s)          the weights at most 100

and acts by itself: nothing is chosen among its samples.
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
            policy: of a kind that has a density, such as a Gaussian.
            config: the numbers; its `actor_objective` is the exponential one.
            seed: of the critics, minibatches and noise.

        Raises:
            ConfigError: a policy that has no density.
        """
        has_density = not isinstance(policy, DiffusionPolicy)
        check(has_density, "policy", policy.name, "must have a density, as gaussian and gmm; or use idql")
        super().__init__(policy, replace(config or IDQLConfig(), actor_objective="exponential"), seed=seed)
