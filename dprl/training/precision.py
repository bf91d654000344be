"""With how many digits the networks compute in training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from dprl.errors import check

Precision = Literal["float32", "tf32", "bfloat16"]


def check_precision(precision: Precision, device: torch.device) -> None:
    """Warn where `precision` costs time instead of saving it.

    Raises:
        ConfigError: TF32 on a device that does not have it.
    """
    fits = precision != "tf32" or device.type == "cuda"
    check(fits, "precision", precision, f"is of NVIDIA's GPUs; the policy is on {device}: use float32 or bfloat16")
    if precision == "bfloat16" and device.type == "cpu" and not _has_bfloat16():
        warnings.warn("this processor has no instructions for bfloat16 and will be many times slower with it: "
                      "set precision = 'float32', or train on a GPU", stacklevel=3)  # fmt: skip


def _has_bfloat16() -> bool:
    """Whether this processor computes in bfloat16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def multiplying(precision: Precision) -> Iterator[None]:
    """Let the products of float32 matrices be of TF32, forward and backward, where that is the precision."""
    before = torch.get_float32_matmul_precision()
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Let a forward pass be of bfloat16, by torch.autocast, where that is the precision."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield
