"""Encoded images, read and written with Pillow."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from dprl.data.source import CHANNELS, Pixels
from dprl.errors import DatasetError, MissingDependencyError


def decode(encoded: bytes, where: str) -> Pixels:
    """Return (height, width, 1 or 3) of an encoded image.

    Raises:
        DatasetError: it is none, or of another kind.
    """
    try:
        opened = require_pillow().open(io.BytesIO(encoded))
        image = np.asarray(opened.convert("RGB") if opened.mode == "P" else opened)  # else the palette's indices
    except MissingDependencyError:
        raise
    except Exception as error:  # Pillow raises almost any kind
        raise DatasetError(f"{where}: the image cannot be decoded: {error}") from error
    image = image[..., None] if image.ndim == 2 else image
    if image.dtype != np.uint8 or image.shape[2] not in CHANNELS:
        raise DatasetError(f"{where}: the image is {image.dtype} {image.shape}; it must be uint8 with 1 or 3 channels")
    return image


def stack(images: list[Pixels], where: str) -> Pixels:
    """Return images of one size as an array.

    Raises:
        DatasetError: their sizes differ.
    """
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise DatasetError(f"{where}: images differ in shape: {sorted(shapes)}")
    return np.stack(images)


def png(image: Pixels) -> bytes:
    """Encode (height, width, 1 or 3) without loss."""
    stream = io.BytesIO()
    require_pillow().fromarray(image[..., 0] if image.shape[2] == 1 else image).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def require_pillow() -> Any:
    """Return Pillow's Image module, or raise MissingDependencyError."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("pillow", "plots", "reading and writing images") from error
    return Image
