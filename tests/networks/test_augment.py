"""Shifts and crops of images whose pixels hold their own row, column and image, so that a mistake is visible."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from dprl.errors import ConfigError
from dprl.networks.augment import center_crop, random_crop, random_shift


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def coordinates(n, height, width, dtype=torch.uint8):
    """(n, height, width, 3): row, column, image."""
    parts = torch.meshgrid(torch.arange(n), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([parts[1], parts[2], parts[0]], dim=-1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_a_shift_is_a_slice_of_the_padded_image(dtype):
    images, pad = coordinates(40, 9, 11, dtype), 2
    shifted = random_shift(images, pad, generator())
    assert shifted.dtype == dtype
    assert shifted.shape == images.shape
    padded = functional.pad(images.float().permute(0, 3, 1, 2), (pad, pad, pad, pad), mode="replicate")
    offsets = set()
    for i, image in enumerate(shifted.float()):
        row, column = int(image[4, 5, 0]) - 4 + pad, int(image[4, 5, 1]) - 5 + pad  # read off the middle pixel
        expected = padded[i, :, row : row + 9, column : column + 11]
        assert torch.equal(image.permute(2, 0, 1), expected)
        offsets.add((row, column))
    assert len(offsets) > 15  # of 25: images differ


def test_every_shift_is_about_as_likely():
    middle = random_shift(coordinates(2700, 5, 5, torch.int16), 1, generator())[:, 2, 2]
    _, counts = torch.unique(middle[:, :2], dim=0, return_counts=True)
    assert len(counts) == 9
    assert (counts - 300).abs().max() < 80  # 5 standard deviations


@pytest.mark.parametrize("augment", [lambda x, g: random_shift(x, 4, g), lambda x, g: random_crop(x, 7, g)])
def test_the_generator_decides(augment):
    images = coordinates(8, 12, 12)
    assert torch.equal(augment(images, generator(1)), augment(images, generator(1)))
    assert not torch.equal(augment(images, generator(1)), augment(images, generator(2)))


def test_shift_by_nothing_changes_nothing():
    images = coordinates(3, 6, 5)
    assert torch.equal(random_shift(images, 0, generator()), images)


def test_a_shift_beyond_the_image_repeats_its_edge():
    images = coordinates(50, 2, 2)
    shifted = random_shift(images, 10, generator())
    assert (shifted[..., :2] <= 1).all()
    assert torch.equal(shifted[..., 2], images[..., 2])


def test_images_need_not_be_contiguous():
    images = coordinates(4, 6, 6)
    view = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(random_shift(view, 2, generator()), random_shift(images, 2, generator()))


@given(st.integers(1, 9), st.integers(1, 9), st.data(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_crops_lie_within_the_image(height, width, data, seed):
    size = data.draw(st.integers(1, min(height, width)))
    images = coordinates(5, height, width)
    for crop in (random_crop(images, size, generator(seed)), center_crop(images, size)):
        assert crop.shape == (5, size, size, 3)
        assert crop.dtype == torch.uint8
        top, left = crop[:, :1, :1, 0].long(), crop[:, :1, :1, 1].long()
        assert ((top <= height - size) & (left <= width - size)).all()
        assert torch.equal(crop[..., 0].long(), (top + torch.arange(size)[:, None]).expand(-1, -1, size))
        assert torch.equal(crop[..., 1].long(), (left + torch.arange(size)).expand(-1, size, -1))
        assert torch.equal(crop[..., 2], images[:, :size, :size, 2])


def test_every_crop_occurs():
    corners = random_crop(coordinates(200, 4, 5), 3, generator())[:, 0, 0, :2]
    assert len(torch.unique(corners, dim=0)) == 2 * 3


def test_centre_crop_splits_odd_margins_as_torchvision():
    images = coordinates(1, 7, 9)
    assert center_crop(images, 4)[0, 0, 0, :2].tolist() == [2, 2]  # margins 3 and 5: 1.5 and 2.5, to even


@pytest.mark.parametrize("size", [0, 6, 99])
def test_a_crop_larger_than_the_image_is_refused(size):
    images = coordinates(1, 5, 8)
    with pytest.raises(ConfigError, match=f"size = {size}"):
        center_crop(images, size)
    with pytest.raises(ConfigError, match=f"size = {size}"):
        random_crop(images, size, generator())


def test_a_negative_pad_is_refused():
    with pytest.raises(ConfigError, match="pad = -1"):
        random_shift(coordinates(1, 5, 5), -1, generator())


@pytest.mark.parametrize("augment", [random_shift, random_crop])
def test_images_of_one_history_are_moved_alike(augment):
    """Or what moved between them would be noise."""
    images = coordinates(60, 9, 9)[..., :2]
    moved = augment(images, 3, generator(), 3).unflatten(0, (20, 3))
    assert moved.eq(moved[:, :1]).all()
    assert len({tuple(row.flatten().tolist()) for row in moved[:, 0]}) > 10, "histories are moved differently"
