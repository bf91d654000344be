"""ManiSkill's trajectories: an HDF5 file, and a JSON file of the same name that tells of the environment.

    traj_<id>    obs (T+1, ...), an array or a group of parts; actions (T, A); terminated, truncated (T,), and perhaps
                 rewards, success (T,)

Parts of the observation are joined in alphabetical order, unless `keys` says otherwise; ``sensor_data/<camera>/rgb``
become cameras.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dprl.data.formats.hdf5 import HDF5Source, chosen_parts, is_image, numbered, state_and_images, top_level
from dprl.data.source import DataOptions, Episode, leaves, numbers
from dprl.errors import DatasetError

NOT_STATE = ("sensor_data/", "sensor_param/")


class ManiSkill(HDF5Source):
    """One file of trajectories."""

    format: ClassVar[str] = "a ManiSkill file"
    takes: ClassVar[tuple[str, ...]] = ("keys",)

    def __init__(self, path: Path, options: DataOptions) -> None:
        super().__init__(path, options)
        with self.damage_is_named():
            self._names = numbered(self.h5, "traj_", path)
            self.lengths = [len(self.h5[name]["actions"]) for name in self._names]
        described = _described(path.with_suffix(".json"))
        self.env_id = described.get("env_info", {}).get("env_id")
        self._seeds = {e.get("episode_id"): e.get("episode_seed") for e in described.get("episodes", [])}

    @staticmethod
    def detects(path: Path) -> bool:
        """See `Source.detects`."""
        return any(name.startswith("traj_") for name in top_level(path))

    def read(self, index: int) -> Episode:
        """See `Source.read`."""
        name, steps = self._names[index], self.lengths[index]
        where = f"'{self.path}', {name}"
        with self.damage_is_named():
            trajectory = self.h5[name]
            obs = trajectory.get("obs")
            if obs is None or (hasattr(obs, "keys") and not len(obs)):
                raise DatasetError(f"{where}: has no observations, but simulator states: replay it first, with "
                                   "python -m mani_skill.trajectory.replay_trajectory -o state")  # fmt: skip
            grouped = hasattr(obs, "keys")
            parts = chosen_parts(obs, self.options.keys, _default(obs), where) if grouped else {"obs": obs}
            observations, images = state_and_images(parts, None, steps + 1, steps, where)
            actions = numbers(trajectory["actions"][()], "actions", steps, 2, where)
            rewards = (
                numbers(trajectory["rewards"][()], "rewards", steps, 1, where) if "rewards" in trajectory else None
            )
            success = bool(np.asarray(trajectory["success"]).any()) if "success" in trajectory else None
            terminated = bool(np.asarray(trajectory["terminated"])[-1])
        seed = self._seeds.get(int(name.removeprefix("traj_")))
        return Episode(where, observations, actions, rewards, terminated, success, -1 if seed is None else seed, images)


def _default(obs: Any) -> list[str]:
    """All numbers that are not a camera's, and every colour image."""
    parts = dict(leaves(obs))
    images = [name for name, dataset in parts.items() if is_image(dataset)]
    return [name for name in parts if name not in images and not name.startswith(NOT_STATE)] + images


def _described(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DatasetError(f"'{file}' is not valid JSON: {error}") from error
    if not isinstance(described, dict):
        raise DatasetError(f"'{file}' is not ManiSkill's: it is no object")
    return described
