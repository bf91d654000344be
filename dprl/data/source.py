"""What every format is read as: a source of episodes, one after the other.

Shapes: T steps of one episode, D observation size, A action size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt

from dprl.errors import DatasetError, MissingDependencyError
from dprl.spec import BoolArray, FloatArray, RewardKind

Pixels = npt.NDArray[np.uint8]
CHANNELS = (1, 3)
"""Of an image."""


class Frames(Protocol):
    """One camera's images of one episode, which are read when they are asked for."""

    @property
    def where(self) -> str:
        """File, episode and part, for messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, channels)."""

    def read(self) -> Pixels:
        """Return (T+1, height, width, channels), or T of them where the last action's outcome was not kept."""


@dataclass(frozen=True)
class Episode:
    """One episode as a file holds it."""

    where: str
    """File and episode, for messages."""
    observations: FloatArray
    """(T+1, D), or (T, D) where the format does not keep what the last action led to."""
    actions: FloatArray
    """(T, A)."""
    rewards: FloatArray | None
    """(T,); None where the format has none."""
    terminated: bool
    """Whether it terminated; else it was truncated, or nobody knows."""
    success: bool | None
    """None where the format does not say."""
    seed: int = -1
    images: Mapping[str, Frames] = field(default_factory=dict)
    """Camera -> its images."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """What the numbers of an observation are, in their order: name -> how many. Empty where they have no names."""

    @property
    def final_known(self) -> bool:
        """Whether the format keeps what the last action led to."""
        return len(self.observations) > len(self.actions)

    def __len__(self) -> int:
        return len(self.actions)

    def read_images(self, camera: str) -> Pixels:
        """Read a camera's images: (T+1, height, width, channels), or T of them, see `Frames.read`.

        Raises:
            DatasetError: they cannot be read, or are not as many or as large as they must be.
        """
        frames, steps = self.images[camera], len(self)
        try:
            images = frames.read()
        except (DatasetError, MissingDependencyError):
            raise
        except Exception as error:  # h5py's filters, zarr's codecs and others raise almost any kind
            raise DatasetError(f"{frames.where} cannot be read: {error}") from error
        counts = (steps + 1,) if self.final_known else (steps, steps + 1)
        if images.dtype != np.uint8 or images.shape[1:] != tuple(frames.shape) or len(images) not in counts:
            raise DatasetError(f"{frames.where} is {images.dtype} {images.shape}; {steps} actions need uint8 "
                               f"({counts[0]}, {', '.join(map(str, frames.shape))})")  # fmt: skip
        return images


@dataclass(frozen=True)
class DataOptions:
    """What of a file is read."""

    filter_key: str | None = None
    """Of robomimic's files: only the episodes of this mask."""
    keys: tuple[str, ...] | None = None
    """Parts of the observation that make up the state, in this order, and cameras. Default: the format's own."""


