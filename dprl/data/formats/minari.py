"""Minari's data set format (its HDF5 layout), read and written with h5py alone.

    <folder>/data/main_data.hdf5    episode_<i>/ observations (T+1, D), actions (T, A), rewards, terminations,
                                    truncations (T,), infos/success (T+1,); attributes id, seed, total_steps, success
    <folder>/data/metadata.json     totals, the environment and its spaces

With cameras `observations` is a group of parts: ``observation.state`` (T+1, D) and ``observation.images.<camera>``.
Images of 32 pixels or more are stored as Minari stores them, one encoded file per frame, though as PNG, which loses
nothing, where Minari writes JPEG; both are read (with Pillow). Smaller ones are an array (T+1, height, width, channels)
with one chunk per frame. Whoever named the parts: images become cameras, all else is flattened to the state, both in
alphabetical order, which is Gymnasium's.

Where the data's own format did not keep what an episode's last action led to, the last observation is repeated and the
episode has the attribute `final_known` = False.

The `minari` package loads such a folder when it lies under its root.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np

from dprl import checkpoint
from dprl.data.episodes import Episodes, RewardsFrom
from dprl.data.formats.hdf5 import HDF5Source, RawFrames, is_image, numbered, require_numbers
from dprl.data.images import decode, png, stack
from dprl.data.source import (
    Episode,
    Frames,
    Pixels,
    damage_named,
    ends_at_the_end,
    flags,
    is_read,
    joined,
    leaves,
    numbers,
    one_each,
    require_h5py,
    seed_of,
)
from dprl.errors import CheckpointError, DatasetError
from dprl.observations import IMAGES, STATE, camera_name
from dprl.spec import EnvSpec, FloatArray, RewardKind

DATA_FILE = Path("data") / "main_data.hdf5"
METADATA_FILE = Path("data") / "metadata.json"
ENV_ID_KEY, REWARDS_KEY, KIND_KEY = "dprl_env_id", "dprl_rewards_from", "dprl_reward_kind"
MINARI_IMAGE = 32  # pixels: Minari takes images of at least this height and width for encoded files
ENCODED_STARTS = (b"\x89PNG", b"\xff\xd8")
PARTS = ("observations", "actions", "rewards", "terminations", "truncations")


class Minari(HDF5Source):
    """A data set's folder."""

    format: ClassVar[str] = "a Minari data set"
    takes: ClassVar[tuple[str, ...]] = ("keys",)

    @property
    def file(self) -> Path:
        """See `HDF5Source.file`."""
        return self.path / DATA_FILE

    @property
    def files(self) -> list[Path]:
        """See `Source.files`."""
        return [file for file in (self.file, self.path / METADATA_FILE) if file.is_file()]

    def open(self) -> None:
        """See `Source.open`."""
        try:
            checkpoint.verify(self.path)
        except CheckpointError as error:
            raise DatasetError(str(error)) from error
        with damage_named(f"'{self.file}'", self.format):
            super().open()
            self._names = numbered(self.h5, "episode_", self.file)
            self.lengths = [self._length(name) for name in self._names]
        metadata = read_metadata(self.path / METADATA_FILE)
        self.env_id = env_id_of(metadata, self.path / METADATA_FILE)
        for key, found in (("total_episodes", len(self.lengths)), ("total_steps", sum(self.lengths))):
            if metadata.get(key, found) != found:
                raise DatasetError(f"'{self.file}': {key} is {metadata[key]} in {METADATA_FILE.name}, here are {found}")
        self.rewards_from: RewardsFrom = metadata.get(REWARDS_KEY, "data")
        if self.rewards_from not in get_args(RewardsFrom):
            raise DatasetError(f"'{self.path / METADATA_FILE}': {REWARDS_KEY} is {self.rewards_from!r}")
        self.reward_kind = metadata.get(KIND_KEY)
        if self.reward_kind not in (None, *get_args(RewardKind)):
            raise DatasetError(f"'{self.path / METADATA_FILE}': {KIND_KEY} is {self.reward_kind!r}")

    @staticmethod
    def detects(path: Path) -> bool:
        """See `Source.detects`."""
        return (path / DATA_FILE).exists()

    def _read(self, index: int) -> Episode:
        where = self._where(self._names[index])
        with damage_named(where, self.format):
            group = self.h5[self._names[index]]
            return episode_of(group, group.attrs, self.lengths[index], where, self.rewards_from, self.options.keys)

    def _where(self, name: str) -> str:
        return f"'{self.file}', {name}"

    def _length(self, name: str) -> int:
        """Steps of an episode that has all its parts."""
        group, where = self.h5[name], self._where(name)
        if not hasattr(group, "keys"):
            raise DatasetError(f"{where}: is not a group of arrays")
        for part in PARTS:
            if part not in group:
                raise DatasetError(f"{where}: {part} is missing")
            if not hasattr(group[part], "shape") and part != "observations":
                raise DatasetError(f"{where}: {part} has named parts; only observations may")
        if len(group["actions"]) == 0:
            raise DatasetError(f"{where}: has no steps")
        return len(group["actions"])


