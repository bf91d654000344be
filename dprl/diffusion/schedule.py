"""Noise schedules and what a network's output means, shared by everything that noises or denoises.

Both generative families noise as x_t = signal_t x_0 + noise_t ε at the timesteps 0 (nearly clean) to K-1 (nearly pure
noise). Diffusion (arXiv:2006.11239) has signal² + noise² = 1; rectified flow (arXiv:2209.03003) has
signal + noise = 1. A network may predict any combination of x_0 and ε; every solver works on the x_0 that follows.

Shapes: B samples, H actions of a chunk, A action size, K training timesteps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dprl.config import validate
from dprl.errors import check

MAX_BETA = 0.999
COSINE_OFFSET = 0.008
VP_LEAST, VP_MOST = 0.1, 10.0

ScheduleName = Literal["squaredcos_cap_v2", "linear", "scaled_linear", "vp", "rectified_flow"]
PredictionType = Literal["epsilon", "sample", "v_prediction", "velocity"]


class Level(NamedTuple):
    """Of x_t = signal x_0 + noise ε."""

    signal: float
    noise: float


CLEAN = Level(1.0, 0.0)
"""Actions without noise."""


@dataclass(frozen=True)
class ScheduleConfig:
    """A noise schedule, under the names of the diffusers package, and what the network predicts."""

    num_train_timesteps: int = 20
    """K, the noise levels it is trained on."""
    schedule: ScheduleName = "squaredcos_cap_v2"
    """`squaredcos_cap_v2` (cosine), `linear`, `scaled_linear`, `vp` (for few timesteps); or `rectified_flow`, the other
    family."""
    prediction_type: PredictionType = "epsilon"
    """`epsilon` (the noise), `sample` (x_0), `v_prediction` (signal ε - noise x_0, arXiv:2202.00512); a rectified flow
    predicts its `velocity`, x_0 - ε."""
    beta_start: float = 1e-4
    """First β of the linear schedules. They are not rescaled to K: with few timesteps they leave much of the signal, so
    sampling from pure noise starts off their marginal (linear: 1 - ᾱ is 0.64 at K = 100, above 0.9999 at K = 1000)."""
    beta_end: float = 0.02
    """Last β of the linear schedules."""

    def __post_init__(self) -> None:
        validate(self, at_least={"num_train_timesteps": 1}, above={"beta_start": 0})
        ordered = self.beta_start <= self.beta_end < 1
        check(
            ordered, "beta_end", self.beta_end, f"must be at least beta_start, which is {self.beta_start}, and below 1"
        )
        fits = (self.prediction_type == "velocity") == self.is_flow
        allowed = "velocity" if self.is_flow else "epsilon, sample or v_prediction"
        check(fits, "prediction_type", self.prediction_type, f"must be {allowed} with the schedule {self.schedule}")
        if self.schedule.endswith("linear"):  # the cosine's are safe for any K
            signal, noise = self.levels()
            check(float(noise[0]) > 0, "beta_start", self.beta_start, "is lost in float32; must be at least 1e-7")
            check(float(signal[-1]) > 0, "beta_end", self.beta_end, f"leaves no float32 number of the signal after "
                  f"{self.num_train_timesteps} timesteps; lower it")  # fmt: skip

    @property
    def is_flow(self) -> bool:
        """Whether it is a rectified flow."""
        return self.schedule == "rectified_flow"

    def betas(self) -> Tensor:
        """β (K,) of a diffusion schedule, of the precision that diffusers computes each with."""
        k, start, end = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.schedule == "linear":  # arXiv:2006.11239
            return torch.linspace(start, end, k)
        if self.schedule == "scaled_linear":  # arXiv:2112.10752
            return torch.linspace(math.sqrt(start), math.sqrt(end), k) ** 2
        if self.schedule == "vp":  # arXiv:2011.13456's SDE over K steps, as arXiv:2112.07804 discretises it
            steps = torch.arange(1, k + 1, dtype=torch.float64)
            return 1 - torch.exp(-VP_LEAST / k - (VP_MOST - VP_LEAST) * (2 * steps - 1) / (2 * k**2))
        # β_t = 1 - f(t+1)/f(t), f(t) = cos²((t/K + s)/(1 + s) · π/2), arXiv:2102.09672 eq. 17.
        t = torch.arange(k + 1, dtype=torch.float64) / k
        f = torch.cos((t + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(0.0, MAX_BETA)

    def levels(self) -> tuple[Tensor, Tensor]:
        """Signal and noise (K,) each, float64; ᾱ is multiplied up in float32, as existing checkpoints had it."""
        if self.is_flow:
            noise = torch.arange(1, self.num_train_timesteps + 1, dtype=torch.float64) / self.num_train_timesteps
            return 1 - noise, noise
        alphas_bar = torch.cumprod(1 - self.betas().float(), 0).double()
        return alphas_bar.sqrt(), (1 - alphas_bar).sqrt()


class NoiseSchedule(nn.Module):
    """The schedule's tables on the device, and the three things done with them."""

    timesteps: Tensor
    signal: Tensor
    noise: Tensor

    def __init__(self, config: ScheduleConfig) -> None:
        super().__init__()
        self.config = config
        signal, noise = config.levels()
        one, zero = torch.ones_like(signal), torch.zeros_like(signal)
        # prediction = target_clean x_0 + target_noise ε, and so x_0 = from_noisy x_t + from_prediction prediction
        target, inverse = {
            "epsilon": ((zero, one), (1 / signal, -noise / signal)),
            "sample": ((one, zero), (zero, one)),
            "v_prediction": ((-noise, signal), (signal, -noise)),
            "velocity": ((one, -one), (one, noise)),
        }[config.prediction_type]
        tables = {
            "timesteps": torch.arange(config.num_train_timesteps),
            "signal": signal,
            "noise": noise,
            "target_clean": target[0],
            "target_noise": target[1],
            "from_noisy": inverse[0],
            "from_prediction": inverse[1],
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float() if table.is_floating_point() else table, persistent=False)
        self._levels = [Level(*pair) for pair in zip(signal.tolist(), noise.tolist(), strict=True)]
        self._inverse = list(zip(*(table.float().tolist() for table in inverse), strict=True))

    def level(self, t: int) -> Level:
        """Return signal and noise at a timestep."""
        return self._levels[t]

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = signal_t x_0 + noise_t ε: (B, H, A) and (B,) -> (B, H, A)."""
        return self._at("signal", t) * clean + self._at("noise", t) * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network should predict: (B, H, A) and (B,) -> (B, H, A)."""
        if self.config.prediction_type == "epsilon":
            return noise
        return self._at("target_clean", t) * clean + self._at("target_noise", t) * noise

    def predict_clean(self, noisy: Tensor, prediction: Tensor, t: Tensor | int, clip: float | None) -> Tensor:
        """Return the x_0 that `prediction` implies, clamped to ±`clip`: (B, H, A), t (B,) or one -> (B, H, A)."""
        if isinstance(t, int):  # one level for all, as in sampling: plain numbers, which are faster
            from_noisy, from_prediction = self._inverse[t]
            clean = torch.add(from_noisy * noisy, prediction, alpha=from_prediction)
        else:
            clean = self._at("from_noisy", t) * noisy + self._at("from_prediction", t) * prediction
        return clean if clip is None else clean.clamp(-clip, clip)

    def _at(self, table: str, t: Tensor) -> Tensor:
        values: Tensor = getattr(self, table)
        return values[t][:, None, None]
