"""Episodes in memory, and the chunks cut from them.

Shapes: S steps over all episodes, D observation size, A action size, O observation steps, H actions of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dprl.data.source import Episode, Pixels
from dprl.errors import DatasetError, check
from dprl.observations import IMAGES, STATE, Observation, put
from dprl.seeding import numpy_generator
from dprl.spec import BoolArray, FloatArray, IntArray, RewardKind

ROWS_AT_ONCE = 100_000
RewardsFrom = Literal["data", "success", "none"]


@dataclass(frozen=True)
class OnDisk:
    """Rows of an array in a .npy file, read when they are indexed; nothing of it stays in memory."""

    file: Path
    offset: int
    """Where the numbers begin, in bytes."""
    stored: tuple[int, ...]
    """Shape of the array in the file."""
    dtype: np.dtype[Any]
    rows: IntArray | None = None
    """(S,) which rows of it these are. Default: all."""

    @staticmethod
    def open(file: Path) -> OnDisk:
        """Return all rows of `file`."""
        array = np.load(file, mmap_mode="r")
        return OnDisk(file.resolve(), array.offset, array.shape, array.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """(S, ...)."""
        return len(self), *self.stored[1:]

    @property
    def ndim(self) -> int:
        """How many dimensions."""
        return len(self.stored)

    @property
    def nbytes(self) -> int:
        """Bytes of these rows."""
        return math.prod(self.shape) * self.dtype.itemsize

    def select(self, rows: IntArray) -> OnDisk:
        """Return some of these rows, still on disk."""
        return replace(self, rows=rows if self.rows is None else self.rows[rows])

    def __len__(self) -> int:
        return self.stored[0] if self.rows is None else len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        array = np.memmap(self.file, self.dtype, "r", self.offset, self.stored)
        return np.array(array[index if self.rows is None else self.rows[index]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self[:], dtype)


Numbers = FloatArray | OnDisk
"""float32 rows, in memory or not; index them, or `numpy.asarray` them."""
Images = Pixels | OnDisk
"""(rows, height, width, channels), the same of uint8."""


@dataclass(frozen=True)
class _Frames:
    """One camera's images of one episode."""

    images: Images
    final: Images
    start: int
    end: int
    episode: int

    @property
    def where(self) -> str:
        """Which episode's."""
        return f"episode {self.episode}"

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, channels)."""
        return tuple(self.images.shape[1:])

    def read(self) -> Pixels:
        """See `Frames.read`."""
        return np.concatenate([self.images[self.start : self.end], self.final[self.episode : self.episode + 1]])


@dataclass(frozen=True)
class Chunks:
    """Which steps each chunk is made of."""

    observation_rows: IntArray
    """(chunks, O)."""
    action_rows: IntArray
    """(chunks, H)."""
    valid: BoolArray
    """(chunks, H) False where the action is a repetition of its episode's last one, past the end."""

    def __len__(self) -> int:
        return len(self.action_rows)


