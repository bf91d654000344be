"""Observations: an array where a task has a state only, else a dict of named parts, as Gymnasium's Box and Dict.

The names are LeRobot's: ``observation.state`` (..., D) float32 and ``observation.images.<camera>`` (..., height, width,
channels) uint8. The leading axes are the same for every part. A plain array means ``observation.state`` alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dprl.config import validate
from dprl.errors import check

STATE = "observation.state"
IMAGES = "observation.images."

Array = npt.NDArray[Any]
Observation = Array | Mapping[str, Array]
TensorObservation = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Camera:
    """One camera of a task: every observation has its image, uint8 (height, width, channels)."""

    name: str
    """Letters, digits, ``_`` and ``-``."""
    height: int
    width: int
    channels: int = 3
    """3: red, green, blue. 1: grey."""

    def __post_init__(self) -> None:
        validate(self, at_least={"height": 1, "width": 1})
        check(re.fullmatch(r"[A-Za-z0-9_-]+", self.name) is not None, "name", self.name,
              "must be of letters, digits, _ and -")  # fmt: skip
        check(self.channels in (1, 3), "channels", self.channels, "must be 1 or 3")

    @property
    def part(self) -> str:
        """Its name in an observation."""
        return IMAGES + self.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.height, self.width, self.channels


def map_parts(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """Apply `function` to arrays (or tensors), or part by part to dicts with the same names."""
    if isinstance(first, Mapping):
        return {name: function(part, *(other[name] for other in others)) for name, part in first.items()}
    return function(first, *others)


class Repeated(Mapping[str, Tensor]):
    """Named parts in which each row comes `times` times in turn: whoever encodes them may do so once for each.

    A part is made when it is asked for.
    """

    def __init__(self, source: Mapping[str, Tensor], times: int) -> None:
        self.source, self.times = source, times

    def __getitem__(self, name: str) -> Tensor:
        return self.source[name].repeat_interleave(self.times, dim=0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)


def repeated(observation: TensorObservation, times: int) -> TensorObservation:
    """Return each row `times` times in turn: (B, ...) -> (B·times, ...)."""
    if isinstance(observation, Mapping):
        return Repeated(observation, times)
    return observation.repeat_interleave(times, dim=0)


def take(observation: Any, rows: Any) -> Any:
    """Index the leading axis: ``observation[rows]`` of every part."""
    return map_parts(lambda part: part[rows], observation)


def put(observation: Any, rows: Any, values: Any) -> None:
    """Write the leading axis in place: ``observation[rows] = values`` of every part."""

    def write(part: Any, new: Any) -> None:
        part[rows] = new

    map_parts(write, observation, values)


def batch_size(observation: Any) -> int:
    """Length of the leading axis."""
    if isinstance(observation, Repeated):
        return observation.times * batch_size(observation.source)
    part = next(iter(observation.values())) if isinstance(observation, Mapping) else observation
    return len(part)


def state_of(observation: Any) -> Any:
    """Return the state (..., D); None where the observation is images alone."""
    return observation.get(STATE) if isinstance(observation, Mapping) else observation


def images_of(observation: Any) -> dict[str, Any]:
    """Return the images (..., height, width, channels) by camera; none, where the observation is a state alone."""
    if not isinstance(observation, Mapping):
        return {}
    return {name.removeprefix(IMAGES): part for name, part in observation.items() if name.startswith(IMAGES)}


def camera_name(part: str) -> str:
    """Return the camera that a part shows, whoever named it: ``observation.images.top`` and ``top`` are ``top``."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", part.removeprefix(IMAGES)).strip("_") or "pixels"


def to_tensors(observation: Observation, device: torch.device | str = "cpu") -> TensorObservation:
    """Move to `device` as it is: images stay uint8."""
    converted: TensorObservation = map_parts(
        lambda part: torch.as_tensor(np.ascontiguousarray(part)).to(device), observation
    )
    return converted
