"""Crops of whole clips, (…, H, W) tensors: of all frames the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

OffsetRule = Literal["published", "common"]


class Box(NamedTuple):
    """A part of a frame, pixels."""

    top: int
    left: int
    height: int
    width: int


# In quarters of the room that a crop has: corners and centre, edges, quarters.
_PLACES = [
    (0, 0),
    (0, 4),
    (4, 0),
    (4, 4),
    (2, 2),
    (0, 2),
    (2, 4),
    (4, 2),
    (2, 0),
    (1, 1),
    (1, 3),
    (3, 1),
    (3, 3),
]


def multi_scale_box(height: int, width: int, scales: Sequence[float]) -> Box:
    """Draw a crop from Python's ``random``, as TSN trains (Wang et al., ECCV 2016).

    Height and width are ``scales`` of the shorter side, at most one apart in that list; the place is one of 13.
    """
    sides = [int(min(height, width) * scale) for scale in scales]
    steps = range(len(sides))
    pairs = [(sides[i], sides[j]) for i in steps for j in steps if abs(i - j) <= 1]
    crop_height, crop_width = random.choice(pairs)
    down, right = random.choice(_PLACES)
    top, left = (height - crop_height) // 4 * down, (width - crop_width) // 4 * right
    return Box(top, left, crop_height, crop_width)


def cut(frames: Tensor, box: Box) -> Tensor:
    """The box of frames (…, H, W), a view."""
    top, left, height, width = box
    return frames[..., top : top + height, left : left + width]


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Frames (n, 3, H, W) uint8 → (n, 3, height, width), bilinear with antialiasing, as Pillow resizes."""
    if frames.shape[-2:] == (height, width):
        return frames
    return F.interpolate(frames, (height, width), mode="bilinear", antialias=True)


def resize_shorter(frames: Tensor, side: int) -> Tensor:
    """Frames (n, 3, H, W) uint8 with the shorter side made ``side`` pixels long, the other one rounded down."""
    height, width = frames.shape[-2:]
    short = min(height, width)
    return resize(frames, height * side // short, width * side // short)


def centre_box(height: int, width: int, side: int) -> Box:
    """The square in the middle."""
    return Box((height - side) // 2, (width - side) // 2, side, side)


def three_boxes(height: int, width: int, rule: OffsetRule = "published") -> list[Box]:
    """Three squares as high as the shorter side, along the longer one; of a square frame itself.

    Args:
        rule: ``published`` puts them at 0, ⅓ and ⅔ of (room + 1), rounded; ``common`` at 0, ½ and 1 of the room.
    """
    side, room = min(height, width), abs(height - width)
    if room == 0:
        return [Box(0, 0, side, side)]
    offsets = [round(k * (room + 1) / 3) for k in range(3)] if rule == "published" else [0, room // 2, room]
    return [Box(k, 0, side, side) if height > width else Box(0, k, side, side) for k in offsets]


def five_boxes(height: int, width: int, side: int) -> list[Box]:
    """Squares in the four corners and the middle."""
    bottom, right = height - side, width - side
    corners = [Box(top, left, side, side) for top in (0, bottom) for left in (0, right)]
    return [*corners, centre_box(height, width, side)]
