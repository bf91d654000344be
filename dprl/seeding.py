"""Random streams by name: each is derived from one seed and the name of its purpose, never from global state."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from dprl.errors import check


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for the stream `names` of the run seeded `seed`; different names are independent."""
    check(seed >= 0, "seed", seed, "must be at least 0")
    words = [zlib.crc32(name.encode()) if isinstance(name, str) else name for name in names]
    state = np.random.SeedSequence([seed, *words]).generate_state(2, np.uint32)
    return (int(state[0]) << 31) ^ int(state[1])


def torch_generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a `torch.Generator` on `device` for the stream `names` of the run seeded `seed`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *names))


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """Return a numpy `Generator` for the stream `names` of the run seeded `seed`."""
    return np.random.default_rng(derive_seed(seed, *names))


def draw_normal(shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw from N(0, 1) where `generator` is, else on `device` with torch's own; return it on `device`."""
    source = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=source).to(device)


def draw_uniform(shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw from [0, 1) where `generator` is, else on `device` with torch's own; return it on `device`."""
    source = device if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, device=source).to(device)


@contextmanager
def seeded_init(seed: int, *names: str | int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Let torch's global generators, of the CPU and `device`, be the stream `names` of `seed`; restore them afterwards.

    For what takes no generator: the initial weights of modules, and dropout.
    """
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(derive_seed(seed, *names))
        if cuda:
            torch.cuda.manual_seed(derive_seed(seed, *names))
        yield