def episode_of(
    parts: Mapping[str, Any],
    attributes: Mapping[str, Any],
    steps: int,
    where: str,
    rewards_from: RewardsFrom,
    keys: tuple[str, ...] | None = None,
) -> Episode:
    """Return an episode of its arrays (or HDF5 data sets), and of what is noted beside them."""
    state, sizes, images = _split_parts(parts["observations"], steps, where, keys)
    actions, rewards = numbers(parts["actions"], "actions", steps, 2, where), parts["rewards"]
    terminated, _ = (
        ends_at_the_end(flags(parts[name], name, steps, where), name, where) for name in ("terminations", "truncations")
    )
    said = attributes.get("total_steps", steps)
    if said != steps:
        raise DatasetError(f"{where}: there are {steps} actions, but total_steps is {said}")
    success = attributes.get("success")
    if "success" in parts.get("infos", {}):
        infos = np.asarray(parts["infos"]["success"])
        rows = steps + 1 if len(infos) == steps + 1 else steps  # with that of the reset, or without
        success = flags(infos, "infos/success", rows, where).any()
    return Episode(
        where,
        state if attributes.get("final_known", True) else state[:-1],
        actions,
        one_each(rewards, "rewards", steps, where) if rewards_from == "data" else None,
        terminated=terminated,
        success=None if success is None else bool(success),
        seed=seed_of(attributes.get("seed", -1)),
        images=images,
        parts=sizes,
    )


def _split_parts(
    observations: Any, steps: int, where: str, keys: tuple[str, ...] | None
) -> tuple[FloatArray, dict[str, int], dict[str, Frames]]:
    """Return the state (steps + 1, D), the sizes of its parts, and the frames by camera, which are not read yet."""
    parts = _chosen(dict(leaves(observations, "observations")), keys, where)
    rows, images = dict[str, FloatArray](), dict[str, Frames]()
    for name, dataset in parts.items():
        key = name.removeprefix("observations").strip("/")
        if _holds_images(dataset):
            if len(dataset) != steps + 1:
                raise DatasetError(f"{where}: {name} has {len(dataset)} images; {steps} actions need {steps + 1}")
            kind = RawFrames if dataset.ndim == 4 else _EncodedFrames
            images[camera_name(key)] = kind(dataset, f"{where}: {name}")
        elif key.startswith(IMAGES):
            raise DatasetError(
                f"{where}: {name} is {dataset.dtype} {dataset.shape}; "
                f"images are uint8 ({steps + 1}, height, width, 1 or 3), or encoded"
            )
        else:
            require_numbers(dataset, key or name, where)
            array = numbers(dataset, name, steps + 1, None if key else 2, where, steps=steps)
            rows[key] = array
    if len(images) + len(rows) < len(parts):
        raise DatasetError(f"{where}: different parts are the same camera: {', '.join(parts)}")
    return *joined(rows, steps + 1), dict(sorted(images.items()))


