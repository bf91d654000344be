"""Minari's data set format (its HDF5 layout), read and written with h5py alone.

    <folder>/data/main_data.hdf5    episode_<i>/ observations (T+1, D), actions (T, A), rewards, terminations,
                                    truncations (T,), infos/success (T+1,); attributes id, seed, total_steps, success
    <folder>/data/metadata.json     totals, the environment and its spaces

With cameras `observations` is a group of parts: ``observation.state`` (T+1, D) and ``observation.images.<camera>``.
Images of 32 pixels or more are stored as Minari stores them, one encoded file per frame, though as PNG, which loses
nothing, where Minari writes JPEG; both are read (with Pillow). Smaller ones are an array (T+1, height, width, channels)
with one chunk per frame. Whoever named the parts: images become cameras, all else is flattened to the state, both in
alphabetical order, which is Gymnasium's.

The `minari` package loads such a folder when it lies under its root.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dprl import checkpoint
from dprl.data.episodes import Episodes, Pixels
from dprl.errors import CheckpointError, DatasetError, MissingDependencyError, RunExistsError
from dprl.observations import IMAGES, STATE, camera_name
from dprl.spec import EnvSpec, FloatArray

DATA_FILE = Path("data") / "main_data.hdf5"
METADATA_FILE = Path("data") / "metadata.json"
IMAGE_CACHE = ".images"
ENV_ID_KEY = "dprl_env_id"
MINARI_IMAGE = 32  # pixels: Minari takes images of at least this height and width for encoded files
ENCODED_STARTS = (b"\x89PNG", b"\xff\xd8")
CHANNELS = (1, 3)

ByCamera = dict[str, Pixels]
Allocate = Callable[[str, tuple[int, ...]], Pixels]


def require_h5py() -> Any:
    """Return the h5py module, or raise MissingDependencyError."""
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError("h5py", "envs", "reading and writing data sets") from error
    return h5py


def save_dataset(data: Episodes, path: str | Path, spec: EnvSpec, *, description: str = "") -> None:
    """Write `data`, collected in `spec`, as a Minari data set in the new folder `path`.

    Raises:
        RunExistsError: `path` exists.
        DatasetError: the images are not those of the cameras of `spec`.
    """
    here, there = ({name: images.shape[1:] for name, images in data.images.items()},
                   {camera.name: camera.shape for camera in spec.cameras})  # fmt: skip
    if here != there:
        raise DatasetError(f"the images are of the cameras {here}, but {spec.id} has {there}")
    folder = Path(path)
    checkpoint.publish(folder, lambda temporary: _write(data, temporary, folder.name, spec, description))


def load_dataset(path: str | Path, *, memory_map: bool | None = None) -> Episodes:
    """Load and validate a data set folder.

    Args:
        path: the folder.
        memory_map: leave images on disk, as `numpy.memmap`: they need not fit in memory. They are decoded once, into
            ``<path>/.images/<SHA-256 of the HDF5 file>/``, as large as the images themselves. Another HDF5 file makes
            another cache; the old one may be deleted at any time. Default: where the images would fill more than a
            third of this machine's memory: splitting episodes off holds them twice for a moment.

    Raises:
        DatasetError: missing, damaged, empty, of wrong shapes, or with numbers that are not finite; the message names
            file, episode and step.
    """
    folder = Path(path)
    file = folder / DATA_FILE
    if not file.is_file():
        raise DatasetError(f"'{path}' holds no data set: '{file}' is missing")
    try:
        checkpoint.verify(folder)
    except CheckpointError as error:
        raise DatasetError(str(error)) from error
    try:
        return _read(file, _env_id(folder / METADATA_FILE), folder, memory_map)
    except (DatasetError, MissingDependencyError):
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise DatasetError(f"'{file}' is damaged or not a Minari data set: {error}") from error


def _read(file: Path, env_id: str | None, folder: Path, memory_map: bool | None) -> Episodes:
    with require_h5py().File(file, "r") as h5:
        names = sorted((n for n in h5 if n.startswith("episode_")), key=lambda n: int(n.removeprefix("episode_")))
        if not names:
            raise DatasetError(f"'{file}' has no episodes")
        episodes = [_read_episode(h5[name], f"'{file}', {name}") for name in names]
        sizes = {(e["observations"].shape[1], e["actions"].shape[1]) for e in episodes}
        if len(sizes) > 1:
            raise DatasetError(f"'{file}': episodes differ in observation and action size: {sorted(sizes)}")
        cameras = {tuple(e["images"]) for e in episodes}
        if len(cameras) > 1:
            raise DatasetError(f"'{file}': episodes differ in cameras: {sorted(cameras)}")
        lengths = [len(e["actions"]) for e in episodes]
        sources = [e["images"] for e in episodes]
        if memory_map is None:
            memory_map = _size(sources, lengths) > physical_memory() // 3
        images, final_images = (
            _cached(folder, sources, lengths) if memory_map else _decode(sources, lengths, _in_memory)
        )
    return Episodes(
        observations=np.concatenate([e["observations"][:-1] for e in episodes]),
        actions=np.concatenate([e["actions"] for e in episodes]),
        rewards=np.concatenate([e["rewards"] for e in episodes]),
        final_observations=np.stack([e["observations"][-1] for e in episodes]),
        ends=np.cumsum(lengths),
        terminated=np.array([bool(e["terminations"][-1]) for e in episodes]),
        success=np.array([e["success"] for e in episodes]),
        seeds=np.array([e["seed"] for e in episodes], np.int64),
        env_id=env_id,
        images=images,
        final_images=final_images,
    )


def _read_episode(group: Any, where: str) -> dict[str, Any]:
    if not hasattr(group, "keys"):
        raise DatasetError(f"{where}: is not a group of arrays")
    for name in ("observations", "actions", "rewards", "terminations", "truncations"):
        if name not in group:
            raise DatasetError(f"{where}: {name} is missing")
        if not hasattr(group[name], "shape") and name != "observations":
            raise DatasetError(f"{where}: {name} has named parts; only observations may")
    steps = len(group["actions"])
    if steps == 0:
        raise DatasetError(f"{where}: has no steps")
    state, images = _split_parts(group["observations"], steps, where)
    arrays = {
        name: _numbers(group[name], name, steps, steps, ndim, where)
        for name, ndim in (("actions", 2), ("rewards", 1), ("terminations", 1), ("truncations", 1))
    }
    infos = group.get("infos", {})
    success = np.asarray(infos["success"]).any() if "success" in infos else group.attrs.get("success", False)
    seed = int(group.attrs.get("seed", -1))
    return {**arrays, "observations": state, "images": images, "success": bool(success), "seed": seed}


def _split_parts(observations: Any, steps: int, where: str) -> tuple[FloatArray, dict[str, _Frames]]:
    """Return the state (steps + 1, D) and the frames by camera, which are not read yet."""
    parts = dict(_leaves(observations, "observations"))
    numbers, images = [np.zeros((steps + 1, 0), np.float32)], {}
    for name, dataset in parts.items():
        key = name.removeprefix("observations").strip("/")
        if _holds_images(dataset):
            images[camera_name(key)] = _Frames(dataset, steps + 1, f"{where}: {name}")
        elif key.startswith(IMAGES):
            raise DatasetError(
                f"{where}: {name} is {dataset.dtype} {dataset.shape}; "
                f"images are uint8 ({steps + 1}, height, width, 1 or 3), or encoded"
            )
        else:
            array = _numbers(dataset, name, steps + 1, steps, None if key else 2, where)
            numbers.append(array.reshape(steps + 1, -1).astype(np.float32, copy=False))
    if len(images) + len(numbers) - 1 < len(parts):
        raise DatasetError(f"{where}: different parts are the same camera: {', '.join(parts)}")
    return np.concatenate(numbers, axis=1), dict(sorted(images.items()))


def _leaves(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every array of a group, and of the groups in it, by its path."""
    if hasattr(node, "shape"):
        yield name, node
        return
    for key in node:
        yield from _leaves(node[key], f"{name}/{key}")


