"""Numbers that change over the iterations of a run: pure functions, so that a resumed run needs no state of theirs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dprl.config import validate
from dprl.errors import check


@dataclass(frozen=True)
class Warmup:
    """A factor of a learning rate: up linearly, then down along a cosine (arXiv:1608.03983, eq. 5), or constant."""

    warmup: int = 0
    """Iterations until the factor is 1."""
    decay: int | None = None
    """Iterations, the warm-up included, until the factor is `final`, where it stays. None: it does not decay."""
    final: float = 0.1
    """Factor at the end of the decay."""

    def __post_init__(self) -> None:
        validate(self, at_least={"warmup": 0, "decay": 1, "final": 0})
        check(
            self.final <= 1, "final", self.final, "must be at most 1: a learning rate that is to end higher is set so"
        )
        ends = self.decay is not None or self.final == Warmup.final
        check(ends, "final", self.final, "is where a decay ends: say in how many iterations, with decay")
        fits = self.decay is None or self.decay > self.warmup
        check(fits, "decay", self.decay, f"must be above warmup, which is {self.warmup}")

    def at(self, iteration: int) -> float:
        """Return the factor of an iteration, counted from 0."""
        if iteration < self.warmup:
            return (iteration + 1) / (self.warmup + 1)
        if self.decay is None:
            return 1.0
        done = min(1.0, (iteration - self.warmup) / (self.decay - self.warmup))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Anneal:
    """A number that goes linearly to another, or stays as it is."""

    final: float = 0.0
    """Where it ends."""
    iterations: int = 0
    """How many iterations that takes; 0: it stays as it is."""
    start: int = 0
    """The first iteration in which it moves."""

    def __post_init__(self) -> None:
        validate(self, at_least={"iterations": 0, "start": 0})
        for name in ("final", "start"):
            moves = self.iterations > 0 or getattr(self, name) == getattr(Anneal, name)
            check(moves, name, getattr(self, name), "is of a number that moves: say in how many iterations")

    def at(self, iteration: int, value: float) -> float:
        """Return what `value` has become."""
        if self.iterations == 0:
            return value
        done = min(1.0, max(0.0, (iteration - self.start) / self.iterations))
        return value + (self.final - value) * done
