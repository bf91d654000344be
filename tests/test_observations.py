"""Observations: one array or a dict of parts, handled alike."""

import numpy as np
import pytest
import torch

from dprl.observations import (
    IMAGES,
    STATE,
    batch_size,
    camera_name,
    images_of,
    map_parts,
    put,
    state_of,
    take,
    to_tensors,
)


def parts() -> dict[str, np.ndarray]:
    return {
        STATE: np.arange(12, dtype=np.float32).reshape(3, 2, 2),
        IMAGES + "top": np.arange(3 * 2 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 2, 4, 5, 3),
    }


@pytest.mark.parametrize("observation", [parts()[STATE], parts()], ids=["array", "dict"])
def test_rows_are_taken_and_put_in_every_part(observation):
    taken = take(observation, np.array([2, 0]))
    assert batch_size(taken) == 2
    blank = map_parts(np.zeros_like, observation)
    put(blank, np.array([2, 0]), taken)
    for given, written in zip(as_list(observation), as_list(blank), strict=True):
        np.testing.assert_array_equal(written[[0, 2]], given[[0, 2]])
        assert (written[1] == 0).all()


def as_list(observation) -> list[np.ndarray]:
    return list(observation.values()) if isinstance(observation, dict) else [observation]


def test_parts_are_mapped_together_by_name():
    one, other = parts(), dict(reversed(parts().items()))
    added = map_parts(np.add, one, other)
    np.testing.assert_array_equal(added[STATE], 2 * one[STATE])
    assert added[IMAGES + "top"].dtype == np.uint8


def test_state_and_images():
    observation = parts()
    assert state_of(observation) is observation[STATE]
    assert state_of(observation[STATE]) is observation[STATE]
    assert state_of({IMAGES + "top": observation[IMAGES + "top"]}) is None
    assert list(images_of(observation)) == ["top"]
    assert images_of(observation[STATE]) == {}


@pytest.mark.parametrize(
    ("part", "name"),
    [("observation.images.top", "top"), ("top", "top"), ("", "pixels"), ("wrist/left cam", "wrist_left_cam")],
)
def test_camera_name(part, name):
    assert camera_name(part) == name


def test_tensors_keep_their_types():
    tensors = to_tensors({**parts(), IMAGES + "flipped": parts()[IMAGES + "top"][:, :, ::-1]})
    assert tensors[STATE].dtype == torch.float32
    assert tensors[IMAGES + "flipped"].dtype == torch.uint8
    np.testing.assert_array_equal(tensors[IMAGES + "flipped"].numpy(), parts()[IMAGES + "top"][:, :, ::-1])
    assert to_tensors(parts()[STATE]).shape == (3, 2, 2)
