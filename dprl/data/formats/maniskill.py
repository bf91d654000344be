"""ManiSkill's trajectories: an HDF5 file, and a JSON file of the same name that tells of the environment.

    traj_<id>    obs (T+1, ...), an array or a group of parts; actions (T, A); terminated, truncated (T,), and perhaps
                 rewards, success (T,)

Parts of the observation are joined in alphabetical order, without point clouds, unless `keys` says otherwise;
``sensor_data/<camera>/rgb`` become cameras. Of the flags the last counts: a recording may go on after a success.
ManiSkill 2 writes neither terminated nor truncated: there success at the end is what terminated an episode.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, ClassVar

from dprl.data.formats.hdf5 import HDF5Source, chosen_parts, is_image, numbered, state_and_images, top_level
from dprl.data.source import Episode, flags, is_read, leaves, numbers, one_each, seed_of
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
        self.lengths = [self._length(name) for name in self._names]
        described = _described(self._json)
        self.env_id = described.get("env_info", {}).get("env_id")
        episodes = {e.get("episode_id"): e for e in described.get("episodes", [])}
        self._seeds = {number: episode.get("episode_seed") for number, episode in episodes.items()}
        self._compare(episodes)

    def _length(self, name: str) -> int:
        """Steps of an episode that has actions."""
        trajectory, where = self.h5[name], f"'{self.path}', {name}"
        if not hasattr(trajectory, "keys"):
            raise DatasetError(f"{where}: is not a group of arrays")
        if "actions" not in trajectory:
            raise DatasetError(f"{where}: actions is missing")
        actions = trajectory["actions"]
        if hasattr(actions, "keys"):
            raise DatasetError(f"{where}: actions have named parts; only observations may")
        if actions.ndim != 2 or len(actions) == 0:
            lacks = f"actions have the shape {actions.shape}; it must be (steps, size)" if actions.ndim != 2 else ""
            raise DatasetError(f"{where}: {lacks or 'has no steps'}")
        return len(actions)

    def _compare(self, described: dict[Any, dict[str, Any]]) -> None:
        """Say where the JSON file tells of other episodes than are here."""
        here = {int(name.removeprefix("traj_")): length for name, length in zip(self._names, self.lengths, strict=True)}
        lost = sorted(number for number in described if isinstance(number, int) and number not in here)
        other = [n for n, length in here.items() if described.get(n, {}).get("elapsed_steps", length) != length]
        for found, what in (
            (lost, "is not here, but in its JSON file"),
            (other, "has another number of steps here than in its JSON file"),
        ):
            if found:
                more = f", and so for {len(found) - 1} more" if len(found) > 1 else ""
                warnings.warn(f"'{self.path}', traj_{found[0]}: {what}{more}: wrong if a copy is not complete",
                              stacklevel=2)  # fmt: skip

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
        observations, sizes, images = state_and_images(parts, None, steps + 1, steps, where)
        actions = numbers(trajectory["actions"][()], "actions", steps, 2, where)
        rewards = one_each(trajectory["rewards"][()], "rewards", steps, where) if "rewards" in trajectory else None
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
            parts=sizes,
        )  # fmt: skip


def _default(obs: Any) -> list[str]:
    """All numbers that are not a camera's, and every colour image."""
    parts = dict(leaves(obs))
    images = [n for n, dataset in parts.items() if (is_image(dataset) and is_read(n)) or n.endswith("/rgb")]
    state = [n for n, dataset in parts.items() if is_read(n, dataset.dtype) and not n.startswith(NOT_STATE)]
    return [name for name in state if name not in images] + images


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