def _numbers(dataset: Any, name: str, length: int, steps: int, ndim: int | None, where: str) -> npt.NDArray[Any]:
    """Read an array of finite numbers, as float32 unless it is a flag; `ndim` None: any shape of `length` rows."""
    array = np.asarray(dataset)
    if array.ndim == 0 or len(array) != length or (ndim is not None and array.ndim != ndim):
        dimensions = "" if ndim is None else f" and {ndim} dimension{'s' if ndim > 1 else ''}"
        raise DatasetError(
            f"{where}: {name} has the shape {array.shape}; {steps} actions need {length} rows{dimensions}"
        )
    if array.dtype.kind not in "fiub":
        raise DatasetError(f"{where}: {name} has the type {array.dtype}; numbers are needed")
    if name not in ("terminations", "truncations"):
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    finite = np.isfinite(array.reshape(length, -1)).all(axis=1)
    if not finite.all():
        raise DatasetError(f"{where}, step {np.flatnonzero(~finite)[0]}: {name} is not finite")
    return array


def _holds_images(dataset: Any) -> bool:
    """Whether these are raw images (T+1, height, width, 1 or 3), or encoded ones: (T+1,) files, or (T+1, bytes)."""
    if require_h5py().check_vlen_dtype(dataset.dtype) == np.uint8:
        return True
    if dataset.dtype != np.uint8:
        return False
    if dataset.ndim == 2 and len(dataset):
        return bool(dataset[0, :4].tobytes().startswith(ENCODED_STARTS))
    return bool(dataset.ndim == 4 and dataset.shape[3] in CHANNELS)


