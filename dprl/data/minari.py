"""Minari's data set format (its HDF5 layout), read and written with h5py alone.

    <folder>/data/main_data.hdf5    episode_<i>/ observations (T+1, D), actions (T, A), rewards, terminations,
                                    truncations (T,), infos/success (T+1,); attributes id, seed, total_steps, success
    <folder>/data/metadata.json     totals, the environment and its spaces

The `minari` package loads such a folder when it lies under its root.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dprl import checkpoint
from dprl.data.episodes import Episodes
from dprl.errors import CheckpointError, DatasetError, MissingDependencyError
from dprl.spec import EnvSpec

DATA_FILE = Path("data") / "main_data.hdf5"
METADATA_FILE = Path("data") / "metadata.json"
ENV_ID_KEY = "dprl_env_id"


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
    """
    folder = Path(path)
    checkpoint.publish(folder, lambda temporary: _write(data, temporary, folder.name, spec, description))


def load_dataset(path: str | Path) -> Episodes:
    """Load and validate a data set folder.

    Raises:
        DatasetError: missing, damaged, empty, of wrong shapes, or with numbers that are not finite; the message names
            file, episode and step.
    """
    file = Path(path) / DATA_FILE
    if not file.is_file():
        raise DatasetError(f"'{path}' holds no data set: '{file}' is missing")
    try:
        checkpoint.verify(Path(path))
    except CheckpointError as error:
        raise DatasetError(str(error)) from error
    try:
        return _read(file, _env_id(Path(path) / METADATA_FILE))
    except DatasetError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise DatasetError(f"'{file}' is damaged or not a Minari data set: {error}") from error


def _read(file: Path, env_id: str | None) -> Episodes:
    with require_h5py().File(file, "r") as h5:
        names = sorted((n for n in h5 if n.startswith("episode_")), key=lambda n: int(n.removeprefix("episode_")))
        if not names:
            raise DatasetError(f"'{file}' has no episodes")
        episodes = [_read_episode(h5[name], f"'{file}', {name}") for name in names]
    sizes = {(e["observations"].shape[1], e["actions"].shape[1]) for e in episodes}
    if len(sizes) > 1:
        raise DatasetError(f"'{file}': episodes differ in observation and action size: {sorted(sizes)}")
    return Episodes(
        observations=np.concatenate([e["observations"][:-1] for e in episodes]),
        actions=np.concatenate([e["actions"] for e in episodes]),
        rewards=np.concatenate([e["rewards"] for e in episodes]),
        final_observations=np.stack([e["observations"][-1] for e in episodes]),
        ends=np.cumsum([len(e["actions"]) for e in episodes]),
        terminated=np.array([bool(e["terminations"][-1]) for e in episodes]),
        success=np.array([e["success"] for e in episodes]),
        seeds=np.array([e["seed"] for e in episodes], np.int64),
        env_id=env_id,
    )


def _read_episode(group: Any, where: str) -> dict[str, Any]:
    arrays = {}
    if not hasattr(group, "keys"):
        raise DatasetError(f"{where}: is not a group of arrays")
    for name in ("observations", "actions", "rewards", "terminations", "truncations"):
        if name not in group:
            raise DatasetError(f"{where}: {name} is missing")
        if not hasattr(group[name], "shape"):
            raise DatasetError(f"{where}: {name} has named parts; only plain arrays are supported so far")
        arrays[name] = np.asarray(group[name])
    steps = len(arrays["actions"])
    if steps == 0:
        raise DatasetError(f"{where}: has no steps")
    for name, length, ndim in (
        ("observations", steps + 1, 2),
        ("actions", steps, 2),
        ("rewards", steps, 1),
        ("terminations", steps, 1),
        ("truncations", steps, 1),
    ):
        array = arrays[name]
        if array.ndim != ndim or len(array) != length:
            raise DatasetError(f"{where}: {name} has the shape {array.shape}; {steps} actions need {length} rows "
                               f"and {ndim} dimension{'s' if ndim > 1 else ''}")  # fmt: skip
        if array.dtype.kind not in "fiub":
            raise DatasetError(f"{where}: {name} has the type {array.dtype}; numbers are needed")
        if name in ("observations", "actions", "rewards"):
            with np.errstate(over="ignore"):
                array = arrays[name] = array.astype(np.float32)
        finite = np.isfinite(array.reshape(length, -1)).all(axis=1)
        if not finite.all():
            raise DatasetError(f"{where}, step {np.flatnonzero(~finite)[0]}: {name} is not finite")
    infos = group.get("infos", {})
    success = np.asarray(infos["success"]).any() if "success" in infos else group.attrs.get("success", False)
    return {**arrays, "success": bool(success), "seed": int(group.attrs.get("seed", -1))}


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
            group.create_dataset(
                "observations", data=np.concatenate([data.observations[start:end], data.final_observations[i : i + 1]])
            )
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


def _metadata(data: Episodes, name: str, spec: EnvSpec, description: str) -> dict[str, Any]:
    return {
        "total_episodes": data.n_episodes,
        "total_steps": int(data.ends[-1]),
        "data_format": "hdf5",
        "dataset_id": name,
        "description": description,
        ENV_ID_KEY: spec.id,
        "observation_space": _box([-np.inf] * spec.observation_size, [np.inf] * spec.observation_size),
        "action_space": _box(list(spec.action_low), list(spec.action_high)),
        "minari_version": "0.5.3",
    }


def _box(low: list[float], high: list[float]) -> str:
    """A float32 Box as Minari writes it: JSON in a string."""
    return json.dumps({"type": "Box", "dtype": "float32", "shape": [len(low)], "low": low, "high": high})
