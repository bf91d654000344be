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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dprl.data.images import decode, stack
from dprl.data.source import DataOptions, Episode, Frames, Pixels, Source, numbers
from dprl.errors import DatasetError, MissingDependencyError
from dprl.observations import STATE, camera_name

INFO = Path("meta") / "info.json"
OBSERVATION = "observation."
VERSIONS = ("v2.0", "v2.1", "v3.0")
VISUAL = ("image", "video")


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

    def __init__(self, path: Path, options: DataOptions) -> None:
        super().__init__(path, options)
        with self._damage_is_named(path / INFO):
            info = json.loads((path / INFO).read_text(encoding="utf-8"))
            version, self._features = str(info["codebase_version"]), dict(info["features"])
            if version not in VERSIONS:
                raise DatasetError(f"'{path / INFO}': codebase_version is {version}; what is read is {VERSIONS}")
            self._fps = float(info["fps"])
            if "action" not in self._features:
                raise DatasetError(f"'{path / INFO}': there is no feature 'action'")
        self._parts = self._chosen()
        with self._damage_is_named(path / "meta"):
            self._places = (_places_of_v3 if version == "v3.0" else _places_of_v2)(path, info, self._videos())
        if not self._places:
            raise DatasetError(f"'{path}' has no episodes")
        self.lengths = [place.length for place in self._places]
        self._read: tuple[Path, Any] | None = None  # the latest table, which the next episode may share

    @staticmethod
    def detects(path: Path) -> bool:
        """See `Source.detects`."""
        return (path / INFO).is_file()

    def read(self, index: int) -> Episode:
        """See `Source.read`."""
        place = self._places[index]
        where, steps = f"'{place.table}', episode {place.index}", place.length
        with self._damage_is_named(place.table):
            columns = self._rows(place)

            def part(name: str, ndim: int | None = None) -> npt.NDArray[Any]:
                return numbers(_array(columns[name]), name, steps, ndim, where).reshape(steps, -1)

            state = [part(name) for name in self._parts if self._features[name]["dtype"] not in VISUAL]
            observations = np.concatenate([np.zeros((steps, 0), np.float32), *state], axis=1)
            actions = part("action")
            rewards = part("next.reward")[:, 0] if "next.reward" in columns else None
            success = bool(part("next.success").any()) if "next.success" in columns else None
            done = bool(part("next.done")[-1]) if "next.done" in columns else False
        images: dict[str, Frames] = {}
        for name in self._videos():
            file, start = place.videos[name]
            images[camera_name(name)] = _Video(file, start, self._fps, steps, self._shape(name), f"{where}: {name}")
        for name in self._parts:
            if self._features[name]["dtype"] == "image":
                images[camera_name(name)] = _Encoded(columns[name], self._shape(name), f"{where}: {name}")
        terminated = done if success is None else success
        return Episode(where, observations, actions, rewards, terminated, success, images=images)

    def close(self) -> None:
        """See `Source.close`."""
        self._read = None

    def _chosen(self) -> list[str]:
        """Parts of the observation, by name: numbers first, the state before others."""
        seen = [name for name in self._features if name.startswith(OBSERVATION)]
        if self.options.keys is not None:
            missing = [name for name in self.options.keys if name not in self._features]
            if missing:
                raise DatasetError(
                    f"'{self.path / INFO}': there is no feature '{missing[0]}': {', '.join(self._features)}"
                )
            return list(self.options.keys)
        numeric = [name for name in seen if self._features[name]["dtype"] not in VISUAL]
        visual = [name for name in seen if self._features[name]["dtype"] in VISUAL]
        return sorted(numeric, key=lambda name: (name != STATE, name)) + sorted(visual)

    def _videos(self) -> list[str]:
        return [name for name in self._parts if self._features[name]["dtype"] == "video"]

    def _shape(self, name: str) -> tuple[int, ...]:
        """(height, width, channels), whichever order the feature is described in."""
        shape: list[int] = list(self._features[name]["shape"])
        names = [str(axis).rstrip("s") for axis in self._features[name].get("names") or ()]
        wanted = ("height", "width", "channel")
        return tuple(shape[names.index(axis)] for axis in wanted) if set(names) == set(wanted) else tuple(shape)

    def _rows(self, place: _Place) -> dict[str, Any]:
        """Columns of one episode's rows."""
        if self._read is None or self._read[0] != place.table:
            self._read = place.table, require_parquet().read_table(place.table)
        table = self._read[1]
        rows = np.flatnonzero(np.asarray(table["episode_index"]) == place.index)
        if len(rows) != place.length or (np.diff(rows) != 1).any():
            raise DatasetError(
                f"'{place.table}': episode {place.index} has {len(rows)} rows, but {place.length} in meta"
            )
        part = table.slice(int(rows[0]), len(rows))
        return {name: part[name] for name in part.column_names}

    @contextmanager
    def _damage_is_named(self, file: Path) -> Iterator[None]:
        try:
            yield
        except (DatasetError, MissingDependencyError):
            raise
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:  # pyarrow's are ValueErrors
            raise DatasetError(f"'{file}' is damaged or not of {self.format}: {error!r}") from error


