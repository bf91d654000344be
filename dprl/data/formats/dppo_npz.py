"""The data sets of the DPPO authors' code (arXiv:2409.00588): one .npz of all steps, one after the other.

    states (S, D), actions (S, A), traj_lengths (episodes,), and perhaps rewards, terminals (S,), images (S, C, h, w)

States and actions are scaled to [-1, 1]; ``normalization.npz`` beside the file (obs_min, obs_max, action_min,
action_max) says from what, and they are scaled back; without it they are read as they are, with a warning. Images of
several cameras are stored as one of many channels, and taken apart. What the last action of an episode led to is not
kept.
"""

from __future__ import annotations

import math
import warnings
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dprl.data.source import (
    CHANNELS,
    Episode,
    Frames,
    Pixels,
    Source,
    damage_named,
    ends_at_the_end,
    flags,
    numbers,
    one_each,
)
from dprl.errors import DatasetError
from dprl.spec import FloatArray

NEEDED = ("states", "actions", "traj_lengths")
KNOWN = (*NEEDED, "rewards", "terminals", "images")
TINY = 1e-6
"""What the authors add to a range before they divide by it."""
CAMERA = "image"


class DPPONpz(Source):
    """One file, such as ``train.npz``."""

    format: ClassVar[str] = "a data set of DPPO's code"

    def open(self) -> None:
        """See `Source.open`."""
        path = self.path
        archive = self._closing.enter_context(zipfile.ZipFile(path))
        here = {name.removesuffix(".npy") for name in archive.namelist()}
        self._arrays = {name: _Array(archive, f"{name}.npy", self._closing) for name in KNOWN if name in here}
        lengths = self._arrays["traj_lengths"]
        if len(lengths.shape) != 1:
            raise DatasetError(f"'{path}': traj_lengths have the shape {lengths.shape}; they must be (episodes,)")
        found = lengths.rows(0, len(lengths))
        broken = [i for i, length in enumerate(found) if length != np.floor(length)]
        if broken:
            raise DatasetError(f"'{path}', episode {broken[0]}: traj_lengths has {found[broken[0]]} steps")
        self.lengths = [int(length) for length in found]
        steps = len(self._arrays["actions"])
        empty = [i for i, length in enumerate(self.lengths) if length < 1]
        if empty:
            raise DatasetError(f"'{path}', episode {empty[0]}: traj_lengths has {self.lengths[empty[0]]} steps")
        if not self.lengths or sum(self.lengths) != steps:
            raise DatasetError(f"'{path}': traj_lengths are {self.lengths[:5]}..., {sum(self.lengths)} steps in all; "
                               f"there are {steps} actions")  # fmt: skip
        for name in ("states", "rewards", "terminals", "images"):
            if name in self._arrays and len(self._arrays[name]) != steps:
                raise DatasetError(f"'{path}': {name} has {len(self._arrays[name])} rows, actions have {steps}")
        images = self._arrays.get("images")
        if images is not None and not _are_images(images):
            raise DatasetError(f"'{path}': images are {images.dtype} {images.shape}; they must be uint8 "
                               "(steps, 1 or 3 for each camera, height, width)")  # fmt: skip
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        self._scales = _scales(self._beside) if self._beside is not None else None
        parts = (self._arrays[name].rows(0, self.lengths[0]) for name in ("states", "actions"))
        if self._scales is None and all(np.abs(part).max(initial=0) <= 1 for part in parts):
            warnings.warn(f"'{path}' begins with states and actions within [-1, 1], and there is no normalization.npz "
                          "beside it to scale them back: right if they were never scaled", stacklevel=2)  # fmt: skip

    @property
    def _beside(self) -> Path | None:
        """``PREFIXnormalization.npz`` beside ``PREFIXtrain.npz`` or ``PREFIXval.npz``.

        Of another name, ``normalization.npz``, but where there are a train.npz or val.npz it belongs to.
        """
        path, pair = self.path, ("train.npz", "val.npz")
        prefixes = [path.name.removesuffix(name) for name in pair if path.name.endswith(name)]
        if not prefixes and any(path.with_name(name).is_file() for name in pair):
            return None
        file = path.with_name(f"{(prefixes or [''])[0]}normalization.npz")
        return file if file.is_file() else None

    @property
    def files(self) -> list[Path]:
        """See `Source.files`."""
        return [self.path] + ([self._beside] if self._beside else [])

    @staticmethod
    def detects(path: Path) -> bool:
        """See `Source.detects`."""
        return set(NEEDED) <= arrays_of(path)

    def _read(self, index: int) -> Episode:
        first, steps = int(self._starts[index]), self.lengths[index]
        where = f"'{self.path}', episode {index}"

        def part(name: str, ndim: int) -> FloatArray:
            return numbers(self._arrays[name].rows(first, first + steps), name, steps, ndim, where)

        states, actions = part("states", 2), part("actions", 2)
        rewards: FloatArray | None = None
        if "rewards" in self._arrays:
            rewards = one_each(self._arrays["rewards"].rows(first, first + steps), "rewards", steps, where)
        terminated = False
        if "terminals" in self._arrays:
            ends = flags(self._arrays["terminals"].rows(first, first + steps), "terminals", steps, where)
            terminated = ends_at_the_end(ends, "terminals", where)
        images: dict[str, Frames] = {}
        if "images" in self._arrays:
            array = self._arrays["images"]
            for camera, channels in _cameras(array.shape[1]).items():
                images[camera] = _Images(array, channels, first, steps, f"{where}: images")
        return Episode(
            where, self._raw("obs", states, where), self._raw("action", actions, where), rewards,
            terminated=terminated, success=None, images=images,
        )  # fmt: skip

    def _raw(self, name: str, scaled: FloatArray, where: str) -> FloatArray:
        if self._scales is None:
            return scaled
        low, high = self._scales[f"{name}_min"], self._scales[f"{name}_max"]
        if low.shape != scaled.shape[1:] or high.shape != low.shape:
            raise DatasetError(f"{where}: there are {scaled.shape[1]} numbers, but normalization.npz has {len(low)} of "
                               f"{name}_min and {len(high)} of {name}_max")  # fmt: skip
        raw: FloatArray = ((scaled + 1) / 2 * (high - low + TINY) + low).astype(np.float32)
        return raw


