"""Mish (arXiv:1908.08681), x tanh(softplus(x)), by one exponential: on a CPU torch's own takes about twice as long."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

LARGEST_EXPONENT = 20.0
"""Beyond it tanh(softplus(x)) is 1 in float32, and squares of exponentials are still finite."""
FEWEST = 4_096
"""Numbers from which it pays. The last bits of a result depend on which side it is."""


def mish(x: Tensor) -> Tensor:
    """As `torch.nn.functional.mish`, of any shape; differentiable as often as one likes, but not by `torch.func`."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return functional.mish(x)
    if torch.compiler.is_compiling():
        e = x.clamp(max=LARGEST_EXPONENT).exp()
        n = e + 0.5 * e * e
        return x * (n / (n + 1))
    return cast("Tensor", _Mish.apply(x)) if x.numel() >= FEWEST else functional.mish(x)  # type: ignore[no-untyped-call]


class Mish(nn.Module):
    """The same as a layer, as `torch.nn.Mish`."""

    def forward(self, x: Tensor) -> Tensor:
        """See `mish`."""
        return mish(x)


class _Mish(torch.autograd.Function):
    """With e = exp(x) and n = e + e² / 2: tanh(softplus(x)) = n / (n + 1), and its derivative e (e + 1) / (n + 1)²."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        e = x.clamp(max=LARGEST_EXPONENT).exp_()
        n = e.addcmul_(e, e, value=0.5)
        return n.div_(n + 1.0).mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        if torch.is_grad_enabled():  # this has a derivative in turn, which what is below overwrites
            t = functional.softplus(x).tanh()
            return grad * (t + x * x.sigmoid() * (1 - t * t))
        x = x.clamp(max=LARGEST_EXPONENT)
        e = x.exp()
        n = torch.addcmul(e, e, e, value=0.5)
        n_plus_1 = n + 1.0
        return e.addcmul_(e, e).mul_(x).div_(n_plus_1).add_(n).div_(n_plus_1).mul_(grad)