@dataclass(frozen=True)
class _Frames:
    """One camera's images of one episode, in the file."""

    dataset: Any
    length: int
    where: str

    def read(self) -> Pixels:
        """Return (length, height, width, channels)."""
        if len(self.dataset) != self.length:
            raise DatasetError(
                f"{self.where} has {len(self.dataset)} images; {self.length - 1} actions need {self.length}"
            )
        if self.dataset.ndim == 4:
            return np.asarray(self.dataset)
        images = [self._decode(encoded, step) for step, encoded in enumerate(self.dataset[()])]
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise DatasetError(f"{self.where}: images differ in shape: {sorted(shapes)}")
        return np.stack(images)

    def _decode(self, encoded: Pixels, step: int) -> Pixels:
        try:
            image = np.asarray(require_pillow().open(io.BytesIO(encoded.tobytes())))
        except MissingDependencyError:
            raise
        except Exception as error:  # Pillow raises almost any kind
            raise DatasetError(f"{self.where}, step {step}: the image cannot be decoded: {error}") from error
        image = image[..., None] if image.ndim == 2 else image
        if image.dtype != np.uint8 or image.shape[2] not in CHANNELS:
            raise DatasetError(
                f"{self.where}, step {step}: the image is {image.dtype} {image.shape}; "
                "it must be uint8 with 1 or 3 channels"
            )
        return image


def require_pillow() -> Any:
    """Return Pillow's Image module, or raise MissingDependencyError."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("pillow", "plots", "reading and writing images") from error
    return Image


def _in_memory(_: str, shape: tuple[int, ...]) -> Pixels:
    return np.empty(shape, np.uint8)


def _size(sources: list[dict[str, _Frames]], lengths: list[int]) -> int:
    """Bytes of all images, once decoded."""
    return sum(lengths) * sum(int(np.prod(frames.read().shape[1:])) for frames in sources[0].values())


def physical_memory() -> int:
    """Bytes of memory in this machine; endless where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize


def _decode(sources: list[dict[str, _Frames]], lengths: list[int], allocate: Allocate) -> tuple[ByCamera, ByCamera]:
    """Return the images that the actions saw, and those that each episode ended in; one episode at a time."""
    images, final_images = {}, {}
    for camera in sources[0]:
        shape = sources[0][camera].read().shape[1:]
        images[camera] = allocate(camera, (sum(lengths), *shape))
        final_images[camera] = allocate(f"{camera}.final", (len(lengths), *shape))
        start = 0
        for i, (source, length) in enumerate(zip(sources, lengths, strict=True)):
            frames = source[camera].read()
            if frames.shape[1:] != shape:
                raise DatasetError(
                    f"{source[camera].where} has images of {frames.shape[1:]}; those of the first episode are {shape}"
                )
            images[camera][start : start + length], final_images[camera][i] = frames[:-1], frames[-1]
            start += length
    return images, final_images


def _cached(folder: Path, sources: list[dict[str, _Frames]], lengths: list[int]) -> tuple[ByCamera, ByCamera]:
    """Return the same as `_decode`, on disk. The cache is named after the digest of what it was decoded from."""
    if not sources[0]:
        return {}, {}
    cache = folder / IMAGE_CACHE / _digest(folder)

    def write(temporary: Path) -> None:
        open_memmap: Any = np.lib.format.open_memmap
        _decode(sources, lengths, lambda name, shape: open_memmap(temporary / f"{name}.npy", "w+", np.uint8, shape))

    try:
        with contextlib.suppress(RunExistsError):  # it is there, or another process was faster
            checkpoint.publish(cache, write)
    except PermissionError as error:
        raise DatasetError(
            f"the images cannot be decoded to '{cache}': {error}; copy the data set to a folder that can be written, "
            "or load it with memory_map=False"
        ) from error
    try:
        images, final_images = (
            {camera: np.load(cache / f"{camera}{ending}.npy", mmap_mode="r") for camera in sources[0]}
            for ending in ("", ".final")
        )
    except (OSError, ValueError) as error:
        raise DatasetError(f"'{cache}' is damaged: delete it, it is made again ({error})") from error
    return images, final_images