def arrays_of(path: Path) -> set[str]:
    """Names of the arrays in a .npz file; none, where it is no such file."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return set()
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _are_images(images: _Array) -> bool:
    """Whether they are uint8 (steps, channels, height, width), and not with the channels last."""
    fits = images.dtype == np.uint8 and len(images.shape) == 4
    return fits and bool(_cameras(images.shape[1])) and images.shape[3] not in CHANNELS


def _cameras(channels: int) -> dict[str, slice]:
    """Cameras and their channels: images of several are stored as one of many channels. None where they are odd."""
    if channels in CHANNELS:
        return {CAMERA: slice(channels)}
    count, rest = divmod(channels, 3)
    return {f"{CAMERA}_{i}": slice(3 * i, 3 * i + 3) for i in range(count)} if rest == 0 else {}


class _Array:
    """One array of the archive, of which rows are read without the others."""

    def __init__(self, archive: zipfile.ZipFile, name: str, closing: ExitStack) -> None:
        self._stream = closing.enter_context(archive.open(name))
        npy: Any = np.lib.format
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        self.shape, fortran, self.dtype = readers[npy.read_magic(self._stream)](self._stream)
        if self.dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are not read: they may be programs")
        self._begin = self._stream.tell()
        self._row = self.dtype.itemsize * math.prod(self.shape[1:])
        self._whole: npt.NDArray[Any] | None = None
        if fortran and len(self.shape) > 1:  # stored by columns, so that no row can be read without the others
            content = self._stream.read(self._row * len(self))
            self._whole = np.frombuffer(content, self.dtype).reshape(self.shape, order="F")

    def __len__(self) -> int:
        return int(self.shape[0]) if self.shape else 0

    def rows(self, first: int, end: int) -> npt.NDArray[Any]:
        """Read some rows; in their order that is fast, back again the archive is read anew."""
        if self._whole is not None:
            return self._whole[first:end]
        self._stream.seek(self._begin + first * self._row)
        content = self._stream.read((end - first) * self._row)
        return np.frombuffer(content, self.dtype).reshape(end - first, *self.shape[1:])


@dataclass(frozen=True)
class _Images:
    """The images of one episode, (T, C, height, width) in the file."""

    array: _Array
    channels: slice
    first: int
    length: int
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, channels)."""
        return *self.array.shape[2:], self.channels.stop - (self.channels.start or 0)

    def read(self) -> Pixels:
        """See `Frames.read`."""
        images = self.array.rows(self.first, self.first + self.length)
        return np.moveaxis(images[:, self.channels], 1, 3)


def _scales(file: Path) -> dict[str, FloatArray]:
    with damage_named(f"'{file}'", "DPPO's code"), np.load(file) as arrays:
        names = ("obs_min", "obs_max", "action_min", "action_max")
        scales = {name: numbers(arrays[name], name, len(arrays[name]), 1, f"'{file}'") for name in names}
    for kind in ("obs", "action"):
        low, high = scales[f"{kind}_min"], scales[f"{kind}_max"]
        wrong = np.flatnonzero(low > high) if low.shape == high.shape else low[:0]
        if len(wrong):
            raise DatasetError(f"'{file}': {kind}_min[{wrong[0]}] = {low[wrong[0]]:g} is above {kind}_max, "
                               f"{high[wrong[0]]:g}")  # fmt: skip
    return scales
