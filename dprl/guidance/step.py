"""What a guide sees of one denoising step, and moves (algebra: arXiv:2105.05233, section 4; arXiv:2205.09991).

Shapes: B samples, O observation steps, D observation size, H actions of a chunk, A action size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from dprl.diffusion import CLEAN, Advance, Level, NoiseSchedule, Step
from dprl.errors import check
from dprl.observations import TensorObservation

Seen = TypeVar("Seen")
Told = Callable[[Tensor, Tensor], Tensor]
"""x_t (B, H, A), a command (B, C) or (C,) -> x̂_0 (B, H, A), not clamped."""


@dataclass(frozen=True)
class DenoisingStep:
    """One step of one batch, before the solver takes it. All but the observations is in normalised units."""

    obs: TensorObservation
    """(B, O, D), or named parts, as the environment gives them."""
    noisy: Tensor
    """x_t (B, H, A)."""
    k: int
    """Steps that follow; 0 emits the actions."""
    timestep: int
    level: Level
    """Signal and noise of x_t."""
    following: Level
    """Of what the step leads to."""
    predict: Callable[[Tensor], Tensor]
    """The network: x_t -> x̂_0, not clamped; differentiable."""
    to_actions: Callable[[Tensor], Tensor]
    """Clean actions in normalised units -> in the environment's."""
    told: Told | None = None
    """The network that is told what shall come of the chunk; None of a policy that cannot be."""
    allowed: Callable[[Tensor], Tensor] = lambda clean: clean
    """Clean actions in normalised units -> those, of the same shape, that are allowed: clamped, and with what is known
    of them put in place."""
    kept: Callable[[Tensor, Tensor], Tensor] = lambda noisy, moved: moved
    """x_t before and after a move (B, H, A) -> it, with what no guide may move as it was."""
    moved: Tensor | None = None
    """x̂_0 (B, H, A), where a guide moved it."""
    remembered: dict[Any, Any] = field(default_factory=dict)
    """What `once` found, for all steps of a sample."""

    @cached_property
    def clean(self) -> Tensor:
        """x̂_0 (B, H, A), as the network predicts it or as guides moved it."""
        return self.allowed(self.predict(self.noisy)) if self.moved is None else self.moved

    def with_clean(self, clean: Tensor) -> DenoisingStep:
        """Return the step with another x̂_0, as far as it is allowed."""
        return replace(self, moved=self.allowed(clean))

    def with_noisy(self, noisy: Tensor) -> DenoisingStep:
        """Return the step with another x_t, as far as it may be moved, from which the network predicts anew.

        Raises:
            ConfigError: a guide moved x̂_0 before, which would be lost.
        """
        first = self.moved is None
        check(first, "guide", "out of order", "a guide that moves noisy actions must come before those that move clean")
        return replace(self, noisy=self.kept(self.noisy, noisy))

    def once(self, see: Callable[[TensorObservation], Seen]) -> Seen:
        """Return ``see(obs)``, which is called at the first step only."""
        if see not in self.remembered:
            self.remembered[see] = see(self.obs)
        found: Seen = self.remembered[see]
        return found


@runtime_checkable
class Guide(Protocol):
    """Moves denoising steps."""

    def shift(self, step: DenoisingStep) -> DenoisingStep:
        """Return the step as it shall be taken: see `DenoisingStep.with_clean` and `with_noisy`."""
        ...


@dataclass(frozen=True)
class Guides:
    """Several, one after the other."""

    guides: tuple[Guide, ...]

    def __post_init__(self) -> None:
        fits = isinstance(self.guides, tuple) and all(isinstance(guide, Guide) for guide in self.guides)
        check(fits, "guides", self.guides, "must be a tuple of guides, which have a method shift(step)")

    def shift(self, step: DenoisingStep) -> DenoisingStep:
        """See `Guide.shift`."""
        for guide in self.guides:
            step = guide.shift(step)
        return step


def guided(
    guide: Guide,
    steps: Iterable[Step],
    schedule: NoiseSchedule,
    network: Callable[[int], Callable[[Tensor], Tensor]],
    *,
    obs: TensorObservation,
    to_actions: Callable[[Tensor], Tensor],
    allowed: Callable[[Tensor], Tensor],
    kept: Callable[[Tensor, Tensor], Tensor] = lambda noisy, moved: moved,
    told: Callable[[int], Told] | None = None,
) -> Advance:
    """Return what `solve_guided` advances by.

    Args:
        guide: moves every step.
        steps: of the solver.
        schedule: their noise.
        network: timesteps, each once and in order -> `DenoisingStep.predict` at them.
        obs: see `DenoisingStep`, as the rest.
        to_actions: ...
        allowed: ...
        kept: ...
        told: timesteps -> `DenoisingStep.told` at them, if the policy can be told anything.
    """
    timesteps = [step.timestep for step in steps]
    levels = [*map(schedule.level, timesteps), CLEAN]
    remembered: dict[Any, Any] = {}

    def advance(noisy: Tensor, i: int) -> tuple[Tensor, Tensor]:
        step = DenoisingStep(
            obs,
            noisy,
            len(timesteps) - 1 - i,
            timesteps[i],
            levels[i],
            levels[i + 1],
            network(timesteps[i]),
            to_actions,
            None if told is None else told(timesteps[i]),
            allowed,
            kept,
            remembered=remembered,
        )
        step = guide.shift(step)
        return step.noisy, step.clean

    return advance
