"""Value-gradient guidance (arXiv:2105.05233, arXiv:2205.09991, arXiv:2304.12824).

To tilt p(x_0) to p(x_0) exp(s J(x_0)), the score at x_t = α x_0 + σ ε takes s g more, where g = ∇_{x_t} E_t(x_t) and
E_t(x_t) = log E[exp(J(x_0)) | x_t]. In terms of what the network predicts that is

    ε̂ <- ε̂ - s σ g,   the same as   x̂_0 <- x̂_0 + s (σ² / α) g

which every solver and prediction type takes alike. E_t is seldom known. What g is taken of:

    noisy      a value of the noisy actions, J(x_t, t), learned as such                     Diffuser, QGPO's energy
    through    the value of x̂_0(x_t), the network differentiated                            arXiv:2209.14687
    held       the same with ∂x̂_0/∂x_t = 1/α: cheap, and far too large where noise is much

and what x̂_0 is moved by:

    score      s (σ² / α) g, the above
    variance   s (σ'² / α') g with the level after the step: ddpm's mean moved by s β̃ g, β̃ its variance; 0 at the last
    noise      s σ g
    constant   s g
    normalized s σ g / rms(g) for each chunk: about s σ for each number, whatever the value's units

Where nothing of the signal is left (α = 0, a flow's first step) x_t says nothing, and nothing is moved.

Shapes: B samples, O observation steps, D observation size, H actions of a chunk, A action size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from dprl.config import validate
from dprl.errors import ConfigError, check
from dprl.guidance.step import DenoisingStep
from dprl.observations import TensorObservation, map_parts

Gradient = Literal["held", "through", "noisy"]
Scaling = Literal["score", "variance", "noise", "constant", "normalized"]


@runtime_checkable
class Value(Protocol):
    """What clean actions are worth: `ChunkCritic`, or a function of a user's own as `Reward`."""

    def at(self, obs: TensorObservation) -> Callable[[Tensor], Tensor]:
        """What chunks are worth where `obs` was observed; called once for all steps of a sample.

        (B, O, D), or named parts -> a differentiable function: (B, H, A) in the environment's units -> (B,).
        """
        ...


@runtime_checkable
class NoisyValue(Protocol):
    """What noisy actions are worth."""

    def noisy_at(self, obs: TensorObservation) -> Callable[[Tensor, int], Tensor]:
        """As `Value.at`; of x_t (B, H, A) in normalised units, and the training timestep t."""
        ...


@dataclass(frozen=True)
class Reward:
    """A user's differentiable function of observations and chunks, as a value and a scorer."""

    function: Callable[[TensorObservation, Tensor], Tensor]
    """(B, O, D), or named parts, and (B, H, A) in the environment's units -> (B,)."""

    def __post_init__(self) -> None:
        check(callable(self.function), "function", self.function, "must be a function of observations and actions")

    def at(self, obs: TensorObservation) -> Callable[[Tensor], Tensor]:
        """See `Value.at`."""
        return lambda actions: self._asked(obs, actions)

    @torch.no_grad()
    def score(self, obs: TensorObservation, actions: Tensor) -> Tensor:
        """See `dprl.policy.Scorer`."""
        return self._asked(obs, actions.clone())

    def _asked(self, obs: TensorObservation, actions: Tensor) -> Tensor:
        """What the function says; what it writes into a tensor changes nothing else."""
        try:
            return self.function(obs.clone() if isinstance(obs, Tensor) else obs, actions)
        except Exception as error:  # whatever it raises, its user is told of what it was given
            name = getattr(self.function, "__name__", type(self.function).__name__)
            seen = map_parts(lambda part: tuple(part.shape), obs)
            raise ConfigError(
                f"{name}(obs, actions) raised {type(error).__name__}: {error}. It was given observations {seen} and "
                f"actions {tuple(actions.shape)}"
            ) from error


