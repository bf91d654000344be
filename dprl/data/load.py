"""Data sets of any format: opened, loaded into memory or left on disk, converted.

Shapes: S steps over all episodes, T steps of one, D observation size, A action size.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dprl import checkpoint
from dprl.data.episodes import Episodes, OnDisk, RewardsFrom
from dprl.data.formats.d4rl import D4RL
from dprl.data.formats.d4rl import NEEDED as D4RL_NEEDED
from dprl.data.formats.dppo_npz import NEEDED as NPZ_NEEDED
from dprl.data.formats.dppo_npz import DPPONpz, arrays_of
from dprl.data.formats.hdf5 import is_hdf5, top_level
from dprl.data.formats.lerobot import LeRobot
from dprl.data.formats.maniskill import ManiSkill
from dprl.data.formats.minari import Described, Minari, write
from dprl.data.formats.minari_tables import MinariTables
from dprl.data.formats.replay_buffer import ReplayBuffer
from dprl.data.formats.robomimic import Robomimic
from dprl.data.source import DataOptions, Episode, Source, damage_named
from dprl.errors import CheckpointError, DatasetError, RunExistsError

FORMATS: tuple[type[Source], ...] = (Minari, MinariTables, LeRobot, ReplayBuffer, D4RL, Robomimic, ManiSkill, DPPONpz)
CACHE = ".cache"
CACHE_VERSION = 3
"""Of what readers make of a file: caches of another version are made anew."""
SHARE_OF_MEMORY = 3
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
TRIED = 50
"""Files of a folder that are looked at where it holds no data set itself."""


def open_dataset(path: str | Path, options: DataOptions | None = None) -> Source:
    """Open a data set of any format, which is told by what is in it. A context manager; iterate over it.

    Raises:
        DatasetError: missing, damaged, or of no format that is known.
    """
    path = Path(path)
    if not path.exists():
        raise DatasetError(f"'{path}' holds no data set: it does not exist")
    if not os.access(path, os.R_OK):
        raise DatasetError(f"'{path}' may not be read: its permissions do not allow it")
    _require_whole(path)
    options = options or DataOptions()
    known = ", ".join(kind.format for kind in FORMATS)
    with damage_named(f"'{path}'", f"any known format ({known})"):
        found = [kind for kind in FORMATS if kind.detects(path)]
    if not found:
        raise DatasetError(f"'{path}' holds no data set: it is none of these: {known}{_hint(path)}")
    kind = found[0]
    for name, value in vars(options).items():
        if value is not None and name not in kind.takes:
            raise DatasetError(f"{name} = {value!r}: '{path}' is {kind.format}, which has no such choice")
    source = kind(path, options)
    try:
        with damage_named(f"'{path}'", kind.format):
            source.open()
        empty = [i for i, length in enumerate(source.lengths) if length < 1]
        if empty:
            raise DatasetError(f"'{path}', episode {empty[0]}: has no steps")
    except BaseException:
        source.close()
        raise
    return source


def _require_whole(path: Path) -> None:
    """Raise DatasetError for a file that is empty, or not of the kind that its name says."""
    if not path.is_file():
        return
    if path.stat().st_size == 0:
        raise DatasetError(f"'{path}' is empty: was it copied whole?")
    if path.suffix in (".npz", ".zip") and not zipfile.is_zipfile(path):
        raise DatasetError(f"'{path}' is damaged: it is no whole {path.suffix} file. Was it copied whole?")
    if path.suffix in (".hdf5", ".h5") and not is_hdf5(path):
        raise DatasetError(f"'{path}' is damaged: it does not begin as an HDF5 file does")


def _hint(path: Path) -> str:
    """What may have been meant, or may be missing."""
    inside = sorted(path.iterdir())[:TRIED] if path.is_dir() else []
    for other in (*inside, path.parent, path.parent.parent):
        with contextlib.suppress(Exception):  # whatever lies there
            if any(kind.detects(other) for kind in FORMATS):
                return f". There is one in '{other}'"
    for names, kind, needed in ((top_level(path), D4RL, D4RL_NEEDED), (arrays_of(path), DPPONpz, NPZ_NEEDED)):
        missing = [name for name in needed if name not in names]
        if 0 < len(missing) < len(needed):
            return f". It would be {kind.format} with {', '.join(missing)}"
    return ""


def load_dataset(
    path: str | Path,
    *,
    memory_map: bool | None = None,
    filter_key: str | None = None,
    keys: tuple[str, ...] | None = None,
) -> Episodes:
    """Load and validate a data set of any format.

    Args:
        path: a file or folder.
        memory_map: leave the numbers and images on disk, see `OnDisk`: they need not fit in memory. They are written
            once, decoded, into ``.cache/<digest>/`` in the folder (beside a file: ``<name>.cache/<digest>/``). Another
            content makes another cache; the old one may be deleted at any time. Default: where they would fill more
            than a third of this machine's memory: splitting episodes off holds them twice for a moment.
        filter_key: of robomimic's files, only the episodes of this mask.
        keys: parts of the observation that make up the state, in this order, and cameras. Default: the format's own.

    Raises:
        DatasetError: missing, damaged, empty, of wrong shapes, or with numbers that are not finite; the message names
            file, episode and step.
    """
    with open_dataset(path, DataOptions(filter_key, keys)) as source:
        layout = _Layout.of(source)
        if memory_map is None:
            memory_map = layout.nbytes > physical_memory() // SHARE_OF_MEMORY
        if memory_map:
            return _cached(source, layout)
        columns = layout.columns(lambda name, shape, dtype: _InMemory(shape, dtype))
        _fill(source, columns)
        return _episodes(source, layout, {name: column.finish() for name, column in columns.items()})


def convert(
    source: Source, path: str | Path, *, description: str = "", on_progress: Callable[[int], None] | None = None
) -> None:
    """Write a data set as Minari's in the new folder `path`, one episode in memory at a time.

    Args:
        source: from `open_dataset`.
        path: the folder.
        description: for the metadata.
        on_progress: called with the number of episodes that were just written.

    Raises:
        RunExistsError: `path` exists.
        DatasetError: an episode is damaged; nothing is left behind.
    """
    folder, layout = Path(path), _Layout.of(source)
    endless = (math.inf,) * layout.action_size
    described = Described(
        source.env_id, layout.observation_size, layout.cameras, tuple(-x for x in endless), endless,
        description or f"from {source.format}, {source.path.name}", layout.rewards_from, source.reward_kind,
    )  # fmt: skip

    def episodes() -> Iterator[Episode]:
        for episode in source:
            yield episode
            if on_progress is not None:
                on_progress(1)

    checkpoint.publish(folder, lambda temporary: write(temporary, folder.name, episodes(), described))


@dataclass(frozen=True)
class _Layout:
    """What all episodes of a data set have in common, as its first has it."""

    lengths: tuple[int, ...]
    observation_size: int
    action_size: int
    cameras: dict[str, tuple[int, ...]]
    """Name -> (height, width, channels)."""
    rewards_from: RewardsFrom
    success_known: bool

    @staticmethod
    def of(source: Source) -> _Layout:
        first = source.read(0)
        rewards_from: RewardsFrom = "data"
        if first.rewards is None:
            rewards_from = "none" if first.success is None else "success"
        cameras = {name: frames.shape for name, frames in first.images.items()}
        sizes = first.observations.shape[1], first.actions.shape[1]
        return _Layout(tuple(source.lengths), *sizes, cameras, rewards_from, first.success is not None)

    @property
    def nbytes(self) -> int:
        """Of everything, once decoded."""
        step = 4 * (self.observation_size + self.action_size + 1) + sum(map(math.prod, self.cameras.values()))
        return step * sum(self.lengths)

    def columns(self, make: Callable[[str, tuple[int, ...], Any], Any]) -> dict[str, Any]:
        """One column for each array: what `make` makes of its name, shape and type."""
        steps, n = sum(self.lengths), len(self.lengths)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "observations": ((steps, self.observation_size), np.float32),
            "actions": ((steps, self.action_size), np.float32),
            "rewards": ((steps,), np.float32),
            "final_observations": ((n, self.observation_size), np.float32),
            "seeds": ((n,), np.int64),
            **dict.fromkeys(("terminated", "success", "final_known"), ((n,), np.bool_)),
            **{f"images.{camera}": ((steps, *shape), np.uint8) for camera, shape in self.cameras.items()},
            **{f"final_images.{camera}": ((n, *shape), np.uint8) for camera, shape in self.cameras.items()},
        }
        return {name: make(name, *shape) for name, shape in shapes.items()}


class _InMemory:
    """An array that is filled a few rows at a time."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self._array = np.empty(shape, dtype)
        self._filled = 0

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Fill in the next rows."""
        self._array[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    def finish(self) -> npt.NDArray[Any]:
        """Return it."""
        return self._array


class _InFile:
    """The same in a .npy file."""

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: Any) -> None:
        self._stream = file.open("wb")
        self._dtype = np.dtype(dtype)
        npy: Any = np.lib.format
        header = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self._stream, header)

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Write the next rows."""
        self._stream.write(np.ascontiguousarray(rows, self._dtype).data)

    def finish(self) -> None:
        """Close the file."""
        self._stream.close()


