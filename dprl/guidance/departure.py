"""How far guides lead a policy's chunks away from where it, and its critics, know their way.

Shapes: B observations, O observation steps, D observation size, H actions of a chunk, A action size, n networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dprl.guidance.step import Guide, Guides
from dprl.guidance.value import DiffuserGuide, ValueGuide
from dprl.observations import TensorObservation
from dprl.policy import InferenceConfig, Policy, Scorer
from dprl.seeding import torch_generator

FAR, DOUBTFUL = 2.0, 2.0
STILL = (
    "the guide moves nothing: its scale is 0 or its gradient is, every step is left alone by skip_last, or there is a "
    "single step, from noise alone (a flow's) or with the scaling `variance`"
)


@runtime_checkable
class Ensemble(Protocol):
    """Several networks that judge the same: `ChunkCritic`, `ChunkValue`."""

    def each(self, obs: TensorObservation, actions: Tensor) -> Tensor:
        """What each says of chunks (B, H, A) in the environment's units: (n, B)."""
        ...


@dataclass(frozen=True)
class Departure:
    """Of guided chunks from those that the policy draws of the same noise, and what it brings by the critic's word."""

    distance: float
    """Their root mean square distance, over that of the policy's own samples from each other (NaN where those are all
    the same)."""
    disagreement: float | None
    """How much more the critic's networks differ about guided chunks than about the policy's own; None without an
    ensemble."""
    gain: float | None = None
    """How much more the critic takes guided chunks to be worth, over how much it takes the policy's own to differ."""

    @property
    def warning(self) -> str | None:
        """What to be told, if anything."""
        if self.distance == 0:
            return STILL
        found = []
        if self.distance > FAR:
            found.append(f"guided chunks lie {self.distance:.1f} times as far from the policy's own as those from each "
                         "other")  # fmt: skip
        if self.disagreement is not None and self.disagreement > DOUBTFUL:
            found.append(f"the critic's networks differ about them {self.disagreement:.1f} times as much")
        return f"{' and '.join(found)}: the guide leaves the data; try a smaller scale" if found else None


@torch.no_grad()
def departure(
    policy: Policy,
    obs: TensorObservation,
    guide: Guide,
    inference: InferenceConfig | None = None,
    *,
    scorer: Scorer | None = None,
    seed: int = 0,
) -> Departure:
    """Return how far `guide` leads the policy's chunks away.

    Args:
        policy: what is guided.
        obs: (B, O, D), or named parts: where.
        guide: moves the denoising steps.
        inference: how the policy acts. Default: its own way.
        scorer: whose networks are asked where the guide has none. Default: the policy's own.
        seed: of the noise.
    """
    obs, how = policy.checked(obs), inference or InferenceConfig()

    def drawn(name: str, guide: Guide | None = None) -> Tensor:
        return policy.draw(obs, how, torch_generator(seed, "departure", name), guide=guide)

    plain, other, guided = drawn("one"), drawn("other"), drawn("one", guide)
    normalize = policy.chunk_normalizer.normalize
    spread = (normalize(plain) - normalize(other)).pow(2).mean().sqrt()
    distance = (normalize(guided) - normalize(plain)).pow(2).mean().sqrt() / spread
    judges = next((e for e in (*climbed(guide), scorer, policy.scorer) if isinstance(e, Ensemble)), None)
    away = float(distance) if spread > 0 else float("nan")
    if judges is None:
        return Departure(away, None)
    after, before, others = (judges.each(obs, chunks) for chunks in (guided, plain, other))
    # about differences: what a network adds to all chunks of an observation alike chooses nothing
    doubt, doubt_before = ((said - others).std(0, correction=0).mean() for said in (after, before))
    differing = (before.mean(0) - others.mean(0)).pow(2).mean().sqrt()
    rise = after.mean() - before.mean()
    return Departure(
        away,
        float(doubt / doubt_before) if doubt_before > 0 else None,
        float(rise / differing) if differing > 0 else None,
    )


def climbed(guide: Guide) -> list[object]:
    """Return what a guide climbs, of several guides all that is known."""
    if isinstance(guide, Guides):
        return [value for part in guide.guides for value in climbed(part)]
    return [guide.of] if isinstance(guide, ValueGuide | DiffuserGuide) else []