def _chosen(parts: dict[str, Any], keys: tuple[str, ...] | None, where: str) -> dict[str, Any]:
    """The parts that are asked for, in that order; without a choice all numbers and pictures."""
    if keys is None:
        return {n: p for n, p in parts.items() if n == "observations" or _holds_images(p) or is_read(n, p.dtype)}
    by_key = {name.removeprefix("observations").strip("/"): name for name in parts}
    missing = [key for key in keys if not key or key not in by_key]
    if missing:
        known = ", ".join(filter(None, by_key)) or "no named parts"
        raise DatasetError(f"{where}: there is no '{missing[0]}' among the observations: {known}")
    return {by_key[key]: parts[by_key[key]] for key in keys}


def _holds_images(dataset: Any) -> bool:
    """Whether these are raw images (T+1, height, width, 1 or 3), or encoded ones: (T+1,) files, or (T+1, bytes)."""
    if require_h5py().check_vlen_dtype(dataset.dtype) == np.uint8:
        return True
    if dataset.dtype == np.uint8 and dataset.ndim == 2 and len(dataset):
        return bool(dataset[0, :4].tobytes().startswith(ENCODED_STARTS))
    return is_image(dataset)


@dataclass(frozen=True)
class _EncodedFrames:
    """One camera's images of one episode, a file each."""

    dataset: Any
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, channels)."""
        return self._decode(self.dataset[0], 0).shape

    def read(self) -> Pixels:
        """See `Frames.read`."""
        return stack([self._decode(encoded, step) for step, encoded in enumerate(self.dataset[()])], self.where)

    def _decode(self, encoded: Pixels, step: int) -> Pixels:
        return decode(encoded.tobytes(), f"{self.where}, step {step}")


def read_metadata(file: Path) -> dict[str, Any]:
    """Return what metadata.json says; nothing, where there is none."""
    if not file.is_file():
        return {}
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DatasetError(f"'{file}' is not valid JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise DatasetError(f"'{file}' is not Minari's: it is no object")
    return metadata


def env_id_of(metadata: dict[str, Any], file: Path) -> str | None:
    """The environment's name, ours before Gymnasium's; None where the file does not say."""
    if ENV_ID_KEY in metadata:
        return None if metadata[ENV_ID_KEY] is None else str(metadata[ENV_ID_KEY])
    env_spec = metadata.get("env_spec")
    try:
        return json.loads(env_spec).get("id") if isinstance(env_spec, str) else None
    except (AttributeError, json.JSONDecodeError) as error:
        raise DatasetError(f"'{file}' is not Minari's: {error}") from error


# ------------------------------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class Described:
    """What the metadata say of a data set."""

    env_id: str | None
    observation_size: int
    cameras: dict[str, tuple[int, ...]]
    """Name -> (height, width, channels)."""
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    description: str
    rewards_from: RewardsFrom
    reward_kind: RewardKind | None = None


def save_dataset(data: Episodes, path: str | Path, spec: EnvSpec, *, description: str = "") -> None:
    """Write `data`, collected in `spec`, as a Minari data set in the new folder `path`.

    Raises:
        RunExistsError: `path` exists.
        DatasetError: the images are not those of the cameras of `spec`.
    """
    here, there = ({name: tuple(images.shape[1:]) for name, images in data.images.items()},
                   {camera.name: camera.shape for camera in spec.cameras})  # fmt: skip
    if here != there:
        raise DatasetError(f"the images are of the cameras {here}, but {spec.id} has {there}")
    described = Described(
        spec.id,
        spec.observation_size,
        dict(there),
        spec.action_low,
        spec.action_high,
        description,
        data.rewards_from,
        data.reward_kind,
    )
    folder = Path(path)
    checkpoint.publish(folder, lambda temporary: write(temporary, folder.name, data.episodes(), described))


def write(folder: Path, name: str, episodes: Iterable[Episode], described: Described) -> None:
    """Write a data set `name` into an empty folder, one episode at a time."""
    (folder / "data").mkdir()
    count = steps = 0
    with require_h5py().File(folder / DATA_FILE, "w") as h5:
        for episode in episodes:
            group = h5.create_group(f"episode_{count}")
            group.attrs["id"] = count
            _write_episode(group, episode)
            count, steps = count + 1, steps + len(episode)
    metadata = {
        "total_episodes": count,
        "total_steps": steps,
        "data_format": "hdf5",
        "dataset_id": name,
        "description": described.description,
        ENV_ID_KEY: described.env_id,
        REWARDS_KEY: described.rewards_from,
        KIND_KEY: described.reward_kind,
        "observation_space": json.dumps(_observation_space(described)),
        "action_space": json.dumps(_box(list(described.action_low), list(described.action_high))),
        "minari_version": "0.5.3",
    }
    (folder / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")


def _write_episode(group: Any, episode: Episode) -> None:
    steps = len(episode)
    last = np.arange(steps) == steps - 1
    success = last & bool(episode.success)
    rewards = success if episode.rewards is None else episode.rewards
    state = _to_the_end(episode.observations, steps)
    if episode.images:
        _write_parts(group.create_group("observations"), state, episode)
    else:
        group.create_dataset("observations", data=state)
    group.create_dataset("actions", data=episode.actions)
    group.create_dataset("rewards", data=rewards.astype(np.float64))
    group.create_dataset("terminations", data=last & episode.terminated)
    group.create_dataset("truncations", data=last & (not episode.terminated))
    group.attrs.update({"seed": episode.seed, "total_steps": steps})
    if episode.success is not None:
        group.create_group("infos").create_dataset("success", data=np.append(False, success))
        group.attrs["success"] = episode.success
    if not episode.final_known:
        group.attrs["final_known"] = False


def _to_the_end(rows: Any, steps: int) -> Any:
    """Return steps + 1 rows: the last is repeated where what the last action led to is not known."""
    return rows if len(rows) == steps + 1 else np.concatenate([rows, rows[-1:]])


def _write_parts(group: Any, state: FloatArray, episode: Episode) -> None:
    if state.shape[1]:
        group.create_dataset(STATE, data=state)
    for camera in episode.images:
        frames = _to_the_end(episode.read_images(camera), len(episode))
        if min(frames.shape[1:3]) < MINARI_IMAGE:
            chunk = (1, *frames.shape[1:])
            group.create_dataset(IMAGES + camera, data=frames, chunks=chunk, compression="gzip", compression_opts=1)
            continue
        files = np.empty(len(frames), object)
        for step, frame in enumerate(frames):
            files[step] = np.frombuffer(png(frame), np.uint8)
        group.create_dataset(IMAGES + camera, data=files, dtype=require_h5py().vlen_dtype(np.uint8))


def _observation_space(described: Described) -> dict[str, Any]:
    size = described.observation_size
    state = _box([-np.inf] * size, [np.inf] * size)
    if not described.cameras:
        return state
    subspaces = {STATE: state} if size else {}
    for name, shape in described.cameras.items():
        low, high = np.zeros(shape, np.uint8).tolist(), np.full(shape, 255, np.uint8).tolist()
        subspaces[IMAGES + name] = {"type": "Box", "dtype": "uint8", "shape": list(shape), "low": low, "high": high}
    return {"type": "Dict", "subspaces": subspaces}


def _box(low: list[float], high: list[float]) -> dict[str, Any]:
    """A float32 Box as Minari writes it."""
    return {"type": "Box", "dtype": "float32", "shape": [len(low)], "low": low, "high": high}
