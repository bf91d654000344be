"""What the formats share that are HDF5 files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dprl.data.source import CHANNELS, Frames, Pixels, Source, joined, leaves, numbers, require_h5py
from dprl.errors import DatasetError
from dprl.observations import camera_name
from dprl.spec import FloatArray


class HDF5Source(Source):
    """A source that is one HDF5 file, or holds one."""

    @property
    def file(self) -> Path:
        """The HDF5 file."""
        return self.path

    def open(self) -> None:
        """See `Source.open`."""
        self.h5 = self._closing.enter_context(require_h5py().File(self.file, "r"))


SIGNATURE = b"\x89HDF\r\n\x1a\n"


def is_hdf5(file: Path) -> bool:
    """Whether a file begins as HDF5 files do."""
    with file.open("rb") as stream:
        return stream.read(len(SIGNATURE)) == SIGNATURE


def top_level(path: Path) -> dict[str, bool]:
    """Names in the root of an HDF5 file, and which are groups; none, where it is no such file."""
    if not path.is_file() or not is_hdf5(path):
        return {}
    h5py = require_h5py()
    with h5py.File(path, "r") as h5:
        return {name: h5.get(name, getclass=True) is h5py.Group for name in h5}


def numbered(group: Any, prefix: str, file: Path) -> list[str]:
    """Names like ``demo_12`` in the order of their numbers.

    Raises:
        DatasetError: there are none, or one has no number.
    """
    names = [name for name in group if name.startswith(prefix)]
    odd = [name for name in names if not re.fullmatch(r"\d+", name.removeprefix(prefix))]
    if odd:
        raise DatasetError(f"'{file}', {odd[0]}: the names of episodes are {prefix} and a number")
    if not names:
        raise DatasetError(f"'{file}' has no episodes")
    return sorted(names, key=lambda name: int(name.removeprefix(prefix)))


@dataclass(frozen=True)
class RawFrames:
    """Images (T or T+1, height, width, channels) uint8, and the last one where it is elsewhere."""

    dataset: Any
    where: str
    last: Any = None
    """(T, ...), of which the last row is what the last action led to."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, channels)."""
        return tuple(self.dataset.shape[1:])

    def read(self) -> Pixels:
        """See `Frames.read`."""
        frames: Pixels = np.asarray(self.dataset[()])
        return frames if self.last is None else np.concatenate([frames, np.asarray(self.last[-1:])])


def is_image(dataset: Any) -> bool:
    """Whether these are raw images (rows, height, width, 1 or 3) uint8."""
    return bool(dataset.dtype == np.uint8 and dataset.ndim == 4 and dataset.shape[3] in CHANNELS)


def require_numbers(dataset: Any, name: str, where: str, remedy: str = "") -> None:
    """Raise DatasetError for what has the shape of images but is none that is read."""
    if dataset.ndim >= 4:
        raise DatasetError(f"{where}: {name} is {dataset.dtype} {dataset.shape}; images are uint8 (rows, height, "
                           f"width, 1 or 3), and everything else is numbers of a state{remedy}")  # fmt: skip


def state_and_images(
    parts: Mapping[str, Any], last: Mapping[str, Any] | None, length: int, steps: int, where: str
) -> tuple[FloatArray, dict[str, int], dict[str, Frames]]:
    """Read the parts of an observation: numbers are joined to the state in their order, images become cameras.

    Returned are the state, the names and sizes of its parts, and the cameras.

    Args:
        parts: name -> (length, ...).
        last: the same of what the actions led to, (steps, ...), of which the last row is appended; None: nothing is.
        length: rows of each part.
        steps: of the episode.
        where: file and episode.
    """
    columns, images = dict[str, FloatArray](), dict[str, Frames]()
    for name, dataset in parts.items():
        after = None if last is None else last.get(name)
        if last is not None and (after is None or after.shape[1:] != dataset.shape[1:]):
            raise DatasetError(f"{where}: next_obs has no '{name}' of the shape {(steps, *dataset.shape[1:])}")
        if is_image(dataset):
            if after is not None and len(after) != steps:
                raise DatasetError(f"{where}: next_obs's {name} has {len(after)} images; {steps} actions need {steps}")
            plain = name.removesuffix("_image").removesuffix("/rgb").removeprefix("sensor_data/").removeprefix("image/")
            camera = camera_name(plain)
            if camera in images:
                raise DatasetError(f"{where}: different parts are the same camera '{camera}': {', '.join(parts)}")
            images[camera] = RawFrames(dataset, f"{where}: {name}", after)
            continue
        require_numbers(dataset, name, where, "; keys can leave it out")
        rows = numbers(dataset[()], name, length, None, where, steps=steps).reshape(length, -1)
        if after is not None:
            rows = np.concatenate(
                [rows, numbers(after[()], f"next {name}", steps, None, where).reshape(steps, -1)[-1:]]
            )
        columns[name] = rows
    return *joined(columns, length + (last is not None)), images


def chosen_parts(group: Any, keys: tuple[str, ...] | None, default: list[str], where: str) -> dict[str, Any]:
    """The arrays of an observation's group that are asked for, in that order.

    Raises:
        DatasetError: one is not there; the message lists what is.
    """
    if not hasattr(group, "keys"):
        raise DatasetError(f"{where}: the observations have no named parts")
    parts = dict(leaves(group))
    wanted = default if keys is None else list(keys)
    missing = [name for name in wanted if name not in parts]
    if missing:
        raise DatasetError(f"{where}: there is no '{missing[0]}' among the observations: {', '.join(parts)}")
    return {name: parts[name] for name in wanted}