def _places_of_v2(path: Path, info: dict[str, Any], videos: list[str]) -> list[_Place]:
    """One file for each episode."""
    found = []
    for line in (path / "meta" / "episodes.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        index = int(row["episode_index"])
        at = {"episode_index": index, "episode_chunk": index // int(info["chunks_size"])}
        files = {name: (path / info["video_path"].format(video_key=name, **at), 0.0) for name in videos}
        found.append(_Place(index, int(row["length"]), path / info["data_path"].format(**at), files))
    return found


def _places_of_v3(path: Path, info: dict[str, Any], videos: list[str]) -> list[_Place]:
    """Many episodes in one file."""
    found = []
    for table in sorted((path / "meta" / "episodes").rglob("*.parquet")):
        for row in require_parquet().read_table(table).to_pylist():
            files = {}
            for name in videos:
                at = {key: int(row[f"videos/{name}/{key}"]) for key in ("chunk_index", "file_index")}
                file = path / info["video_path"].format(video_key=name, **at)
                files[name] = file, float(row[f"videos/{name}/from_timestamp"])
            at = {key: int(row[f"data/{key}"]) for key in ("chunk_index", "file_index")}
            data = path / info["data_path"].format(**at)
            found.append(_Place(int(row["episode_index"]), int(row["length"]), data, files))
    return sorted(found, key=lambda place: place.index)


def _array(column: Any) -> npt.NDArray[Any]:
    """A column of numbers, or of lists of as many numbers each, as rows."""
    values, rows = column.combine_chunks(), len(column)
    while hasattr(values.type, "value_type"):
        values = values.flatten()
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
        frames = [decode(row["bytes"], f"{self.where}, step {i}") for i, row in enumerate(self.column.to_pylist())]
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

    def read(self) -> Pixels:
        """See `Frames.read`."""
        half = 0.5 / self.fps  # between two frames, so that rounding cannot reach the one before
        seek = ["-ss", f"{self.start - half:.6f}"] if self.start > half else []
        try:
            stream = require_ffmpeg().read_frames(str(self.file), input_params=seek)
            width, height = next(stream)["size"]
            if (height, width, 3) != self.shape:
                raise DatasetError(f"{self.where}: '{self.file}' has images of {(height, width, 3)}, not {self.shape}")
            frames = [np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in islice(stream, self.length)]
            stream.close()
        except (OSError, RuntimeError, StopIteration) as error:
            raise DatasetError(f"{self.where}: '{self.file}' cannot be decoded: {str(error)[-300:]}") from error
        if len(frames) != self.length:
            raise DatasetError(f"{self.where}: '{self.file}' ends at step {len(frames)} of {self.length}")
        return np.stack(frames)


def require_parquet() -> Any:
    """Return pyarrow's parquet module, or raise MissingDependencyError."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "data", "reading a LeRobotDataset") from error
    return parquet


def require_ffmpeg() -> Any:
    """Return the imageio_ffmpeg module, or raise MissingDependencyError."""
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise MissingDependencyError("imageio-ffmpeg", "data", "reading a LeRobotDataset's videos") from error
    return imageio_ffmpeg
