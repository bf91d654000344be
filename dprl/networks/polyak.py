"""The one Polyak average: EMA weights and target networks alike."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def polyak_update(online: nn.Module, target: nn.Module, rate: float) -> None:
    """Move every parameter of `target` towards `online`: target <- (1 - rate) target + rate online. In place."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)
    for ours, theirs in zip(target.buffers(), online.buffers(), strict=True):
        ours.copy_(theirs)