@dataclass(frozen=True)
class ValueGuide:
    """Moves x̂_0 of each step up a value's gradient."""

    of: Value | NoisyValue
    """What is climbed."""
    scale: float = 1.0
    """s; 0 leaves every sample as it is."""
    gradient: Gradient = "held"
    scaling: Scaling = "variance"
    n_steps: int = 1
    """How often at each denoising step, from where the last one led. With `through` each takes the network anew."""
    skip_last: int = 0
    """Leave so many last denoising steps alone."""

    def __post_init__(self) -> None:
        noisy = self.gradient == "noisy"
        method = "noisy_at(obs)" if noisy else "at(obs)"
        fits = isinstance(self.of, NoisyValue if noisy else Value)
        check(fits, "of", type(self.of).__name__, f"must have a method {method} for gradient = {self.gradient}")
        validate(self, at_least={"n_steps": 1, "skip_last": 0})
        moving = self.n_steps == 1 or self.gradient != "noisy"
        check(moving, "n_steps", self.n_steps, "must be 1 with gradient = noisy: the noisy actions stay in place, and "
              "so does the gradient; a larger scale does as much")  # fmt: skip

    def shift(self, step: DenoisingStep) -> DenoisingStep:
        """See `Guide.shift`."""
        if self.scale == 0 or step.k < self.skip_last or step.level.signal == 0:
            return step
        by = self.scale * self._factor(step)
        if by == 0:  # `variance` at the last step
            return step
        for _ in range(self.n_steps):
            step, gradient = self._gradient(step)
            if self.scaling == "normalized":
                gradient = gradient / gradient.pow(2).mean((1, 2), keepdim=True).sqrt().clamp(min=SMALLEST_RMS)
            step = step.with_clean(torch.add(step.clean, gradient, alpha=by))
        return step

    def _gradient(self, step: DenoisingStep) -> tuple[DenoisingStep, Tensor]:
        """Return g (B, H, A), with `held` at x̂_0; and the step, of which the network may have been taken."""
        if self.gradient == "noisy":
            return step, noisy_gradient(cast("NoisyValue", self.of), step)
        value = cast("Value", self.of)
        if self.gradient == "held":
            return step, clean_gradient(value, step)
        with torch.enable_grad():
            noisy = step.noisy.detach().requires_grad_()
            predicted = step.predict(noisy)
        step = step if step.moved is not None else step.with_clean(predicted.detach())
        # the clamp is passed straight through: what is clamped can still come back
        (gradient,) = torch.autograd.grad(predicted, noisy, clean_gradient(value, step))
        return step, gradient

    def _factor(self, step: DenoisingStep) -> float:
        """What the gradient is multiplied by, beside s; ∂x̂_0/∂x_t of `held` too, where the length of g counts."""
        (signal, noise), (signal_next, noise_next) = step.level, step.following
        if self.scaling == "normalized":
            return noise
        factors = {"score": noise**2 / signal, "variance": noise_next**2 / signal_next, "noise": noise, "constant": 1.0}
        return factors[self.scaling] / (signal if self.gradient == "held" else 1.0)


@dataclass(frozen=True)
class DiffuserGuide:
    """Moves x_t of each step up the gradient of a noisy value, before the network sees it (arXiv:2205.09991)."""

    of: NoisyValue
    scale: float = 0.1
    """0 leaves every sample as it is."""
    by_variance: bool = True
    """Whether the gradient is multiplied by ddpm's posterior variance."""
    n_steps: int = 2
    """How often at each denoising step."""
    skip_last: int = 2
    """Leave so many last denoising steps alone."""

    def __post_init__(self) -> None:
        fits = isinstance(self.of, NoisyValue)
        check(fits, "of", type(self.of).__name__, "must have a method noisy_at(obs)")
        validate(self, at_least={"n_steps": 1, "skip_last": 0})

    def shift(self, step: DenoisingStep) -> DenoisingStep:
        """See `Guide.shift`."""
        if self.scale == 0 or step.k < self.skip_last or step.level.signal == 0:
            return step
        (signal, noise), (signal_next, noise_next) = step.level, step.following
        variance = (noise_next / noise) ** 2 * (1 - (signal / signal_next) ** 2) if self.by_variance else 1.0
        for _ in range(self.n_steps):
            step = step.with_noisy(step.noisy + self.scale * variance * noisy_gradient(self.of, step))
        return step


def noisy_gradient(value: NoisyValue, step: DenoisingStep) -> Tensor:
    """Of a value of noisy actions at x_t: (B, H, A)."""
    worth = step.once(value.noisy_at)
    return _gradient_at(step.noisy, lambda noisy: worth(noisy, step.timestep))


def clean_gradient(value: Value, step: DenoisingStep) -> Tensor:
    """Of a value at x̂_0, in normalised units: (B, H, A)."""
    worth = step.once(value.at)
    return _gradient_at(step.clean, lambda clean: worth(step.to_actions(clean)))


def _gradient_at(x: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values = value(x)
    found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    check(found == (len(x),), "value", found, f"must be a tensor of one number for each of {len(x)} chunks")
    check(values.requires_grad, "value", "without a gradient", UNDIFFERENTIABLE)
    (gradient,) = torch.autograd.grad(values, x, torch.ones_like(values), allow_unused=True)
    check(gradient is not None, "value", "without a gradient", UNDIFFERENTIABLE)
    return gradient


SMALLEST_RMS = 1e-12
UNDIFFERENTIABLE = "must be differentiable in the actions"
