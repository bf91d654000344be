"""What people watch while a policy is tuned, gathered on the learner's device and read once an iteration."""

from __future__ import annotations

import torch
from torch import Tensor

BY_STEP = "by_step"


class UpdateFigures:
    """Means over an iteration's minibatches; for the ratio, also of each denoising step."""

    def __init__(self, tuned_steps: int, device: torch.device) -> None:
        self._means: dict[str, list[Tensor]] = {}
        self._by_step = torch.zeros(3, tuned_steps, device=device)  # pairs, clipped ones, sum of their KL
        self.gradient_steps = 0

    def add(self, name: str, value: Tensor) -> None:
        """Take in one minibatch's figure."""
        self._means.setdefault(name, []).append(value.detach())

    @torch.no_grad()
    def add_ratio(self, log_ratio: Tensor, bounds: Tensor, k: Tensor) -> None:
        """Take in log-ratios of pairs (B,), clip bounds (2, B) and denoising steps (B,).

        The KL is estimated by E[(ρ - 1) - log ρ] (J. Schulman, Approximating KL divergence, 2020: k3).
        """
        log_ratio = log_ratio.to(self._by_step.dtype)
        ratio = log_ratio.exp()
        kl = (ratio - 1) - log_ratio
        clipped = (ratio < bounds[0]) | (ratio > bounds[1])
        self._by_step.index_add_(1, k, torch.stack([torch.ones_like(kl), clipped.to(kl.dtype), kl]))
        for name, value in (("approx_kl", kl), ("clip_fraction", clipped.to(kl.dtype)), ("ratio_mean", ratio)):
            self.add(name, value.mean())

    def tensors(self) -> dict[str, Tensor]:
        """Return all, for `merge`."""
        means = {
            name: values[0] if len(values) == 1 else torch.stack(values).mean() for name, values in self._means.items()
        }
        return means | {BY_STEP: self._by_step}

    def merge(self, tensors: dict[str, Tensor]) -> None:
        """Take in another's `tensors`, as one minibatch's figures."""
        for name, value in tensors.items():
            if name == BY_STEP:
                self._by_step += value
            else:
                self.add(name, value)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return all means, under `prefix`; of denoising steps, those that were trained."""
        found = {f"{prefix}/{name}": torch.stack(values).mean() for name, values in self._means.items()}
        pairs, clipped, kl = self._by_step
        for k in pairs.nonzero().flatten().tolist():
            found[f"{prefix}/clip_fraction_step_{k}"] = clipped[k] / pairs[k]
            found[f"{prefix}/approx_kl_step_{k}"] = kl[k] / pairs[k]
        values = torch.stack([value.float() for value in found.values()]).tolist()
        return dict(zip(found, values, strict=True)) | {f"{prefix}/gradient_steps": float(self.gradient_steps)}
