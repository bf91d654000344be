"""Random streams by name: each is derived from one seed and the name of its purpose, never from global state."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dprl.errors import check_count

IntArray = npt.NDArray[np.int64]


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for the stream `names` of the run seeded `seed`; different names are independent."""
    check_count("seed", seed, 0)
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


class EpisodeNoise:
    """Normal draws that depend on a seed, an environment, its episode and the step within it, and on nothing else.

    They come from Philox, a counter-based generator (J. K. Salmon et al., 2011): the environment and the episode are
    its key, the step its counter. So nothing has to be remembered, and any decision's noise can be drawn again.
    """

    def __init__(self, seed: int, *names: str | int) -> None:
        bits = np.random.Philox(0)
        self._bits, self._draw = bits, np.random.Generator(bits).standard_normal
        self._state: Any = bits.state  # of an empty buffer; set anew for every draw
        self._state["state"]["key"][0] = derive_seed(seed, *names)

    def draw(
        self, shape: Sequence[int], environments: IntArray, episodes: IntArray, steps: IntArray
    ) -> npt.NDArray[np.float32]:
        """Draw from N(0, 1) for n environments, each in an episode (n,) and at a step of it (n,).

        Returns:
            (shape[0], n, *shape[1:]): what is drawn for one environment has the shape `shape`.
        """
        noise = np.empty((len(environments), *shape), np.float32)
        key, counter = self._state["state"]["key"], self._state["state"]["counter"]
        keys = (environments.astype(np.uint64) << np.uint64(32)) + episodes.astype(np.uint64)
        for row, key[1], counter[1] in zip(noise, keys, steps, strict=True):
            self._bits.state = self._state
            self._draw(dtype=np.float32, out=row)
        return noise.swapaxes(0, 1)


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
