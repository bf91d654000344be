"""Random shifts and crops of images, one offset per image or history of images, on the images' device.

Shapes: B images (B, height, width, C) of any dtype, which is kept. The generator may live on another device than the
images: with one on the CPU the offsets are the same everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dprl.errors import check


def random_shift(images: Tensor, pad: int, generator: torch.Generator, history: int = 1) -> Tensor:
    """Shift every image by up to `pad` pixels each way, its edge pixels repeated. DrQ, arXiv:2004.13649 section 3.1.

    Args:
        images: (B, height, width, C).
        pad: largest shift in pixels; all (2 · pad + 1)² shifts are equally likely.
        generator: the source of the offsets.
        history: so many images that follow each other share an offset; divides B.

    Returns:
        (B, height, width, C).

    Raises:
        ConfigError: `pad` is negative.
    """
    check(pad >= 0, "pad", pad, "must be at least 0")
    top, left = (_integers(images, 2 * pad + 1, generator, history) - pad for _ in range(2))
    return _windows(images, top, left, images.shape[1], images.shape[2])


def random_crop(images: Tensor, size: int, generator: torch.Generator, history: int = 1) -> Tensor:
    """Cut a square out of every image, each place equally likely: (B, height, width, C) -> (B, size, size, C).

    `history` images that follow each other are cut alike.

    Raises:
        ConfigError: `size` is not within the image.
    """
    height, width = _check_size(images, size)
    top = _integers(images, height - size + 1, generator, history)
    left = _integers(images, width - size + 1, generator, history)
    return _windows(images, top, left, size, size)


def center_crop(images: Tensor, size: int) -> Tensor:
    """Cut the middle out of every image: (B, height, width, C) -> (B, size, size, C), a view.

    An odd margin is split as torchvision splits it: half a pixel is rounded to the even number.

    Raises:
        ConfigError: `size` is not within the image.
    """
    height, width = _check_size(images, size)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images[:, top : top + size, left : left + size]


def _windows(images: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Return the windows at (top, left), each (B,): (B, height, width, C). Beyond the image its edge is repeated."""
    n, full_height, full_width, channels = images.shape
    device = images.device
    rows = (top[:, None] + torch.arange(height, device=device)).clamp(0, full_height - 1)  # (B, height)
    columns = (left[:, None] + torch.arange(width, device=device)).clamp(0, full_width - 1)  # (B, width)
    rows = rows + full_height * torch.arange(n, device=device)[:, None]  # rows of the whole batch, stacked
    pixels = full_width * rows[:, :, None] + columns[:, None, :]  # (B, height, width)
    return images.reshape(-1, channels).index_select(0, pixels.flatten()).view(n, height, width, channels)


def _integers(images: Tensor, n: int, generator: torch.Generator, history: int) -> Tensor:
    """Draw one integer in [0, n) per history of images, on the images' device: (B,)."""
    drawn = torch.randint(n, (len(images) // history,), generator=generator, device=generator.device)
    return drawn.to(images.device).repeat_interleave(history)


def _check_size(images: Tensor, size: int) -> tuple[int, int]:
    height, width = images.shape[1:3]
    check(1 <= size <= min(height, width), "size", size, f"must be from 1 to {min(height, width)}, the image's side")
    return height, width
