"""Classifier-free guidance (arXiv:2207.12598; of returns and goals arXiv:2211.15657).

One network predicts with a command c, what shall come of the chunk, and without. Their difference is the score of
p(c | x_t), and

    x̂_0 <- x̂_0(x_t) + w (x̂_0(x_t, c) - x̂_0(x_t))

the same for every prediction type. w = 1 samples from p(x | c), more of it from where c is likelier still; 0 is the
policy as it is.

Shapes: B samples, O observation steps, D observation size, C numbers of a command, H actions of a chunk, A action size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dprl.errors import ConfigError, check
from dprl.guidance.step import DenoisingStep
from dprl.observations import TensorObservation

Command = float | tuple[float, ...] | Callable[[TensorObservation], Tensor]


@dataclass(frozen=True)
class CommandGuide:
    """Tells a policy what shall come of its chunks; it must have been trained with `DiffusionConfig.command`."""

    command: Command
    """The return, 0 the least of the data's and 1 the largest; the goal, a state (C,) in the environment's units; or a
    function of observations (B, O, D), or named parts, that returns a command for each (B, C)."""
    scale: float = 1.2
    """w."""

    def __post_init__(self) -> None:
        try:
            numbers = () if callable(self.command) else torch.tensor(self.command).reshape(-1).tolist()
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"command = {self.command!r}: must be numbers, or a function of observations") from error
        given = callable(self.command) or len(numbers) > 0
        check(given and all(map(math.isfinite, numbers)), "command", self.command, "must be finite numbers")
        real = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        check(real and math.isfinite(self.scale), "scale", self.scale, "must be a finite number")

    def shift(self, step: DenoisingStep) -> DenoisingStep:
        """See `Guide.shift`.

        Raises:
            ConfigError: a policy that cannot be told anything, a command of another size, or a guide that moved x̂_0
                before, which would be lost.
        """
        if self.scale == 0:
            return step
        told, plain = step.told, step.predict
        if told is None:
            raise ConfigError(
                f"command = {self.command!r}: the policy was trained without: see DiffusionConfig.command"
            )
        check(step.moved is None, "guide", "out of order", "a command must come before guides that move clean actions")
        command = step.once(self._of)

        def predict(noisy: Tensor) -> Tensor:
            if self.scale == 1:
                return told(noisy, command)
            without = plain(noisy)
            return without + self.scale * (told(noisy, command) - without)

        return replace(step, predict=predict)

    def _of(self, obs: TensorObservation) -> Tensor:
        if callable(self.command):
            found: Tensor = self.command(obs)
            check(isinstance(found, Tensor), "command", type(found).__name__, "must return a tensor, (B, C) or (C,)")
            return found
        return torch.tensor(self.command).reshape(-1)
