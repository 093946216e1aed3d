"""What is made of an image: nothing, or what MXNet's im2rec makes of it."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from common.data.decode import check_signature, decode_rgb
from common.data.prepare.settings import Settings


def encode(data: bytes, where: str, settings: Settings) -> bytes:
    """The bytes to store: ``data`` itself, or decoded, resized and compressed again as JPEG.

    Kept bytes are only looked at for an image's signature, unless ``settings.check`` asks to decode them.

    Raises:
        BadSample: not an image, or it cannot be decoded.
    """
    if not settings.reencodes:
        if settings.check:
            decode_rgb(data, where)
        else:
            check_signature(data, where)
        return data
    image = decode_rgb(data, where)
    if settings.resize:
        image = resize_shorter(image, settings.resize)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=settings.jpeg_quality)
    return file.getvalue()


def resize_shorter(image: Image.Image, side: int) -> Image.Image:
    """Resize an RGB image so that its shorter side is ``side``, as im2rec does.

    As there, smaller images are enlarged, the longer side is rounded down, and the interpolation is bilinear between
    the four nearest pixels also where it shrinks, without a filter against aliasing (OpenCV's ``INTER_LINEAR``).
    """
    shorter = min(image.size)
    if shorter == side:
        return image
    width, height = (length * side // shorter for length in image.size)
    if side > shorter:
        return image.resize((width, height), Image.Resampling.BILINEAR)  # the same, and faster
    pixels = np.asarray(image, np.float32)
    rows = _interpolate(pixels.reshape(image.height, -1), height).reshape(height, image.width, 3)
    columns = _interpolate(rows.swapaxes(0, 1), width).swapaxes(0, 1)
    return Image.fromarray((columns + 0.5).astype(np.uint8))


def _interpolate(values: np.ndarray, length: int) -> np.ndarray:
    """Linear interpolation of the first axis at ``length`` equal steps, pixels' centres at halves."""
    size = len(values)
    places = ((np.arange(length) + 0.5) * (size / length) - 0.5).clip(0, size - 1)
    lower = places.astype(np.int64)
    weight = (places - lower).astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
    result = values[lower]
    result += (values[np.minimum(lower + 1, size - 1)] - result) * weight
    return result
