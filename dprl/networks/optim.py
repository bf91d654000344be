"""Which parameters AdamW's weight decay pulls towards zero."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from dprl.errors import check

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def weight_decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups for `torch.optim.AdamW` (arXiv:1711.05101): what decays, and what does not.

    Matrices and kernels of linear and recurrent layers, convolutions and attention decay; biases, norms,
    embeddings and positions do not. Every parameter is in one group, once, in the order of `module.parameters()`, so
    that an optimizer's state, kept by index, fits a module built again.

    Raises:
        ConfigError: `weight_decay` is negative or not finite.
    """
    valid = math.isfinite(weight_decay) and weight_decay >= 0
    check(valid, "weight_decay", weight_decay, "must be a finite number of at least 0")
    decays = {id(layer.weight) for layer in module.modules() if isinstance(layer, _LAYERS)}
    for layer in module.modules():
        if isinstance(layer, nn.MultiheadAttention):
            decays |= {id(getattr(layer, name)) for name in _PROJECTIONS}  # those unused are None
        if isinstance(layer, nn.RNNBase):
            decays |= {id(p) for name, p in layer.named_parameters() if name.startswith("weight")}
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if id(p) in decays], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decays], "weight_decay": 0.0},
    ]