def _fill(source: Source, columns: dict[str, Any]) -> None:
    """Read every episode into the columns."""
    for episode in source:
        steps, known = len(episode), episode.final_known
        success = bool(episode.success)
        rewards = episode.rewards
        if rewards is None:
            rewards = np.where(np.arange(steps) == steps - 1, np.float32(success), np.float32(0))
        row: dict[str, Any] = {
            "observations": episode.observations[:steps],
            "actions": episode.actions,
            "rewards": rewards,
            "final_observations": episode.observations[-1:],
            "seeds": [episode.seed],
            "terminated": [episode.terminated],
            "success": [success],
            "final_known": [known],
        }
        for camera in episode.images:
            frames = episode.read_images(camera)
            row[f"images.{camera}"], row[f"final_images.{camera}"] = frames[:steps], frames[-1:]
        for name, rows in row.items():
            columns[name].append(np.asarray(rows))


def _episodes(source: Source, layout: _Layout, arrays: dict[str, Any]) -> Episodes:
    """Put the columns together."""
    known = arrays["final_known"]
    plain = ("observations", "actions", "rewards", "final_observations", "seeds", "terminated", "success")
    return Episodes(
        **{name: arrays[name] for name in plain},
        ends=np.cumsum(layout.lengths),
        env_id=source.env_id,
        images={camera: arrays[f"images.{camera}"] for camera in layout.cameras},
        final_images={camera: arrays[f"final_images.{camera}"] for camera in layout.cameras},
        final_known=None if known.all() else known,
        rewards_from=layout.rewards_from,
        success_known=layout.success_known,
        reward_kind=source.reward_kind,
    )


