"""The sizes of a footprint on a padded map, as the CUDA sources take them: all run-time arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar


class Footprint(ctypes.Structure):
    """As in ``cuda/footprint.cuh``; a source's own sizes come behind."""

    _fields_: ClassVar[Sequence[Any]] = [
        (name, ctypes.c_int)
        for name in ("height", "width", "padded_height", "padded_width", "kernel", "stride", "dilation")
    ]


def sizes(padded: Sequence[int], kernel_size: int, stride: int, dilation: int) -> tuple[int, ...]:
    """The fields of :class:`Footprint` for a padded map of height and width ``padded``."""
    output = (output_side(side, kernel_size, stride, 0, dilation) for side in padded)
    return *output, *padded, kernel_size, stride, dilation


def same_padding(kernel_size: int, dilation: int = 1) -> int:
    """The padding under which stride 1 keeps the map's size (for odd ``kernel_size``)."""
    return (dilation * (kernel_size - 1) + 1) // 2


def output_side(side: int, kernel_size: int, stride: int, padding: int, dilation: int) -> int:
    """Number of footprints that fit along a side of ``side`` pixels."""
    return (side + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1
