"""LeRobotDataset v2.1 and v3: a folder of parquet tables and videos.

    meta/info.json      codebase_version, features, fps, data_path, video_path
    meta/episodes...    v2.1: episodes.jsonl; v3: parquet tables that say where each episode lies in which files
    data/...            one row for each step: observation.state, action, episode_index, next.reward, next.success, ...
    videos/...          v2.1: one for each episode and camera; v3: many episodes in one

The state is ``observation.state`` and what other numbers are observed (``observation.environment_state``), unless
`keys` says otherwise. Images are cameras, in videos (decoded by imageio's ffmpeg) or in the tables. What the last
action of an episode led to is not kept. An episode has terminated where ``next.success`` says so at its end, or,
without that, ``next.done``.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dprl.data.images import decode, stack
from dprl.data.source import (
    CHANNELS,
    Episode,
    Frames,
    Pixels,
    Source,
    damage_named,
    flags,
    is_read,
    joined,
    numbers,
    one_each,
)
from dprl.errors import DatasetError, MissingDependencyError
from dprl.observations import IMAGES, STATE, camera_name
from dprl.spec import FloatArray, IntArray

INFO = Path("meta") / "info.json"
OBSERVATION = "observation."
VERSIONS = ("v2.0", "v2.1", "v3.0")
VISUAL = ("image", "video")
TEXT = ("string", "str", "language", "object")
SAME_RATE = 0.01
ROWS_AT_ONCE = 16_384
"""How near, relatively, a video's frames per second are to what was said."""
EPISODE = "episode_index"
OUTCOMES = ("next.reward", "next.success", "next.done")


@dataclass(frozen=True)
class _Place:
    """Where an episode lies."""

    index: int
    length: int
    table: Path
    videos: dict[str, tuple[Path, float]]
    """Camera's part -> file, and at which second the episode begins in it."""


