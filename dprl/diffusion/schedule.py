"""The noise schedule of DDPM (arXiv:2006.11239) with the cosine betas of arXiv:2102.09672.

| here            | paper   | meaning                                            |
|-----------------|---------|----------------------------------------------------|
| `betas[t]`      | β_t     | variance added by forward step t                   |
| `alphas_bar[t]` | ᾱ_t     | share of the clean signal's variance left after t  |
| t               | t       | 0 is the least noisy step, K-1 the noisiest        |

Shapes: B samples, H actions of a chunk, A action size. All actions are normalised to [-1, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MAX_BETA = 0.999
COSINE_OFFSET = 0.008


def cosine_betas(num_train_timesteps: int) -> Tensor:
    """Return β (K,): β_t = 1 - f(t+1)/f(t), f(t) = cos²((t/K + s)/(1 + s) · π/2), arXiv:2102.09672 eq. 17. float64."""
    t = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    f = torch.cos((t + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(0.0, MAX_BETA)


class NoiseSchedule(nn.Module):
    """Betas, computed in float64, and what follows from them, in float32 as existing checkpoints were trained with."""

    betas: Tensor
    alphas_bar: Tensor
    posterior_clean: Tensor
    posterior_noisy: Tensor
    posterior_std: Tensor

    def __init__(self, num_train_timesteps: int) -> None:
        super().__init__()
        self.num_train_timesteps = num_train_timesteps
        betas = cosine_betas(num_train_timesteps).float()
        alphas_bar = torch.cumprod(1 - betas, 0)
        previous = torch.cat([torch.ones(1), alphas_bar[:-1]])
        # The posterior q(x_{t-1} | x_t, x_0), arXiv:2006.11239 eq. 7.
        tables = {
            "betas": betas,
            "alphas_bar": alphas_bar,
            "signal": alphas_bar.sqrt(),
            "noise": (1 - alphas_bar).sqrt(),
            "clean_from_noisy": (1 / alphas_bar).sqrt(),
            "clean_from_noise": (1 / alphas_bar - 1).sqrt(),
            "posterior_clean": betas * previous.sqrt() / (1 - alphas_bar),
            "posterior_noisy": (1 - betas).sqrt() * (1 - previous) / (1 - alphas_bar),
            "posterior_std": (betas * (1 - previous) / (1 - alphas_bar)).clamp(min=1e-20).sqrt(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε: (B, H, A) and (B,) -> (B, H, A). arXiv:2006.11239 eq. 4."""
        return self._at("signal", t) * clean + self._at("noise", t) * noise

    def predict_clean(self, noisy: Tensor, noise: Tensor, t: Tensor | int, clip: float | None) -> Tensor:
        """Return the x_0 that `noise` implies, clamped to ±`clip`: (B, H, A), t (B,) or one for all -> (B, H, A)."""
        clean = self._at("clean_from_noisy", t) * noisy - self._at("clean_from_noise", t) * noise
        return clean if clip is None else clean.clamp(-clip, clip)

    def posterior(self, clean: Tensor, noisy: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Return mean (B, H, A) and std, (B, 1, 1) or a scalar for one t, of q(x_{t-1} | x_t, x_0)."""
        mean = self._at("posterior_clean", t) * clean + self._at("posterior_noisy", t) * noisy
        return mean, self._at("posterior_std", t)

    def _at(self, table: str, t: Tensor | int) -> Tensor:
        values: Tensor = getattr(self, table)
        return values[t] if isinstance(t, int) else values[t][:, None, None]
