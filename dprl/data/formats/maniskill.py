"""ManiSkill's trajectories: an HDF5 file, and a JSON file of the same name that tells of the environment.

    traj_<id>    obs (T+1, ...), an array or a group of parts; actions (T, A); terminated, truncated (T,), and perhaps
                 rewards, success (T,)

Parts of the observation are joined in alphabetical order, without point clouds, unless `keys` says otherwise;
``sensor_data/<camera>/rgb`` become cameras. Of the flags the last counts: a recording may go on after a success.
ManiSkill 2 writes neither terminated nor truncated: there success at the end is what terminated an episode.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from dprl.data.formats.hdf5 import HDF5Source, chosen_parts, is_image, numbered, state_and_images, top_level
from dprl.data.source import Episode, flags, leaves, numbers, seed_of
from dprl.errors import DatasetError

NOT_STATE = ("sensor_data/", "sensor_param/", "pointcloud/", "image/", "camera_param/")
"""The last two are ManiSkill 2's."""


class ManiSkill(HDF5Source):
    """One file of trajectories."""

    format: ClassVar[str] = "a ManiSkill file"
    takes: ClassVar[tuple[str, ...]] = ("keys",)

    def open(self) -> None:
        """See `Source.open`."""
        super().open()
        self._names = numbered(self.h5, "traj_", self.path)
        for name in self._names:
            if hasattr(self.h5[name].get("actions"), "keys"):
                raise DatasetError(f"'{self.path}', {name}: actions have named parts; only observations may")
            if "actions" not in self.h5[name] or len(self.h5[name]["actions"]) == 0:
                lacks = "has no steps" if "actions" in self.h5[name] else "actions is missing"
                raise DatasetError(f"'{self.path}', {name}: {lacks}")
        self.lengths = [len(self.h5[name]["actions"]) for name in self._names]
        described = _described(self._json)
        self.env_id = described.get("env_info", {}).get("env_id")
        self._seeds = {e.get("episode_id"): e.get("episode_seed") for e in described.get("episodes", [])}

    @property
    def _json(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def files(self) -> list[Path]:
        """See `Source.files`."""
        return [file for file in (self.path, self._json) if file.is_file()]

    @staticmethod
    def detects(path: Path) -> bool:
        """See `Source.detects`."""
        return any(name.startswith("traj_") for name in top_level(path))

    def _read(self, index: int) -> Episode:
        name, steps = self._names[index], self.lengths[index]
        where = f"'{self.path}', {name}"
        trajectory = self.h5[name]
        obs = trajectory.get("obs")
        grouped = hasattr(obs, "keys")
        if obs is None or (grouped and len(obs) == 0):
            raise DatasetError(f"{where}: has no observations, but simulator states: replay it first, with "
                               "python -m mani_skill.trajectory.replay_trajectory -o state")  # fmt: skip
        if not grouped and self.options.keys is not None:
            raise DatasetError(f"{where}: there is no '{self.options.keys[0]}': the observations have no named parts")
        parts = chosen_parts(obs, self.options.keys, _default(obs), where) if grouped else {"obs": obs}
        observations, images = state_and_images(parts, None, steps + 1, steps, where)
        actions = numbers(trajectory["actions"][()], "actions", steps, 2, where)
        rewards = numbers(trajectory["rewards"][()], "rewards", steps, 1, where) if "rewards" in trajectory else None
        success, terminated = (
            flags(trajectory[part][()], part, steps, where) if part in trajectory else None
            for part in ("success", "terminated")
        )
        if terminated is None and "truncated" not in trajectory:
            terminated = success
        if terminated is None:
            raise DatasetError(f"{where}: terminated is missing")
        return Episode(
            where, observations, actions, rewards,
            terminated=bool(terminated[-1]),
            success=None if success is None else bool(success.any()),
            seed=seed_of(self._seeds.get(int(name.removeprefix("traj_")))),
            images=images,
        )  # fmt: skip


def _default(obs: Any) -> list[str]:
    """All numbers that are not a camera's, and every colour image."""
    parts = dict(leaves(obs))
    images = [name for name, dataset in parts.items() if is_image(dataset) or name.endswith("/rgb")]
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