def _digest(folder: Path) -> str:
    """SHA-256 of the HDF5 file: the manifest's, which was verified, where there is one."""
    with contextlib.suppress(CheckpointError, KeyError):
        return str(checkpoint.read_json(folder / checkpoint.MANIFEST)["sha256"][DATA_FILE.as_posix()])
    with (folder / DATA_FILE).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _env_id(metadata: Path) -> str | None:
    """The environment's name, ours before Gymnasium's; None where the file does not say."""
    if not metadata.is_file():
        return None
    try:
        data = json.loads(metadata.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DatasetError(f"'{metadata}' is not valid JSON: {error}") from error
    try:
        if ENV_ID_KEY in data:
            return str(data[ENV_ID_KEY])
        env_spec = data.get("env_spec")
        return json.loads(env_spec).get("id") if isinstance(env_spec, str) else None
    except (AttributeError, json.JSONDecodeError) as error:
        raise DatasetError(f"'{metadata}' is not Minari's: {error}") from error


def _write(data: Episodes, folder: Path, name: str, spec: EnvSpec, description: str) -> None:
    (folder / "data").mkdir()
    with require_h5py().File(folder / DATA_FILE, "w") as h5:
        for i, (start, end) in enumerate(zip(data.starts, data.ends, strict=True)):
            group = h5.create_group(f"episode_{i}")
            last = np.arange(end - start) == end - start - 1
            success = np.append(False, last & data.success[i])
            state = np.concatenate([data.observations[start:end], data.final_observations[i : i + 1]])
            if data.images:
                _write_parts(group.create_group("observations"), state, data, i)
            else:
                group.create_dataset("observations", data=state)
            group.create_dataset("actions", data=data.actions[start:end])
            group.create_dataset("rewards", data=data.rewards[start:end].astype(np.float64))
            group.create_dataset("terminations", data=last & data.terminated[i])
            group.create_dataset("truncations", data=last & ~data.terminated[i])
            group.create_group("infos").create_dataset("success", data=success)
            group.attrs.update(
                {
                    "id": i,
                    "seed": int(data.seeds[i]),
                    "total_steps": int(end - start),
                    "success": bool(data.success[i]),
                }
            )
    (folder / METADATA_FILE).write_text(json.dumps(_metadata(data, name, spec, description), indent=2) + "\n")


def _write_parts(group: Any, state: FloatArray, data: Episodes, episode: int) -> None:
    if state.shape[1]:
        group.create_dataset(STATE, data=state)
    steps = slice(data.starts[episode], data.ends[episode])
    for camera, images in data.images.items():
        final = np.asarray(data.final_images[camera][episode : episode + 1])
        frames = np.concatenate([np.asarray(images[steps]), final])
        if min(frames.shape[1:3]) < MINARI_IMAGE:
            chunk = (1, *frames.shape[1:])
            group.create_dataset(IMAGES + camera, data=frames, chunks=chunk, compression="gzip", compression_opts=1)
            continue
        files = np.empty(len(frames), object)
        for step, frame in enumerate(frames):
            files[step] = np.frombuffer(_png(frame), np.uint8)
        group.create_dataset(IMAGES + camera, data=files, dtype=require_h5py().vlen_dtype(np.uint8))


def _png(frame: Pixels) -> bytes:
    stream = io.BytesIO()
    require_pillow().fromarray(frame[..., 0] if frame.shape[2] == 1 else frame).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _metadata(data: Episodes, name: str, spec: EnvSpec, description: str) -> dict[str, Any]:
    return {
        "total_episodes": data.n_episodes,
        "total_steps": int(data.ends[-1]),
        "data_format": "hdf5",
        "dataset_id": name,
        "description": description,
        ENV_ID_KEY: spec.id,
        "observation_space": json.dumps(_observation_space(spec)),
        "action_space": json.dumps(_box(list(spec.action_low), list(spec.action_high))),
        "minari_version": "0.5.3",
    }


def _observation_space(spec: EnvSpec) -> dict[str, Any]:
    state = _box([-np.inf] * spec.observation_size, [np.inf] * spec.observation_size)
    if not spec.cameras:
        return state
    subspaces = {STATE: state} if spec.observation_size else {}
    for camera in spec.cameras:
        low, high = np.zeros(camera.shape, np.uint8), np.full(camera.shape, 255, np.uint8)
        shape = list(camera.shape)
        box = {"type": "Box", "dtype": "uint8", "shape": shape, "low": low.tolist(), "high": high.tolist()}
        subspaces[camera.part] = box
    return {"type": "Dict", "subspaces": subspaces}


def _box(low: list[float], high: list[float]) -> dict[str, Any]:
    """A float32 Box as Minari writes it."""
    return {"type": "Box", "dtype": "float32", "shape": [len(low)], "low": low, "high": high}