@dataclass(frozen=True)
class Episodes:
    """Demonstrations: arrays over the steps of all episodes, one after the other."""

    observations: Numbers
    """(S, D) the state that each action saw; D = 0 where there are images alone."""
    actions: Numbers
    """(S, A)."""
    rewards: Numbers
    """(S,)."""
    final_observations: FloatArray
    """(episodes, D) what the last action of each led to."""
    ends: IntArray
    """(episodes,) index after each episode's last step."""
    terminated: BoolArray
    """(episodes,) whether it terminated; else it was truncated."""
    success: BoolArray
    """(episodes,) whether it succeeded."""
    seeds: IntArray
    """(episodes,) seed of the environment it was played in."""
    env_id: str | None = None
    """The environment, if known."""
    images: Mapping[str, Images] = field(default_factory=dict)
    """Camera -> (S, height, width, channels) uint8, what each action saw."""
    final_images: Mapping[str, Images] = field(default_factory=dict)
    """Camera -> (episodes, height, width, channels) uint8, what the last action of each led to."""
    final_known: BoolArray | None = None
    """(episodes,) whether that is known; where it is not, the last observation is repeated. None: of all."""
    rewards_from: RewardsFrom = "data"
    """`success`: the data have none, and the last step of an episode that succeeded has 1. `none`: all are 0."""
    success_known: bool = True
    """Whether the data say what succeeded; where they do not, `success` is False everywhere."""
    reward_kind: RewardKind | None = None
    """Whether the environment's rewards were its sparse or its dense ones, if known."""

    def __post_init__(self) -> None:
        if len(self.ends) == 0:
            raise DatasetError("the data set has no episodes")
        self._check_ends()
        self._check_numbers("observations", self.observations, 2, len(self.actions))
        self._check_numbers("actions", self.actions, 2, len(self.actions))
        self._check_numbers("rewards", self.rewards, 1, len(self.actions))
        self._check_numbers("final_observations", self.final_observations, 2, self.n_episodes)
        if self.final_observations.shape[1] != self.observations.shape[1]:
            raise DatasetError(f"final_observations have {self.final_observations.shape[1]} numbers, observations "
                               f"{self.observations.shape[1]}")  # fmt: skip
        if set(self.images) != set(self.final_images):
            raise DatasetError(f"images are of the cameras {sorted(self.images)}, "
                               f"but final_images of {sorted(self.final_images)}")  # fmt: skip
        for images, rows in ((self.images, int(self.ends[-1])), (self.final_images, self.n_episodes)):
            for camera, array in images.items():
                if array.dtype != np.uint8 or len(array.shape) != 4 or array.shape[0] != rows:
                    raise DatasetError(f"images of the camera '{camera}' are {array.dtype} {array.shape}; "
                                       f"they must be uint8 ({rows}, height, width, channels)")  # fmt: skip
        for camera, array in self.images.items():
            last = self.final_images[camera].shape[1:]
            if array.shape[1:] != last:
                raise DatasetError(f"images of the camera '{camera}' have the size {array.shape[1:]}, its final_images "
                                   f"{last}")  # fmt: skip

    def _check_ends(self) -> None:
        """Raise DatasetError unless every episode has steps, together all of them, and one of each number."""
        kinds = {"ends": np.integer, "terminated": np.bool_, "success": np.bool_, "seeds": np.integer}
        if self.final_known is not None:
            kinds["final_known"] = np.bool_
        for name, kind in kinds.items():
            array = getattr(self, name)
            if not np.issubdtype(array.dtype, kind) or array.shape != (self.n_episodes,):
                expected = "whole numbers" if kind is np.integer else "bool"
                raise DatasetError(f"{name} are {array.dtype} {array.shape}; they must be {expected} "
                                   f"({self.n_episodes},)")  # fmt: skip
        empty = np.flatnonzero(self.lengths < 1)
        if len(empty):
            i = empty[0]
            raise DatasetError(f"episode {i} is empty: it goes from step {self.starts[i]} to before {self.ends[i]}")
        if self.ends[-1] != len(self.actions):
            raise DatasetError(f"the episodes have {self.ends[-1]} steps, but there are {len(self.actions)} actions")

    def _check_numbers(self, name: str, array: Numbers, ndim: int, rows: int) -> None:
        """Raise DatasetError unless `array` is float32, of `rows` rows, and finite; on disk it was checked before."""
        if array.dtype != np.float32 or array.ndim != ndim or len(array) != rows:
            shape = f"({rows}, {'size' if ndim > 1 else ''})"
            raise DatasetError(f"{name} are {array.dtype} {array.shape}; they must be float32 {shape}")
        if isinstance(array, OnDisk) or np.isfinite(array).all():
            return
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        if rows != len(self.actions):
            where = f"episode {row}"
        else:
            episode = int(np.searchsorted(self.ends, row, side="right"))
            where = f"episode {episode}, step {row - self.starts[episode]}"
        raise DatasetError(f"{name} of {where} are {array[row].tolist()}; they must be finite")

    @staticmethod
    def concatenate(parts: Sequence[Episodes]) -> Episodes:
        """Return the episodes of all `parts`, one after the other, in memory.

        Raises:
            DatasetError: none, or they are not of one environment, one shape and one kind of reward.
        """
        if len(parts) == 1:
            return parts[0]
        kinds = {
            (
                p.env_id,
                p.rewards_from,
                p.reward_kind,
                p.success_known,
                p.observations.shape[1],
                p.actions.shape[1],
                *sorted(p.images),
            )
            for p in parts
        }
        if len(kinds) != 1:
            raise DatasetError(f"data sets can be put together if they are alike; these are of {len(kinds)} kinds: "
                               f"{sorted(map(str, kinds))}")  # fmt: skip
        first = parts[0]
        known = [np.ones(p.n_episodes, np.bool_) if p.final_known is None else p.final_known for p in parts]
        steps = np.cumsum([0, *(len(p.actions) for p in parts)])

        def joined(name: str) -> Any:
            return np.concatenate([np.asarray(getattr(p, name)) for p in parts])

        def images(name: str) -> dict[str, Any]:
            return {
                camera: np.concatenate([np.asarray(getattr(p, name)[camera]) for p in parts]) for camera in first.images
            }

        return Episodes(
            observations=joined("observations"),
            actions=joined("actions"),
            rewards=joined("rewards"),
            final_observations=joined("final_observations"),
            ends=np.concatenate([p.ends + start for p, start in zip(parts, steps, strict=False)]),
            terminated=joined("terminated"),
            success=joined("success"),
            seeds=joined("seeds"),
            env_id=first.env_id,
            images=images("images"),
            final_images=images("final_images"),
            final_known=None if all(k.all() for k in known) else np.concatenate(known),
            rewards_from=first.rewards_from,
            success_known=first.success_known,
            reward_kind=first.reward_kind,
        )

    @property
    def n_episodes(self) -> int:
        """How many."""
        return len(self.ends)

    @property
    def starts(self) -> IntArray:
        """(episodes,) index of each episode's first step."""
        return np.concatenate([[0], self.ends[:-1]])

    @property
    def lengths(self) -> IntArray:
        """(episodes,) steps of each."""
        lengths: IntArray = self.ends - self.starts
        return lengths

    @property
    def success_rate(self) -> float:
        """Share of the episodes that succeeded; NaN where nobody knows."""
        return float(self.success.mean()) if self.success_known else math.nan

    @property
    def returns(self) -> npt.NDArray[np.float64]:
        """(episodes,) sum of each one's rewards."""
        sums: npt.NDArray[np.float64] = np.add.reduceat(np.asarray(self.rewards, np.float64), self.starts)
        return sums

    def episodes(self) -> Iterator[Episode]:
        """Yield them one by one."""
        for i, (start, end) in enumerate(zip(self.starts.tolist(), self.ends.tolist(), strict=True)):
            known = self.final_known is None or bool(self.final_known[i])
            last = self.final_observations[i : i + 1] if known else self.final_observations[:0]
            yield Episode(
                f"episode {i}",
                np.concatenate([self.observations[start:end], last]),
                self.actions[start:end],
                self.rewards[start:end] if self.rewards_from == "data" else None,
                bool(self.terminated[i]),
                bool(self.success[i]) if self.success_known and self.rewards_from != "none" else None,
                int(self.seeds[i]),
                {
                    camera: _Frames(array, self.final_images[camera], start, end, i)
                    for camera, array in self.images.items()
                },
            )

    def limits(self, name: Literal["observations", "actions"]) -> FloatArray:
        """Return the least and the largest of each number, (2, D or A); what is on disk is read a part at a time."""
        array = getattr(self, name)
        parts = (array[first : first + ROWS_AT_ONCE] for first in range(0, len(array), ROWS_AT_ONCE))
        low, high = zip(*((part.min(axis=0), part.max(axis=0)) for part in parts), strict=True)
        return np.stack([np.min(low, axis=0), np.max(high, axis=0)])

    def observe(self, rows: Any) -> Observation:
        """Return what the actions `rows` (any index of steps) saw: an array, or a dict where there are images."""
        state: FloatArray = self.observations[rows]
        if not self.images:
            return state
        images = {IMAGES + camera: np.asarray(array[rows]) for camera, array in self.images.items()}
        return {STATE: state, **images} if self.observations.shape[1] else images

    def observe_outcomes(self, rows: IntArray) -> Observation:
        """Return the same for rows of which those from S on are final observations, counted by episode."""
        steps = int(self.ends[-1])
        final, first = rows >= steps, np.minimum(rows, steps - 1)
        seen = self.observe(first)
        if not final.any():
            return seen
        episodes = rows[final] - steps
        state: FloatArray = self.final_observations[episodes]
        images = {IMAGES + camera: np.asarray(array[episodes]) for camera, array in self.final_images.items()}
        put(seen, final, {STATE: state, **images} if isinstance(seen, Mapping) else state)
        return seen

    def chunks(self, n_obs_steps: int, horizon: int, *, pad_after: int = 0) -> Chunks:
        """Return the steps of every chunk.

        A chunk never crosses an episode's end. Before an episode's start its first observation is repeated, as the
        environments do.

        Args:
            n_obs_steps: O.
            horizon: H.
            pad_after: how many of a chunk's actions may lie past its episode's end, where the last action is
                repeated and not valid. The first is always valid.

        Raises:
            DatasetError: no episode is as long as `horizon` without the padding.
        """
        check(pad_after >= 0, "pad_after", pad_after, "must be at least 0")
        observation_rows, action_rows, valid = [], [], []
        counts = {"n_obs_steps": n_obs_steps, "horizon": horizon}
        for name, count in counts.items():
            check(count >= 1, name, count, "must be at least 1")
        for start, end in zip(self.starts, self.ends, strict=True):
            first = np.arange(start, min(end - horizon + pad_after + 1, end))[:, None]
            steps = first + np.arange(horizon)
            observation_rows.append(np.maximum(first + np.arange(1 - n_obs_steps, 1), start))
            action_rows.append(np.minimum(steps, end - 1))
            valid.append(steps < end)
        chunks = Chunks(np.concatenate(observation_rows), np.concatenate(action_rows), np.concatenate(valid))
        if len(chunks) == 0:
            padded = f", {pad_after} of them padding" if pad_after else ""
            raise DatasetError(
                f"no episode is as long as the horizon of {horizon}{padded}: the longest has {self.lengths.max()} steps"
            )
        return chunks

    def select(self, indices: Sequence[int] | IntArray | BoolArray) -> Episodes:
        """Return the episodes `indices`, in that order. Images on disk stay there.

        Args:
            indices: which; or a mask (episodes,) bool, as `success` is.

        Raises:
            DatasetError: none, or one that is not there.
        """
        chosen = np.atleast_1d(np.asarray(indices, np.int64 if len(indices) == 0 else None))
        if chosen.dtype == np.bool_ and chosen.shape == (self.n_episodes,):
            chosen = np.flatnonzero(chosen)
        if not np.issubdtype(chosen.dtype, np.integer) or chosen.ndim != 1:
            raise DatasetError(f"episodes are selected by whole numbers, or by a mask of {self.n_episodes}, not by "
                               f"{chosen.dtype} {chosen.shape}")  # fmt: skip
        outside = chosen[(chosen < 0) | (chosen >= self.n_episodes)]
        if len(outside):
            raise DatasetError(f"there is no episode {outside[0]}: the data set has {self.n_episodes}, counted from 0")
        if len(chosen) == 0:
            raise DatasetError("no episodes are selected")
        rows = np.concatenate([np.arange(self.starts[i], self.ends[i]) for i in chosen])
        return Episodes(
            observations=_select(self.observations, rows),
            actions=_select(self.actions, rows),
            rewards=_select(self.rewards, rows),
            final_observations=self.final_observations[chosen],
            ends=np.cumsum(self.lengths[chosen]),
            terminated=self.terminated[chosen],
            success=self.success[chosen],
            seeds=self.seeds[chosen],
            env_id=self.env_id,
            images={camera: _select(array, rows) for camera, array in self.images.items()},
            final_images={camera: _select(array, chosen) for camera, array in self.final_images.items()},
            final_known=None if self.final_known is None else self.final_known[chosen],
            rewards_from=self.rewards_from,
            success_known=self.success_known,
            reward_kind=self.reward_kind,
        )

    def best(self, share: float) -> Episodes:
        """Return the share of the episodes, rounded up, whose returns are largest, in their order; all of 1.

        Raises:
            ConfigError: a share that is not above 0 and at most 1.
            DatasetError: there are no rewards.
        """
        check(0 < share <= 1, "share", share, "must be above 0 and at most 1")
        if share == 1:
            return self
        if self.rewards_from == "none":
            raise DatasetError("the best episodes cannot be told: the data have neither rewards nor success")
        n = math.ceil(round(share * self.n_episodes, 9))  # 0.07 * 100 is a little more than 7
        return self.select(np.sort(np.argsort(-self.returns, kind="stable")[:n]))

    def split(self, validation_share: float, seed: int) -> tuple[Episodes, Episodes | None]:
        """Return episodes to train on, and others to validate on: the share rounded, but at least one of each.

        Which ones follows from `seed`; their order stays. With a share of 0 there is no validation.

        Raises:
            ConfigError: a share below 0, or not below 1.
            DatasetError: a single episode cannot be split.
        """
        check(0 <= validation_share < 1, "validation_share", validation_share, "must be at least 0 and below 1")
        if validation_share == 0:
            return self, None
        n = self.n_episodes
        if n < 2:
            raise DatasetError(
                f"validation_share = {validation_share}: the data set has a single episode; two are needed"
            )
        n_validation = min(max(round(validation_share * n), 1), n - 1)
        order = numpy_generator(seed, "validation").permutation(n)
        return self.select(np.sort(order[n_validation:])), self.select(np.sort(order[:n_validation]))


def _select(array: Any, rows: IntArray) -> Any:
    return array.select(rows) if isinstance(array, OnDisk) else array[rows]
