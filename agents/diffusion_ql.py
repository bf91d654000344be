"""Diffusion-QL: a diffusion policy clones data and climbs Q at once (arXiv:2208.06193). In the paper's order.

    L_Q = E (r + γ min Q̄(s', a') - Q(s, a))²,  a' ~ π'(s')                     π': the averaged weights         eq. 4
    L_π = L_BC - η E Q̄(s, a) / E |Q̄|,          a ~ π(s)                                                         eq. 3

where gradients flow through a. The paper climbs one of two Q; here it is the mean of their Polyak averages Q̄, which
need no gradient of their own. a is either denoised whole, through every step (`chain`), or, as in EDP
(arXiv:2305.20081), predicted at once from a noisy action of the data (`one_step`), which takes a fraction of the time.

V is learned beside them as in IDQL, for those who choose among samples by implicit weights; the paper draws among 50
by softmax of Q: `InferenceConfig.candidates` and `selection`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dprl.agents.idql import IDQL, IDQLConfig, Picks
from dprl.config import validate
from dprl.data.loader import Batch
from dprl.errors import check
from dprl.observations import TensorObservation
from dprl.policy import DiffusionPolicy, Policy


@dataclass(frozen=True)
class DiffusionQLConfig(IDQLConfig):
    """How critics and policy learn."""

    eta: float = 1.0
    """η, how much Q counts beside imitation. The paper tunes it for each task, from 0.01 to 3.5."""
    improvement: Literal["chain", "one_step"] = "one_step"
    """What Q is of: samples as they are drawn, through all of whose steps gradients flow, or one prediction (EDP)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self, at_least={"eta": 0})
        check(self.actor_objective == "bc", "actor_objective", self.actor_objective, "must be bc")


class DiffusionQL(IDQL):
    """Clones the data's behaviour while it follows the gradient of the critics."""

    name = "diffusion-ql"
    policy: DiffusionPolicy
    config: DiffusionQLConfig

    def __init__(self, policy: Policy, config: DiffusionQLConfig | None = None, *, seed: int = 0) -> None:
        """Prepare to train `policy` and its critics.

        Args:
            policy: a diffusion policy or flow.
            config: the numbers.
            seed: of the critics, minibatches and noise.

        Raises:
            ConfigError: a policy of another kind.
        """
        check(isinstance(policy, DiffusionPolicy), "policy", policy.name, "must be a diffusion policy or flow")
        super().__init__(policy, config or DiffusionQLConfig(), seed=seed)
        self._climbed: list[Tensor] = []

    def update(self, batch: Picks) -> dict[str, float]:
        """See `IDQL.update`."""
        self._climbed.clear()
        metrics = super().update(batch)
        return metrics | {f"{self.name}/policy_q_mean": float(torch.stack(self._climbed).mean())}

    def future(self, next_obs: TensorObservation) -> Tensor:
        """See `IDQL.future`: the least Q̄ of what the averaged policy would do."""
        actions = self.policy.rsample(next_obs, self._generator)
        return self.least(self.target.q(self.target.see(next_obs), actions))

    def update_actor(self, chunks: Batch) -> Tensor:
        """See `IDQL.update_actor`."""

        def improvement(policy: Policy) -> Tensor:
            assert isinstance(policy, DiffusionPolicy)
            if self.config.improvement == "chain":
                actions = policy.rsample(chunks.obs, self._generator)
            else:
                actions = policy.denoise_once(chunks.obs, chunks.actions, self._generator)
            q = self.target.q(self.target.see(chunks.obs), actions)
            self._climbed.append(q.detach().mean())
            return -self.config.eta * q.mean() / q.detach().abs().mean().clamp(min=1e-6)

        return self.actor.step(chunks, more=improvement)
