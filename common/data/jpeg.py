"""Which JPEG files any decoder makes the same picture of, told from their markers alone."""

from __future__ import annotations

import contextlib
import re

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from common.data.decode import MAX_PIXELS

_START, _END, _SCAN, _APP1, _APP2, _APP14 = 0xD8, 0xD9, 0xDA, 0xE1, 0xE2, 0xEE
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_FRAMES = (_BASELINE, _EXTENDED, _PROGRESSIVE)
_TABLES_AND_WORDS = (0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_ORIENTATION = 0x0112


def plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of a whole, upright JPEG of 8-bit grey or YCbCr; None of everything else.

    Only what is between the segments, the compressed pixels, is not looked at. So a decoder that stops early, having
    what it needs, does not miss what another one stumbles over.
    """
    frame: tuple[int, bytes] | None = None
    scans, place = 0, 2
    if data[:2] != bytes([0xFF, _START]):
        return None
    while data[place : place + 1] == b"\xff" and (marker := data[place + 1 : place + 2]):
        if marker[0] == _END:
            whole = frame and (scans == 1 or (scans and frame[0] == _PROGRESSIVE)) and place + 2 == len(data)
            return _shape(frame[1]) if frame and whole else None
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        body = data[place + 4 : place + 2 + length]
        known = marker[0] in (*_FRAMES, _SCAN, *_TABLES_AND_WORDS)
        if not known or length < 2 or not _ordinary(marker[0], body):
            return None
        place += 2 + length
        if marker[0] in _FRAMES:
            if frame:
                return None
            frame = marker[0], body
        if marker[0] == _SCAN:
            scans += 1
            found = _AFTER_SCAN.search(data, place)
            if not found:
                return None
            place = found.start()
    return None


def decode_plain(data: bytes) -> Tensor | None:
    """(3, height, width) uint8 of a plain JPEG: Pillow's pixels, from the same library, without its copies.

    None of everything else, and of what cannot be decoded: Pillow says what is wrong with it.
    """
    if plain_jpeg(data) is None:
        return None
    with contextlib.suppress(RuntimeError):
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return None


def _ordinary(marker: int, body: bytes) -> bool:
    """Whether an application's segment leaves the picture as it is."""
    if marker == _APP14 and body.startswith(b"Adobe"):
        return body[11:12] == b"\x01"  # YCbCr
    if marker == _APP1 and body.startswith(b"Exif"):
        with contextlib.suppress(Exception):
            exif = Image.Exif()
            exif.load(body)
            return exif.get(_ORIENTATION, 1) == 1
        return False
    several = marker == _APP2 and body.startswith(b"MPF")
    turned = marker == _APP1 and b"Orientation" in body  # XMP, which Pillow reads too
    return not several and not turned


def _shape(frame: bytes) -> tuple[int, int] | None:
    """Width and height, if the frame is 8-bit grey or YCbCr."""
    height, width = (int.from_bytes(frame[at : at + 2], "big") for at in (1, 3))
    components = [frame[at] for at in range(6, len(frame), 3)]
    known = components in ([0], [1], [0, 1, 2], [1, 2, 3]) and frame[:1] == b"\x08"
    return (width, height) if known and 0 < width * height <= MAX_PIXELS else None