def _cached(source: Source, layout: _Layout) -> Episodes:
    """The same, left on disk. The cache is named after the digest of what it was made of."""
    path = source.path
    cache = (path / CACHE if path.is_dir() else path.with_name(path.name + CACHE)) / _digest(source)

    def write_columns(temporary: Path) -> None:
        columns = layout.columns(lambda name, shape, dtype: _InFile(temporary / f"{name}.npy", shape, dtype))
        try:
            _fill(source, columns)
        finally:
            for column in columns.values():
                column.finish()

    try:
        with contextlib.suppress(RunExistsError):  # it is there, or another process was faster
            if not cache.exists():
                checkpoint.publish(cache, write_columns)
    except OSError as error:
        raise DatasetError(
            f"the data cannot be written to '{cache}': {error}; copy the data set to a folder that can be written, "
            "or load it with memory_map=False"
        ) from error
    large = ("observations", "actions", "rewards")
    try:
        arrays = layout.columns(
            lambda name, shape, dtype: (
                OnDisk.open(cache / f"{name}.npy")
                if name in large or name.startswith("images.")
                else np.load(cache / f"{name}.npy")
            )
        )
        return _episodes(source, layout, arrays)
    except (OSError, ValueError, DatasetError) as error:
        raise DatasetError(f"'{cache}' is damaged: delete it, it is made again ({error})") from error


def _digest(source: Source) -> str:
    """SHA-256 of what is read, how, and by which version; the manifest's, which was verified, where there is one."""
    total = hashlib.sha256(f"{CACHE_VERSION} {type(source).__name__} {source.options}".encode())
    known: dict[str, str] = {}
    with contextlib.suppress(CheckpointError, KeyError, TypeError, NotADirectoryError):
        known = dict(checkpoint.read_json(source.path / checkpoint.MANIFEST)["sha256"])
    base = source.path if source.path.is_dir() else source.path.parent
    files = sorted(source.path.rglob("*")) if source.files == [source.path] and source.path.is_dir() else source.files
    for file in files:
        name = file.relative_to(base).as_posix()
        if not file.is_file() or CACHE in Path(name).parts:
            continue
        total.update(f" {name} {known.get(name) or _sha256(file)}".encode())
    return total.hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def physical_memory() -> int:
    """Bytes of memory in this machine, or in the container it is; endless where it does not say."""
    limit = sys.maxsize
    with contextlib.suppress(OSError, ValueError):  # no such file, or the word max
        limit = int(MEMORY_LIMIT.read_text(encoding="ascii"))
    try:
        return min(limit, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return limit
