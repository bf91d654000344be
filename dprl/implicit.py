"""Value objectives and the policies they imply (IDQL, arXiv:2304.10573, section 4). In the paper's order.

V is learned from the data's actions alone, by a convex loss f of the advantage A = Q(s, a) - V(s), 0 at its least:

    expectile      f(A) = |τ - 1(A < 0)| A²                                      arXiv:2110.06169, eq. 5
    quantile       f(A) = |τ - 1(A < 0)| |A|
    exponential    f(A) = (exp(αA) - αA - 1) / α, linear where exp(αA) exceeds `clip`

Where V is optimal, E[f'(A)] = 0 over the data's actions, and so E[w A] = 0 with

    w(A) = |f'(A)| / |A|                                                                                      eq. 9

V is therefore the value of the implicit policy, which weighs the data's actions by w. Acting is choosing among samples
of the cloned policy by w, or greedily by A.

Shapes: any, elementwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dprl.config import validate
from dprl.errors import check


@dataclass(frozen=True)
class ValueObjective:
    """How V is learned from Q."""

    kind: Literal["expectile", "quantile", "exponential"] = "expectile"
    """What V is of the data's Q: an expectile, a quantile, or a soft maximum."""
    level: float = 0.7
    """τ, in (0, 1), or α, above 0. Larger values trust the best of the data's actions more."""
    clip: float = 6.0
    """The exponential's exp(αA) counts as no more than this, above 1."""
    least_advantage: float = 1e-2
    """The quantile's weights divide by |A|, which counts as no less than this."""

    def __post_init__(self) -> None:
        validate(self, above={"level": 0, "clip": 1, "least_advantage": 0})
        fits = self.kind == "exponential" or self.level < 1
        check(fits, "level", self.level, f"must be below 1 where kind is {self.kind}")

    def loss(self, advantage: Tensor) -> Tensor:
        """Return f(A)."""
        if self.kind == "expectile":
            return self._side(advantage) * advantage**2
        if self.kind == "quantile":
            return self._side(advantage) * advantage.abs()
        scaled, most = self.level * advantage, math.log(self.clip)
        inside, beyond = scaled.clamp(max=most), (scaled - most).clamp(min=0)  # linear, with the slope it has at `most`
        return (torch.expm1(inside) - inside + (self.clip - 1) * beyond) / self.level

    def weight(self, advantage: Tensor) -> Tensor:
        """Return w(A) up to a factor, at least 0 and finite. No gradient flows through it."""
        advantage = advantage.detach()
        if self.kind == "expectile":
            return self._side(advantage)
        if self.kind == "quantile":
            return self._side(advantage) / advantage.abs().clamp(min=self.least_advantage)
        scaled = self.level * advantage
        slope = torch.expm1(scaled.clamp(max=math.log(self.clip))).abs()
        return torch.where(scaled.abs() < 1e-4, 1 + scaled / 2, slope / scaled.abs().clamp(min=1e-4))

    def _side(self, advantage: Tensor) -> Tensor:
        return torch.where(advantage < 0, 1 - self.level, self.level)


ActorObjective = Literal["bc", "soft", "hard", "exponential"]
HARD_LEAST, MAX_ACTOR_WEIGHT = -0.01, 100.0


def actor_weight(kind: ActorObjective, advantage: Tensor, objective: ValueObjective, scale: float = 3.0) -> Tensor:
    """Return what the behaviour policy's loss weighs a sample by, after the authors' code.

    `bc` 1; `soft` w(A); `hard` 1 where A is not worse than -0.01; `exponential` exp(`scale` A), at most 100
    (arXiv:2110.06169, eq. 7).
    """
    if kind == "bc":
        return torch.ones_like(advantage)
    if kind == "soft":
        return objective.weight(advantage)
    if kind == "hard":
        return (advantage.detach() >= HARD_LEAST).to(advantage.dtype)
    return (scale * advantage.detach()).clamp(max=math.log(MAX_ACTOR_WEIGHT)).exp()