class LeRobot(Source):
    """One data set."""

    format: ClassVar[str] = "a LeRobotDataset"
    takes: ClassVar[tuple[str, ...]] = ("keys",)

    def open(self) -> None:
        """See `Source.open`."""
        path = self.path
        with damage_named(f"'{path / INFO}'", self.format):
            info = json.loads((path / INFO).read_text(encoding="utf-8"))
            version, self._features, self._fps = (
                str(info["codebase_version"]),
                dict(info["features"]),
                float(info["fps"]),
            )
            if version not in VERSIONS:
                raise DatasetError(f"'{path / INFO}': codebase_version is {version}; what is read is {VERSIONS}")
            if "action" not in self._features or not self._fps > 0:
                raise DatasetError(f"'{path / INFO}': there must be a feature 'action', and fps above 0")
            self._parts = self._chosen()
            self._kinds = {name: str(self._features[name]["dtype"]) for name in self._parts}
            self._shapes = {n: _shape(self._features[n]) for n in self._parts if self._kinds[n] in VISUAL}
        cameras = [_camera(name) for name in self._shapes]
        if len(set(cameras)) < len(cameras):
            raise DatasetError(f"'{path / INFO}': different features are the same camera: {', '.join(self._shapes)}")
        with damage_named(f"'{path / 'meta'}'", self.format):
            self._apart = version != "v3.0"  # an episode has files of its own
            self._places = (_places_of_v3 if version == "v3.0" else _places_of_v2)(path, info, self._of_kind("video"))
        if not self._places:
            raise DatasetError(f"'{path}' has no episodes")
        self._require_all(info)
        empty = [place.index for place in self._places if place.length < 1]
        if empty:
            raise DatasetError(f"'{path / 'meta'}', episode {empty[0]}: has no steps")
        self.lengths = [place.length for place in self._places]
        self._tables = _Tables()
        self._closing.callback(self._tables.close)

    def _require_all(self, info: dict[str, Any]) -> None:
        """Raise DatasetError unless the episodes that are listed are all there are, each once."""
        listed = [place.index for place in self._places]
        twice = [index for index, times in Counter(listed).items() if times > 1]
        if twice:
            raise DatasetError(f"'{self.path / 'meta'}': episode {twice[0]} is listed twice")
        found = {"total_episodes": len(listed), "total_frames": sum(place.length for place in self._places)}
        for key, n in found.items():
            if int(info.get(key, n)) != n:
                raise DatasetError(f"'{self.path / INFO}': {key} is {info[key]}, but meta's list of episodes has {n}")

    @property
    def files(self) -> list[Path]:
        """See `Source.files`."""
        return sorted(
            file for part in ("meta", "data", "videos") for file in (self.path / part).rglob("*") if file.is_file()
        )

    @staticmethod
    def detects(path: Path) -> bool:
        """See `Source.detects`."""
        return (path / INFO).is_file()

    def _read(self, index: int) -> Episode:
        place = self._places[index]
        where, steps = f"'{place.table}', episode {place.index}", place.length
        columns = self._rows(place)

        def part(name: str) -> npt.NDArray[Any]:
            return numbers(_array(columns[name], name, where), name, steps, None, where).reshape(steps, -1)

        needed = ["action", *self._parts, *(name for name in OUTCOMES if name in self._features)]
        absent = [name for name in needed if self._kinds.get(name) != "video" and name not in columns]
        if absent:
            raise DatasetError(f"{where}: the column {absent[0]} is missing, which meta/info.json has")
        with damage_named(where, self.format):
            state = {name: part(name) for name in self._parts if name not in self._shapes}
            observations, sizes = joined(state, steps)
            actions = part("action")
            for name, read in (*state.items(), ("action", actions)):
                self._require_size(name, read.shape[1], where)
            rewards: FloatArray | None = None
            if OUTCOMES[0] in columns:
                rewards = one_each(_array(columns[OUTCOMES[0]], OUTCOMES[0], where), OUTCOMES[0], steps, where)
            success, done = (
                flags(part(name), name, steps, where) if name in columns else None for name in OUTCOMES[1:]
            )
            if "frame_index" in columns:
                self._require_in_turn(part("frame_index")[:, 0], where)
        images: dict[str, Frames] = {}
        for name in self._of_kind("video"):
            images[_camera(name)] = _Video(
                *place.videos[name], self._fps, steps, self._shapes[name], f"{where}: {name}", self._apart
            )
        for name in self._of_kind("image"):
            images[_camera(name)] = _Encoded(columns[name], self._shapes[name], f"{where}: {name}")
        ended = done if success is None else success
        return Episode(
            where, observations, actions, rewards,
            terminated=ended is not None and bool(ended[-1]),
            success=None if success is None else bool(success.any()),
            images=images,
            parts=sizes,
        )  # fmt: skip

    def _require_size(self, name: str, size: int, where: str) -> None:
        """Raise DatasetError unless a feature has as many numbers as meta/info.json says."""
        said = math.prod(int(n) for n in self._features[name].get("shape", (size,)))
        if said != size:
            raise DatasetError(f"{where}: {name} has {size} numbers a step; meta/info.json says {said}")

    def _require_in_turn(self, frames: npt.NDArray[Any], where: str) -> None:
        if frames[0] != 0:
            raise DatasetError(f"{where}, step 0: frame_index is {frames[0]:g}; it must begin with 0")
        wrong = np.flatnonzero(np.diff(frames) != 1)
        if len(wrong):
            step = wrong[0] + 1
            raise DatasetError(f"{where}, step {step}: frame_index is {frames[step]:g} after {frames[step - 1]:g}")

    def _chosen(self) -> list[str]:
        """Parts of the observation, by name: numbers first, the state before others; no parts of another part."""
        seen = [n for n, feature in self._features.items() if n.startswith(OBSERVATION) and _is_observed(n, feature)]
        seen = [name for name in seen if not any(name.startswith(f"{other}.") for other in seen)]
        if self.options.keys is not None:
            missing = [name for name in self.options.keys if name not in self._features]
            if missing:
                known = ", ".join(self._features)
                raise DatasetError(f"'{self.path / INFO}': there is no feature '{missing[0]}': {known}")
            return list(self.options.keys)
        return sorted(seen, key=lambda name: (self._features[name]["dtype"] in VISUAL, name != STATE, name))

    def _of_kind(self, kind: str) -> list[str]:
        return [name for name in self._parts if self._kinds[name] == kind]

    def _rows(self, place: _Place) -> dict[str, Any]:
        """The columns that are needed of one episode's rows."""
        with damage_named(f"'{place.table}'", self.format):
            wanted = {"action", "frame_index", *self._parts, *OUTCOMES}
            table, episodes = self._tables.around(place.table, place.index, wanted)
        rows = np.flatnonzero(episodes == place.index)
        if len(rows) != place.length or (np.diff(rows) != 1).any():
            found = f"{len(rows)} rows, but {place.length} in meta"
            raise DatasetError(f"'{place.table}': episode {place.index} has {found}, or they are not in turn")
        part = table.slice(int(rows[0]), len(rows))
        return {name: part[name] for name in part.column_names}


