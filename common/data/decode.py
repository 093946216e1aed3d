"""Encoded bytes to an upright 8-bit RGB image, or a typed refusal."""

from __future__ import annotations

import contextlib
import io
import re

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.data.source import BadSample

MAX_PIXELS = 89_478_485
"""Larger images are refused undecoded: a file of kilobytes can claim gigabytes. Pillow's own limit."""

# No others: Pillow also knows formats that start other programs (EPS) or read other files.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*")


def decode_rgb(data: bytes, where: str, min_side: int | None = None) -> Image.Image:
    """Decode a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM, whatever its file is called.

    What is not 8-bit RGB becomes it: grey is repeated; CMYK is converted without a colour profile, as Pillow
    does; a palette is looked up; alpha is dropped, not blended (torchvision's ``convert("RGB")``); of 16 bits
    the upper 8 are kept; of an animation the first frame. An image is turned upright by its EXIF orientation;
    an EXIF block that cannot be read is ignored.

    Args:
        data: the file's bytes.
        where: the sample's place, for the message.
        min_side: decode a JPEG at 1/2, 1/4 or 1/8 of its size, if its shorter side stays at least this long.
            Faster, and not the same pixels as decoding and resizing.

    Raises:
        BadSample: ``not an image``, ``truncated``, ``too large``, ``wrong channels`` or ``unreadable``.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadSample("too large", where, f"{width} × {height} pixels, the limit is {MAX_PIXELS}")
        if min_side is not None:
            image.draft(None, (min_side, min_side))
        image.load()
        _turn_upright(image)
        return _rgb(image, where)
    except BadSample:
        raise
    except UnidentifiedImageError:
        reason = "truncated" if data.startswith(_SIGNATURES) or not data else "not an image"
        raise BadSample(reason, where, f"{len(data)} bytes that begin with {data[:8]!r}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("too large", where, str(error)) from None
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        detail = " ".join(str(error).split()) or type(error).__name__
        cut = isinstance(error, EOFError) or "truncated" in detail.lower()
        raise BadSample("truncated" if cut else "unreadable", where, detail) from None


def check_signature(data: bytes, where: str) -> None:
    """Raise :class:`BadSample` for bytes that do not begin like an image; nothing is decoded."""
    if not data.startswith(_SIGNATURES) and not re.match(rb"P[1-6]\s", data):
        reason = "not an image" if data else "truncated"
        raise BadSample(reason, where, f"{len(data)} bytes that begin with {data[:8]!r}")


def _turn_upright(image: Image.Image) -> None:
    # A damaged EXIF block says nothing about the picture.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return Image.fromarray(_upper_byte(np.asarray(image))).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow's own advice; it warns otherwise
    try:
        if image.mode == "F":
            raise ValueError("floating-point values have no defined range")
        return image.convert("RGB")
    except ValueError as error:
        raise BadSample("wrong channels", where, f"mode {image.mode}: {error}") from None


def _upper_byte(values: np.ndarray) -> np.ndarray:
    return (values.clip(0, 0xFFFF).astype(np.uint32) >> 8).astype(np.uint8)
