"""robomimic's HDF5 files (arXiv:2108.03298).

    data                attributes: env_args, JSON with env_name, type and env_kwargs
    data/demo_<i>       actions (T, A), rewards, dones (T,), obs/<key> and next_obs/<key> (T, ...)
    mask/<filter key>   names of demonstrations

The state is robomimic's own choice, pose and gripper of each robot and, where there are no images, the object, unless
`keys` says otherwise; where no robot has these under their usual names, it is all numbers. Images become cameras,
``agentview_image`` the camera ``agentview``. Rewards that robosuite gives
without shaping are 1 in success, so an episode with one of them succeeded; of others nobody knows. Of the dones the
last counts: they may mark every step in which the task is done.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, ClassVar

from dprl.data.formats.hdf5 import HDF5Source, chosen_parts, numbered, state_and_images, top_level
from dprl.data.source import Episode, flags, is_read, leaves, numbers, one_each
from dprl.errors import DatasetError, did_you_mean

ROBOT_PARTS = ("eef_pos", "eef_quat", "gripper_qpos")
OBJECT = "object"


class Robomimic(HDF5Source):
    """One file, or those of its episodes that a filter key names."""

    format: ClassVar[str] = "a robomimic file"
    takes: ClassVar[tuple[str, ...]] = ("filter_key", "keys")

    def open(self) -> None:
        """See `Source.open`."""
        super().open()
        data = self.h5["data"]
        names = numbered(data, "demo_", self.path)
        self._names = names if self.options.filter_key is None else self._masked(names, self.options.filter_key)
        for name in self._names:
            if "actions" not in data[name]:
                raise DatasetError(f"'{self.path}', {name}: actions is missing")
            steps = len(data[name]["actions"])
            if steps == 0:
                raise DatasetError(f"'{self.path}', {name}: has no steps")
            if data[name].attrs.get("num_samples", steps) != steps:
                said = data[name].attrs["num_samples"]
                raise DatasetError(f"'{self.path}', {name}: there are {steps} actions, but num_samples is {said}")
        self.lengths = [len(data[name]["actions"]) for name in self._names]
        total, there = data.attrs.get("total"), sum(len(data[name].get("actions", ())) for name in names)
        if total is not None and int(total) != there:
            warnings.warn(f"'{self.path}': there are {there} steps, but total says {int(total)}: right if episodes "
                          "were taken out, wrong if they were lost", stacklevel=2)  # fmt: skip
        self._usual: list[str] | None = None  # parts of the first episode, which all have
        env = json.loads(data.attrs["env_args"]) if "env_args" in data.attrs else {}
        env_name, kwargs = env.get("env_name"), env.get("env_kwargs", {})
        is_robosuite = "robots" in kwargs
        self.env_id = f"robosuite/{env_name}" if env_name and is_robosuite else env_name
        self._sparse = is_robosuite and not kwargs.get("reward_shaping", False)

    @staticmethod
    def detects(path: Path) -> bool:
        """See `Source.detects`."""
        return top_level(path).get("data", False)

    def _read(self, index: int) -> Episode:
        name, steps = self._names[index], self.lengths[index]
        where = f"'{self.path}', {name}"
        demo = self.h5["data"][name]
        if "obs" not in demo:
            raise DatasetError(f"{where}: has no observations, but simulator states: extract them first, with "
                               "robomimic's dataset_states_to_obs")  # fmt: skip
        if self._usual is None and self.options.keys is None:
            self._usual = _default(self.h5["data"][self._names[0]].get("obs", {}))
        parts = chosen_parts(demo["obs"], self.options.keys, self._usual or [], where)
        last = dict(leaves(demo["next_obs"])) if "next_obs" in demo else None
        observations, sizes, images = state_and_images(parts, last, steps, steps, where)
        actions = numbers(demo["actions"][()], "actions", steps, 2, where)
        rewards = one_each(demo["rewards"][()], "rewards", steps, where) if "rewards" in demo else None
        dones = flags(demo["dones"][()], "dones", steps, where) if "dones" in demo else None
        success = bool(rewards.max() > 0) if self._sparse and rewards is not None else None
        terminated = dones is not None and bool(dones[-1])
        return Episode(
            where, observations, actions, rewards, terminated=terminated, success=success, images=images, parts=sizes
        )

    def _masked(self, names: list[str], filter_key: str) -> list[str]:
        masks = self.h5.get("mask", {})
        if filter_key not in masks:
            known = ", ".join(masks) or "none"
            raise DatasetError(
                f"'{self.path}' has no filter key '{filter_key}': it has {known}.{did_you_mean(filter_key, masks)}"
            )
        wanted = {name.decode() if isinstance(name, bytes) else str(name) for name in masks[filter_key][()]}
        missing = sorted(wanted - set(names))
        if missing:
            raise DatasetError(f"'{self.path}': the filter key '{filter_key}' names {missing[0]}, which is not there")
        if not wanted:
            raise DatasetError(f"'{self.path}': the filter key '{filter_key}' names no episodes")
        return [name for name in names if name in wanted]


def _default(obs: Any) -> list[str]:
    """Robomimic's choice of the state, or all numbers where that is not there; and every image."""
    if not hasattr(obs, "keys"):
        return []  # which is refused where it is read
    parts = {name: dataset for name, dataset in leaves(obs) if is_read(name, dataset.dtype)}
    images = [name for name, dataset in parts.items() if dataset.ndim >= 4]
    robots = [[f"robot{i}_{part}" for part in ROBOT_PARTS] for i in range(2)]
    usual = [name for robot in robots if all(name in parts for name in robot) for name in robot]
    state = [*usual, OBJECT] if usual else [name for name in parts if name not in images]
    return [name for name in state if name in parts and not (images and name == OBJECT)] + images