class Source(ABC):
    """A data set on disk. A context manager; `dprl.data.open_dataset` opens it."""

    format: ClassVar[str]
    """In words."""
    takes: ClassVar[tuple[str, ...]] = ()
    """Which of the options it has."""

    path: Path
    env_id: str | None = None
    """The environment, if known."""
    reward_kind: RewardKind | None = None
    """Of its rewards, if known."""
    lengths: Sequence[int]
    """Steps of every episode."""

    def __init__(self, path: Path, options: DataOptions) -> None:
        """Take where it is; nothing is read."""
        self.path = path
        self.options = options
        self._closing = ExitStack()

    @staticmethod
    @abstractmethod
    def detects(path: Path) -> bool:
        """Whether a path holds this format, judged by what is in it."""

    @abstractmethod
    def open(self) -> None:
        """Open it and read what there is, but no episodes yet; what must be closed goes to `self._closing`.

        Raises:
            DatasetError: empty, or without what is asked for. Any other exception counts as damage.
        """

    @abstractmethod
    def _read(self, index: int) -> Episode:
        """Read one episode; an exception that is no DatasetError counts as damage."""

    @property
    def files(self) -> list[Path]:
        """Every file that is read."""
        return [self.path]

    def read(self, index: int) -> Episode:
        """Read one episode.

        Raises:
            DatasetError: it is damaged; the message names file, episode and step.
        """
        with damage_named(f"'{self.path}', episode {index}", self.format):
            return self._read(index)

    def __iter__(self) -> Iterator[Episode]:
        """Read all episodes.

        Raises:
            DatasetError: one is damaged, or of another shape than the first.
        """
        first: _Shape | None = None
        for index in range(len(self.lengths)):
            episode = self.read(index)
            first = first or _Shape.of(episode)
            first.require(episode)
            yield episode

    def close(self) -> None:
        """Let go of the file."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Shape:
    """What all episodes of a data set have in common."""

    sizes: tuple[int, int]
    parts: list[tuple[str, int]]
    cameras: dict[str, tuple[int, ...]]
    has_rewards: bool
    tells_success: bool

    @staticmethod
    def of(episode: Episode) -> _Shape:
        cameras = {camera: frames.shape for camera, frames in episode.images.items()}
        sizes = episode.observations.shape[1], episode.actions.shape[1]
        return _Shape(
            sizes, list(episode.parts.items()), cameras, episode.rewards is not None, episode.success is not None
        )

    def require(self, episode: Episode) -> None:
        """Raise DatasetError unless `episode` has the same."""
        own = _Shape.of(episode)
        if own.sizes[0] == 0 and not own.cameras:
            raise DatasetError(f"{episode.where}: there is nothing to observe")
        if own.sizes[1] == 0:
            raise DatasetError(f"{episode.where}: actions have no numbers")
        here, first = (", ".join(f"{name} {size}" for name, size in parts) for parts in (own.parts, self.parts))
        if own.sizes != self.sizes:
            kind = "episodes differ in observation and action size"
            named = f" ({here}; the first {first})" if here != first else ""
            raise DatasetError(f"{episode.where}: {kind}: {own.sizes}, the first has {self.sizes}{named}")
        if own.parts != self.parts:
            raise DatasetError(f"{episode.where}: episodes differ in what is observed: {here}; the first has {first}")
        if set(own.cameras) != set(self.cameras):
            kind = "episodes differ in cameras"
            raise DatasetError(f"{episode.where}: {kind}: {sorted(own.cameras)}, the first has {sorted(self.cameras)}")
        for camera, shape in self.cameras.items():
            if own.cameras[camera] != shape:
                where = episode.images[camera].where
                raise DatasetError(
                    f"{where} has images of {own.cameras[camera]}; those of the first episode are {shape}"
                )
        for what, ours, firsts in (
            ("rewards", own.has_rewards, self.has_rewards),
            ("word of success", own.tells_success, self.tells_success),
        ):
            if ours != firsts:
                raise DatasetError(f"{episode.where}: has {what if ours else f'no {what}'}, unlike the first")


def numbers(
    dataset: Any,
    name: str,
    length: int,
    ndim: int | None,
    where: str,
    *,
    steps: int | None = None,
    unit: str = "step",
) -> npt.NDArray[Any]:
    """Read an array of finite numbers, as float32.

    Args:
        dataset: an array, or what becomes one.
        name: of it, for messages.
        length: how many rows it must have.
        ndim: how many dimensions; None: any.
        where: file and episode, for messages.
        steps: of the episode. Default: `length`.
        unit: what a row is, for messages.

    Raises:
        DatasetError: it is none.
    """
    array = np.asarray(dataset)
    if array.ndim == 0 or len(array) != length or (ndim is not None and array.ndim != ndim):
        dimensions = "" if ndim is None else f" and {ndim} dimension{'s' if ndim > 1 else ''}"
        raise DatasetError(f"{where}: {name} has the shape {array.shape}; {length if steps is None else steps} actions "
                           f"need {length} rows{dimensions}")  # fmt: skip
    if array.dtype.kind not in "fiub":
        raise DatasetError(f"{where}: {name} has the type {array.dtype}; numbers are needed")
    with np.errstate(over="ignore"):
        read = array.astype(np.float32, copy=False)
    finite = np.isfinite(read.reshape(length, -1)).all(axis=1)
    if not finite.all():
        row = np.flatnonzero(~finite)[0]
        kept = bool(np.isfinite(array[row]).all())
        raise DatasetError(f"{where}, {unit} {row}: {name} is {'too large for float32' if kept else 'not finite'}")
    return read


def one_each(dataset: Any, name: str, length: int, where: str, *, unit: str = "step") -> FloatArray:
    """Read a number for each of an episode's steps, (length,) or (length, 1): (length,) float32.

    Raises:
        DatasetError: it is none, or not one each.
    """
    array = numbers(dataset, name, length, None, where, unit=unit)
    if array.size != length:
        raise DatasetError(f"{where}: {name} has the shape {array.shape}; {length} actions need one each")
    return array.reshape(-1)


def flags(dataset: Any, name: str, length: int, where: str, *, unit: str = "step") -> BoolArray:
    """Read flags of an episode's steps, (length,) or (length, 1).

    Raises:
        DatasetError: they are not 0 and 1.
    """
    array = one_each(dataset, name, length, where, unit=unit)
    odd = np.flatnonzero((array != 0) & (array != 1))
    if len(odd):
        raise DatasetError(f"{where}, {unit} {odd[0]}: {name} is {array[odd[0]]}; it must be 0 or 1")
    return array.astype(np.bool_)


def joined(parts: Mapping[str, FloatArray], rows: int) -> tuple[FloatArray, dict[str, int]]:
    """Return the parts (rows, ...) of a state side by side, (rows, D), and the sizes of those that have a name."""
    flat = {name: part.reshape(rows, -1) for name, part in parts.items()}
    columns = [np.zeros((rows, 0), np.float32), *flat.values()]
    return np.concatenate(columns, axis=1), {name: part.shape[1] for name, part in flat.items() if name}


NO_PICTURES = ("depth", "segmentation", "pointcloud", "point_cloud")
"""In the names of parts that are neither read as images nor as numbers, unless they are asked for."""


def is_read(name: str, dtype: np.dtype[Any] | None = None) -> bool:
    """Whether a part of this name, and of this type, is read where nothing is asked for: text is not."""
    return not any(word in name.lower() for word in NO_PICTURES) and (dtype is None or dtype.kind in "fiub")


def ends_at_the_end(flag: BoolArray, name: str, where: str) -> bool:
    """Return whether the last step's flag says that the episode ended.

    Raises:
        DatasetError: an earlier one says so.
    """
    early = np.flatnonzero(flag[:-1])
    if len(early):
        raise DatasetError(f"{where}, step {early[0]}: {name} says that the episode ended, but "
                           f"{len(flag) - early[0] - 1} more steps follow")  # fmt: skip
    return bool(flag[-1])


def seed_of(value: Any) -> int:
    """Return a seed as files hold it; -1 for what is none, such as Minari's word None, or a number of other sizes."""
    try:
        seed = int(value)
    except (TypeError, ValueError, OverflowError):
        return -1
    return seed if 0 <= seed < 2**63 else -1


@contextmanager
def damage_named(where: str, format_: str) -> Iterator[None]:
    """Turn whatever is raised into a DatasetError that says where."""
    try:
        yield
    except (DatasetError, MissingDependencyError):
        raise
    except PermissionError as error:
        raise DatasetError(f"{where} may not be read: {error}") from error
    except Exception as error:  # a damaged file makes its readers raise almost any kind
        raise DatasetError(f"{where} is damaged or not of {format_}: {error!r}") from error


def leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every array of an HDF5 or zarr group, and of the groups in it, by its path."""
    if hasattr(node, "shape"):
        yield name, node
        return
    for key in sorted(node):
        yield from leaves(node[key], f"{name}/{key}" if name else key)


def require_h5py() -> Any:
    """Return the h5py module, or raise MissingDependencyError."""
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError("h5py", "data", "reading and writing data sets") from error
    return h5py
