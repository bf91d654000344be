"""Diffusion Policy's replay buffers (arXiv:2303.04137): zarr, a folder or a .zip of one, or of what is in it.

    data/action (S, A), data/<part> (S, ...)    all steps one after the other
    meta/episode_ends (episodes,)               index after each episode's last step

The state is ``state`` where there is one, else all numbers but ``timestamp`` in alphabetical order, unless `keys` says
otherwise; images (S, height, width, 3), uint8 or floats from 0 to 255, become cameras. There are no rewards, and what
the last action of an episode led to is not kept.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dprl.data.source import CHANNELS, Episode, Frames, Pixels, Source, is_read, joined, leaves, numbers
from dprl.errors import DatasetError, MissingDependencyError
from dprl.observations import camera_name

ENDS = "meta/episode_ends"


class ReplayBuffer(Source):
    """One buffer."""

    format: ClassVar[str] = "a zarr replay buffer"
    takes: ClassVar[tuple[str, ...]] = ("keys",)

    def open(self) -> None:
        """See `Source.open`."""
        path = self.path
        self._root = require_zarr().open_group(_store(path), mode="r", path=_root_in(path))
        self._closing.callback(self._root.store.close)
        ends = np.asarray(self._root[ENDS][...])
        if ends.ndim != 1 or ends.dtype.kind not in "fiu":
            raise DatasetError(f"'{path}': {ENDS} is {ends.dtype} {ends.shape}; it must be a number for each episode")
        self._ends = ends.astype(np.int64)
        broken = np.flatnonzero(self._ends != ends)
        if len(broken):
            raise DatasetError(f"'{path}', episode {broken[0]}: {ENDS} is {ends[broken[0]]}, no whole number")
        try:
            parts = dict(leaves(self._root["data"]))
        except Exception as error:
            if "codec" not in f"{type(error).__name__} {error}".lower():
                raise
            raise DatasetError(f"'{path}': an array is compressed by a codec that is not installed ({error}): install "
                               "the package that registers it with numcodecs")  from error  # fmt: skip
        files = _files(path)
        unread = _folders(files) - {name.split("/")[0] for name in parts}
        asked = unread if self.options.keys is None else unread & {name.split("/")[0] for name in self.options.keys}
        if asked:
            raise DatasetError(f"'{path}': data/{min(asked)} holds files, but no array: what describes it (.zarray or "
                               "zarr.json) is damaged or not there")  # fmt: skip
        if "action" not in parts:
            raise DatasetError(f"'{path}': data/action is missing")
        self._actions = parts.pop("action")
        steps = int(self._actions.shape[0])
        empty = np.flatnonzero(np.diff(self._ends, prepend=0) < 1)
        if len(empty):
            raise DatasetError(f"'{path}', episode {empty[0]}: {ENDS} does not rise: it has no steps")
        if len(self._ends) == 0 or self._ends[-1] != steps:
            raise DatasetError(f"'{path}': {ENDS} is {self._ends.tolist()[:5]}...; it must rise to the {steps} steps")
        self._starts = np.concatenate([[0], self._ends[:-1]])
        self.lengths = (self._ends - self._starts).tolist()
        usual = [name for name, array in parts.items() if is_read(name, array.dtype)]
        images = [name for name in usual if parts[name].ndim >= 4]
        state = [name for name in usual if name not in (*images, "timestamp")]
        default = (["state"] if "state" in parts else state) + images
        wanted = default if self.options.keys is None else list(self.options.keys)
        self._state, self._images = dict[str, Any](), dict[str, Any]()
        for name in wanted:
            if name not in parts:
                raise DatasetError(f"'{path}': there is no '{name}' in data: {', '.join(parts)}")
            self._take(name, parts[name], steps)
        for name in ("action", *wanted):
            chunk = re.compile(rf"data/{re.escape(name)}/(c[/.])?\d+([/.]\d+)*")
            written = sum(chunk.fullmatch(file) is not None for file in files)
            self._warn_of_gaps(name, self._actions if name == "action" else parts[name], written)

    def _warn_of_gaps(self, name: str, array: Any, written: int) -> None:
        """Say where a chunk is not there: zarr leaves out those that hold its fill value alone, copies lose others."""
        all_of_them = array.nchunks
        if array.shards is None and written < all_of_them:
            warnings.warn(
                f"'{self.path}': {all_of_them - written} of {all_of_them} chunks of data/{name} are not there and read "
                f"as {array.fill_value}: right if it was written so, wrong if a copy is not complete", stacklevel=2,
            )  # fmt: skip

    def _take(self, name: str, array: Any, steps: int) -> None:
        """Let a part be of the state, or a camera."""
        if array.shape[0] != steps:
            raise DatasetError(f"'{self.path}': data/{name} has {array.shape[0]} rows, data/action has {steps}")
        if array.ndim < 4:
            self._state[name] = array
            return
        camera = camera_name(name)
        if array.ndim != 4 or array.shape[3] not in CHANNELS:
            raise DatasetError(
                f"'{self.path}': data/{name} has the shape {array.shape}; images are (steps, height, width, 1 or 3). "
                "keys can leave it out"
            )
        if camera in self._images:
            raise DatasetError(f"'{self.path}': different parts are the same camera '{camera}'")
        self._images[camera] = array

    @staticmethod
    def detects(path: Path) -> bool:
        """See `Source.detects`."""
        if path.is_dir():
            return (path / ENDS).exists()
        if not path.is_file() or not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return _root_in_zip(archive.namelist()) is not None

    def _read(self, index: int) -> Episode:
        rows, steps = slice(int(self._starts[index]), int(self._ends[index])), self.lengths[index]
        where = f"'{self.path}', episode {index}"
        actions = numbers(self._actions[rows], "data/action", steps, 2, where)
        state = {name: numbers(a[rows], f"data/{name}", steps, None, where) for name, a in self._state.items()}
        observations, sizes = joined(state, steps)
        images: dict[str, Frames] = {
            camera: _Frames(array, rows, f"{where}: camera {camera}") for camera, array in self._images.items()
        }
        return Episode(where, observations, actions, None, terminated=False, success=None, images=images, parts=sizes)


@dataclass(frozen=True)
class _Frames:
    """One camera's images of one episode."""

    array: Any
    rows: slice
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, channels)."""
        return tuple(self.array.shape[1:])

    def read(self) -> Pixels:
        """See `Frames.read`."""
        frames = np.asarray(self.array[self.rows])
        if frames.dtype == np.uint8:
            return frames
        broken = np.flatnonzero(~np.isfinite(frames.reshape(len(frames), -1)).all(axis=1))
        if len(broken):
            raise DatasetError(f"{self.where}, step {broken[0]}: the image is not finite")
        black = not frames.any()
        if not (frames.min() >= 0 and (black or 1 < frames.max() <= 255)):
            raise DatasetError(f"{self.where} is {frames.dtype} from {frames.min():g} to {frames.max():g}; images are "
                               "uint8, or floats from 0 to 255")  # fmt: skip
        return frames.round().astype(np.uint8)


def _store(path: Path) -> Any:
    return str(path) if path.is_dir() else require_zarr().storage.ZipStore(path, mode="r")


def _root_in(path: Path) -> str:
    """Where in a folder or archive the buffer begins."""
    if path.is_dir():
        return ""
    with zipfile.ZipFile(path) as archive:
        return _root_in_zip(archive.namelist()) or ""


def _root_in_zip(names: list[str]) -> str | None:
    """The same: at the root, or a folder below it; None where there is none."""
    found = (name.split(f"{ENDS}/")[0] for name in names if f"{ENDS}/" in name)
    roots = sorted({root.rstrip("/") for root in found if root[-1:] in ("", "/") and not root.startswith("__MACOSX")})
    if len(roots) > 1:
        raise DatasetError(f"the archive holds several replay buffers: {', '.join(roots)}; unpack it and name one")
    return roots[0] if roots else None


def _folders(files: list[str]) -> set[str]:
    """What lies below data/, without what tools leave there."""
    below = (file.split("/") for file in files if file.startswith("data/"))
    return {parts[1] for parts in below if len(parts) > 2 and not parts[1].startswith((".", "__"))}


def _files(path: Path) -> list[str]:
    """Every file of the buffer."""
    if path.is_dir():
        return [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    with zipfile.ZipFile(path) as archive:
        return [name.removeprefix(f"{_root_in(path)}/") for name in archive.namelist()]


def require_zarr() -> Any:
    """Return the zarr module, or raise MissingDependencyError."""
    try:
        import zarr
    except ImportError as error:
        raise MissingDependencyError("zarr", "data", "reading a replay buffer") from error
    return zarr
