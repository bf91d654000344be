"""A network with its optimiser: one gradient step at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dprl import checkpoint


class Learner:
    """AdamW without weight decay (arXiv:1711.05101), fused, with a clipped gradient where one is asked for."""

    def __init__(self, module: nn.Module, learning_rate: float, max_grad_norm: float | None = None) -> None:
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._rate, self._max_grad_norm = learning_rate, max_grad_norm
        recorded = all(p.is_cuda for p in self._parameters)  # then the rate has to lie on the GPU too
        rate = torch.tensor(learning_rate, device=self._parameters[0].device) if recorded else learning_rate
        self._optimizer = torch.optim.AdamW(self._parameters, rate, weight_decay=0.0, fused=True, capturable=recorded)

    def set_rate(self, factor: float) -> None:
        """Multiply the learning rate that was given by `factor`."""
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self._rate * factor)
            else:
                group["lr"] = self._rate * factor

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self._optimizer.zero_grad()

    def step(self) -> Tensor:
        """Follow the gradient; return its norm before it was clipped."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm or math.inf)
        self._optimizer.step()
        return norm

    def state(self) -> dict[str, Any]:
        """Return the optimiser's state."""
        return checkpoint.optimizer_state(self._optimizer)

    def restore(self, state: checkpoint.StateTree) -> None:
        """Take up what `state` returned."""
        checkpoint.load_optimizer_state(self._optimizer, state)