class _Tables:
    """Parquet files, of which the row groups that were read last stay at hand: the next episode may share them."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._opened: Any = None
        self._groups: list[int] | None = None
        self._table: Any = None
        self._episodes: Any = None

    def around(self, file: Path, episode: int, wanted: set[str]) -> tuple[Any, IntArray]:
        """Read the columns `wanted`, those that there are, of the row groups that an episode may lie in.

        Returns them, and of which episode each row is.
        """
        if file != self._file:
            self.close()
            self._opened, self._file = (
                require_pyarrow().parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20),
                file,
            )
        here = self._opened.schema_arrow.names
        if EPISODE not in here:
            raise DatasetError(f"'{file}': the column {EPISODE} is missing")
        groups = self._groups_with(episode)
        if groups != self._groups:
            columns = [name for name in here if name in wanted or name == EPISODE]
            self._groups, self._table = groups, None  # let go of the others first
            # in parts: all of a row group at once takes four times its own memory
            parts = self._opened.iter_batches(ROWS_AT_ONCE, groups, columns, use_threads=False)
            schema = self._opened.schema_arrow
            some = require_pyarrow().schema([schema.field(name) for name in columns])
            self._table = require_pyarrow().Table.from_batches(parts, some)
            self._episodes = np.asarray(self._table[EPISODE])
        return self._table, self._episodes

    def _groups_with(self, episode: int) -> list[int]:
        about, schema = self._opened.metadata, self._opened.schema
        leaf = next(i for i in range(about.num_columns) if schema.column(i).path == EPISODE)
        said = [about.row_group(group).column(leaf).statistics for group in range(about.num_row_groups)]
        return [g for g, s in enumerate(said) if s is None or not s.has_min_max or s.min <= episode <= s.max]

    def close(self) -> None:
        """Let go of the file."""
        if self._opened is not None:
            self._opened.close()
        self._file = self._opened = self._groups = self._table = self._episodes = None


def _camera(name: str) -> str:
    """``observation.images.top`` and ``observation.top`` are the camera ``top``."""
    return camera_name(name.removeprefix(IMAGES).removeprefix(OBSERVATION))


def _is_observed(name: str, feature: dict[str, Any]) -> bool:
    """Whether a feature is numbers or pictures: no text, and no picture whose grey or colours stand for distances."""
    depth = bool((feature.get("info") or {}).get("video.is_depth_map", False))
    return is_read(name) and not depth and feature["dtype"] not in TEXT


def _shape(feature: dict[str, Any]) -> tuple[int, ...]:
    """(height, width, channels), whichever order the feature is described in."""
    shape = [int(size) for size in feature["shape"]]
    names = [str(axis).rstrip("s") for axis in feature.get("names") or ()]
    wanted = ("height", "width", "channel")
    if set(names) == set(wanted):
        return tuple(shape[names.index(axis)] for axis in wanted)
    return (*shape[1:], shape[0]) if shape[0] in CHANNELS and shape[-1] not in CHANNELS else tuple(shape)


def _places_of_v2(path: Path, info: dict[str, Any], videos: list[str]) -> list[_Place]:
    """One file for each episode."""
    found, listed = [], path / "meta" / "episodes.jsonl"
    for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), start=1):
        with damage_named(f"'{listed}', line {number}", "a LeRobotDataset"):
            row = json.loads(line)
            index, length = int(row["episode_index"]), int(row["length"])
        at = {"episode_index": index, "episode_chunk": index // int(info["chunks_size"])}
        files = {name: (path / info["video_path"].format(video_key=name, **at), 0.0) for name in videos}
        found.append(_Place(index, length, path / info["data_path"].format(**at), files))
    return found


def _places_of_v3(path: Path, info: dict[str, Any], videos: list[str]) -> list[_Place]:
    """Many episodes in one file."""
    found = []
    for table in sorted((path / "meta" / "episodes").rglob("*.parquet")):
        opened = require_pyarrow().parquet.ParquetFile(table)
        starts = ("episode_index", "length", "data/", "videos/")  # there are also statistics of every feature
        kept = [name for name in opened.schema_arrow.names if name.startswith(starts)]
        for row in opened.read(columns=kept).to_pylist():
            files = {}
            for name in videos:
                at = {key: int(row[f"videos/{name}/{key}"]) for key in ("chunk_index", "file_index")}
                file = path / info["video_path"].format(video_key=name, **at)
                files[name] = file, float(row[f"videos/{name}/from_timestamp"])
            at = {key: int(row[f"data/{key}"]) for key in ("chunk_index", "file_index")}
            data = path / info["data_path"].format(**at)
            found.append(_Place(int(row["episode_index"]), int(row["length"]), data, files))
    return sorted(found, key=lambda place: place.index)


def _array(column: Any, name: str, where: str) -> npt.NDArray[Any]:
    """A column of numbers, or of lists of as many numbers each, as rows."""
    values, rows = column.combine_chunks(), len(column)

    def require(right: npt.NDArray[np.bool_]) -> None:
        if not right.all():
            step = np.flatnonzero(~right)[0] // (len(right) // rows)
            raise DatasetError(f"{where}, step {step}: {name} has no number, or not as many as at the first step")

    while hasattr(values.type, "value_type"):
        lengths = np.asarray(require_compute().list_value_length(values).fill_null(-1))
        require(lengths == max(int(lengths[0]), 1))
        values = values.flatten()
    require(~np.asarray(values.is_null(), np.bool_))
    array = np.asarray(values)
    return array if len(array) == rows else array.reshape(rows, -1)


@dataclass(frozen=True)
class _Encoded:
    """Images in a table, an encoded file each."""

    column: Any
    shape: tuple[int, ...]
    where: str

    def read(self) -> Pixels:
        """See `Frames.read`."""
        frames = []
        for step, row in enumerate(self.column.to_pylist()):
            encoded = row["bytes"] if isinstance(row, dict) else row
            if not isinstance(encoded, bytes):
                raise DatasetError(f"{self.where}, step {step}: there is no image")
            frames.append(decode(encoded, f"{self.where}, step {step}"))
        return stack(frames, self.where)


@dataclass(frozen=True)
class _Video:
    """One episode of a video."""

    file: Path
    start: float
    fps: float
    length: int
    shape: tuple[int, ...]
    where: str
    alone: bool
    """Whether the file has nothing else."""

    def read(self) -> Pixels:
        """See `Frames.read`."""
        half = 0.5 / self.fps  # between two frames, so that rounding cannot reach the one before
        seek = ["-ss", f"{self.start - half:.6f}"] if self.start > half else []
        passed = ["-fps_mode", "passthrough"]  # frames as they are, however their times lie
        try:
            with closing(
                require_ffmpeg().read_frames(str(self.file), input_params=seek, output_params=passed)
            ) as stream:
                about = next(stream)
                width, height = about["size"]
                if (height, width, 3) != self.shape:
                    raise DatasetError(f"{self.where}: '{self.file}' is {(height, width, 3)}, not {self.shape}")
                if abs(about.get("fps", self.fps) / self.fps - 1) > SAME_RATE:
                    raise DatasetError(f"{self.where}: '{self.file}' has {about['fps']:g} frames a second, not the "
                                       f"{self.fps:g} of {INFO}")  # fmt: skip
                frames = [np.frombuffer(f, np.uint8).reshape(self.shape) for f in islice(stream, self.length)]
                if self.alone and next(stream, None) is not None:
                    raise DatasetError(f"{self.where}: '{self.file}' goes on after the episode's {self.length} steps")
        except (OSError, RuntimeError, StopIteration) as error:
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise DatasetError(f"{self.where}: '{self.file}' cannot be decoded: {last}") from error
        if len(frames) != self.length:
            raise DatasetError(f"{self.where}: '{self.file}' ends at step {len(frames)} of {self.length}")
        return np.stack(frames)


def require_compute() -> Any:
    """Return pyarrow's compute module; what has read a table has it."""
    from pyarrow import compute

    return compute


def require_pyarrow() -> Any:
    """Return pyarrow with its parquet module, or raise MissingDependencyError."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "data", "reading a LeRobotDataset") from error
    return pyarrow


def require_ffmpeg() -> Any:
    """Return the imageio_ffmpeg module, or raise MissingDependencyError."""
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise MissingDependencyError("imageio-ffmpeg", "data", "reading a LeRobotDataset's videos") from error
    return imageio_ffmpeg
