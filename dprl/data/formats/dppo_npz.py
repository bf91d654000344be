"""The data sets of the DPPO authors' code (arXiv:2409.00588): one .npz of all steps, one after the other.

    states (S, D), actions (S, A), traj_lengths (episodes,), and perhaps rewards, terminals (S,), images (S, C, h, w)

States and actions are scaled to [-1, 1]; ``normalization.npz`` beside the file (obs_min, obs_max, action_min,
action_max) says from what, and they are scaled back. What the last action of an episode led to is not kept.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dprl.data.source import DataOptions, Episode, Frames, Pixels, Source, numbers
from dprl.errors import DatasetError
from dprl.spec import FloatArray

NEEDED = ("states", "actions", "traj_lengths")
TINY = 1e-6
"""What the authors add to a range before they divide by it."""
CHANNELS = (1, 3)
CAMERA = "image"


class DPPONpz(Source):
    """One file, such as ``train.npz``."""

    format: ClassVar[str] = "a data set of DPPO's code"

    def __init__(self, path: Path, options: DataOptions) -> None:
        super().__init__(path, options)
        with _damage_is_named(path):
            self._archive = zipfile.ZipFile(path)
            self._arrays = {n.removesuffix(".npy"): _Array(self._archive, n) for n in self._archive.namelist()}
            lengths = self._arrays["traj_lengths"].rows(0, len(self._arrays["traj_lengths"])).reshape(-1)
        self.lengths = [int(length) for length in lengths]
        steps = len(self._arrays["actions"])
        if not self.lengths or min(self.lengths) < 1 or sum(self.lengths) > steps:
            raise DatasetError(f"'{path}': traj_lengths are {self.lengths[:5]}..., {sum(self.lengths)} steps in all; "
                               f"there are {steps} actions")  # fmt: skip
        for name in ("states", "rewards", "terminals", "images"):
            if name in self._arrays and len(self._arrays[name]) != steps:
                raise DatasetError(f"'{path}': {name} has {len(self._arrays[name])} rows, actions have {steps}")
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        self._scales = _scales(path)

    @staticmethod
    def detects(path: Path) -> bool:
        """See `Source.detects`."""
        if not path.is_file() or not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return {f"{name}.npy" for name in NEEDED} <= set(archive.namelist())

    def read(self, index: int) -> Episode:
        """See `Source.read`."""
        first, steps = int(self._starts[index]), self.lengths[index]
        where = f"'{self.path}', episode {index}"

        def part(name: str, ndim: int) -> FloatArray:
            return numbers(self._arrays[name].rows(first, first + steps), name, steps, ndim, where)

        with _damage_is_named(self.path):
            states, actions = part("states", 2), part("actions", 2)
            rewards = part("rewards", 1) if "rewards" in self._arrays else None
            terminated = "terminals" in self._arrays and bool(part("terminals", 1)[-1])
        images: dict[str, Frames] = {}
        if "images" in self._arrays:
            images[CAMERA] = _Images(self.path, self._arrays["images"], first, steps, f"{where}: images")
        return Episode(
            where, self._raw("obs", states, where), self._raw("action", actions, where), rewards,
            terminated=terminated, success=None, images=images,
        )  # fmt: skip

    def close(self) -> None:
        """See `Source.close`."""
        self._archive.close()

    def _raw(self, name: str, scaled: FloatArray, where: str) -> FloatArray:
        if self._scales is None:
            return scaled
        low, high = self._scales[f"{name}_min"], self._scales[f"{name}_max"]
        if low.shape != scaled.shape[1:] or high.shape != low.shape:
            raise DatasetError(f"{where}: there are {scaled.shape[1]} numbers, but normalization.npz has {low.shape}")
        raw: FloatArray = ((scaled + 1) / 2 * (high - low + TINY) + low).astype(np.float32)
        return raw


class _Array:
    """One array of the archive, of which rows are read without the others."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self._archive, self._name = archive, name
        self._stream = archive.open(name)
        npy: Any = np.lib.format
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        self.shape, fortran, self.dtype = readers[npy.read_magic(self._stream)](self._stream)
        if fortran and len(self.shape) > 1:
            raise ValueError(f"{name} is stored by columns")
        if self.dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are not read: they may be programs")
        self._begin = self._stream.tell()
        self._row = self.dtype.itemsize * math.prod(self.shape[1:])

    def __len__(self) -> int:
        return int(self.shape[0]) if self.shape else 0

    def rows(self, first: int, end: int) -> npt.NDArray[Any]:
        """Read some rows; in their order that is fast, back again the archive is read anew."""
        self._stream.seek(self._begin + first * self._row)
        content = self._stream.read((end - first) * self._row)
        return np.frombuffer(content, self.dtype).reshape(end - first, *self.shape[1:])


@dataclass(frozen=True)
class _Images:
    """The images of one episode, (T, C, height, width) in the file."""

    path: Path
    array: _Array
    first: int
    length: int
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, channels)."""
        channels, height, width = self.array.shape[1:]
        return height, width, channels

    def read(self) -> Pixels:
        """See `Frames.read`."""
        if self.array.dtype != np.uint8 or len(self.array.shape) != 4 or self.array.shape[1] not in CHANNELS:
            raise DatasetError(f"{self.where} are {self.array.dtype} {self.array.shape}; they must be uint8 "
                               "(S, 1 or 3, height, width)")  # fmt: skip
        with _damage_is_named(self.path):
            return np.moveaxis(self.array.rows(self.first, self.first + self.length), 1, 3)


def _scales(path: Path) -> dict[str, FloatArray] | None:
    """What is in ``PREFIXnormalization.npz`` beside ``PREFIXtrain.npz``."""
    for name in ("train.npz", "val.npz"):
        file = path.with_name(path.name.removesuffix(name) + "normalization.npz")
        if path.name.endswith(name) and file.is_file():
            with _damage_is_named(file), np.load(file, allow_pickle=False) as arrays:
                names = ("obs_min", "obs_max", "action_min", "action_max")
                return {n: numbers(arrays[n], n, len(arrays[n]), 1, f"'{file}'") for n in names}
    return None


@contextmanager
def _damage_is_named(path: Path) -> Iterator[None]:
    try:
        yield
    except DatasetError:
        raise
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(f"'{path}' is damaged or not {DPPONpz.format}: {error}") from error
