"""The self-attention operators as the paper writes them: slow, plain, and the judge of everything faster.

Zhao, Jia, Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020, section 3.

All of them slide a *footprint* of K = kernel_size² positions over a map, enumerated row by row. With
padding p, stride s and dilation d, footprint position (u, v) of the output pixel (h, w) is the map's pixel
(s·h + d·u − p, s·w + d·v − p); P = H'·W' counts the output pixels, H' = (H + 2p − d·(kernel_size − 1) − 1) // s + 1.
Outside the map lies either its mirror image (``reflect``; the border pixel is not repeated, and a footprint
larger than the map is reflected as often as it takes) or nothing but zeros (``zero``).

Every dtype and device, any order of derivatives. A compiled kernel must give the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PAD_MODES = ("reflect", "zero")


def same_padding(kernel_size: int, dilation: int = 1) -> int:
    """The padding under which stride 1 keeps the map's size (for odd ``kernel_size``)."""
    return (dilation * (kernel_size - 1) + 1) // 2


def output_side(side: int, kernel_size: int, stride: int, padding: int, dilation: int) -> int:
    """Number of footprints that fit along a side of ``side`` pixels."""
    return (side + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1


def subtraction(
    x: Tensor,
    kernel_size: int,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    pad_mode: str = "reflect",
) -> Tensor:
    """A map's value at the footprint's centre minus its value at each footprint position.

    Args:
        x: (N, C, H, W).
        kernel_size, stride, dilation: in pixels, at least 1.
        padding: pixels on each side, by default :func:`same_padding`.
        pad_mode: ``reflect`` or ``zero``.

    Returns:
        (N, C, K, P).

    Raises:
        ValueError: a shape, size or mode that makes no sense.
    """
    return subtraction2(x, x, kernel_size, stride, padding, dilation, pad_mode)


def subtraction2(
    a: Tensor,
    b: Tensor,
    kernel_size: int,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    pad_mode: str = "reflect",
) -> Tensor:
    """``a`` at the footprint's centre, position ((k−1)//2, (k−1)//2), minus ``b`` at each footprint position.

    Args:
        a, b: (N, C, H, W), of one dtype and device.

    Returns:
        (N, C, K, P); the other arguments and errors are those of :func:`subtraction`.
    """
    check_footprint("a", a, kernel_size, stride, padding, dilation, pad_mode)
    check_alike("a", a, "b", b)
    if a.shape != b.shape:
        raise ValueError(f"b has shape {tuple(b.shape)}, expected {tuple(a.shape)}, the shape of a")
    centre = (kernel_size - 1) // 2 * (kernel_size + 1)
    at_centre = footprint(a, kernel_size, stride, padding, dilation, pad_mode)[:, :, centre : centre + 1]
    return (at_centre - footprint(b, kernel_size, stride, padding, dilation, pad_mode)).flatten(3)


def aggregation(
    value: Tensor,
    weight: Tensor,
    kernel_size: int,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    pad_mode: str = "reflect",
) -> Tensor:
    """Weighted sum over the footprint; channel c of ``value`` uses weight channel c mod Cw.

    Args:
        value: (N, Cv, H, W).
        weight: (N, Cw, K, P), Cv a multiple of Cw, of the dtype and device of ``value``.

    Returns:
        (N, Cv, H', W'); the other arguments and errors are those of :func:`subtraction`.
    """
    check_footprint("value", value, kernel_size, stride, padding, dilation, pad_mode)
    check_alike("value", value, "weight", weight)
    neighbours = footprint(value, kernel_size, stride, padding, dilation, pad_mode)
    channels, positions, height, width = neighbours.shape[1:]
    expected = (value.shape[0], positions, height * width)
    if weight.dim() != 4 or (weight.shape[0], *weight.shape[2:]) != expected:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected (N, Cw, K, P) with N, K, P = {expected}"
        )
    weight_channels = weight.shape[1]
    if weight_channels < 1 or channels % weight_channels:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: its {weight_channels} channels do not divide "
            f"the {channels} of value"
        )
    grouped = neighbours.unflatten(1, (channels // weight_channels, weight_channels))
    by_pixel = weight.unflatten(3, (height, width)).unsqueeze(1)
    return (grouped * by_pixel).sum(3).flatten(1, 2)


def footprint(
    x: Tensor,
    kernel_size: int,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    pad_mode: str = "reflect",
) -> Tensor:
    """The values under each footprint, (N, C, H, W) → (N, C, K, H', W')."""
    padding = same_padding(kernel_size, dilation) if padding is None else padding
    windows = pad(x, padding, pad_mode)
    for dim in (2, 3):
        windows = windows.unfold(dim, dilation * (kernel_size - 1) + 1, stride)[..., ::dilation]
    return windows.permute(0, 1, 4, 5, 2, 3).flatten(2, 3)


def pad(x: Tensor, padding: int, pad_mode: str = "reflect") -> Tensor:
    """(N, C, H, W) → (N, C, H + 2·padding, W + 2·padding)."""
    if pad_mode == "zero":
        return F.pad(x, (padding,) * 4)
    rows, columns = (reflected(side, padding, x.device) for side in x.shape[2:])
    return x.index_select(2, rows).index_select(3, columns)


def reflected(side: int, padding: int, device: torch.device) -> Tensor:
    """The pixel behind each position −padding … side + padding − 1: a triangular wave of period 2·(side − 1)."""
    position, period = torch.arange(-padding, side + padding, device=device), 2 * (side - 1)
    if period == 0:
        return torch.zeros_like(position)
    position = position % period
    return torch.minimum(position, period - position)


def check_footprint(
    name: str, x: Tensor, kernel_size: int, stride: int, padding: int | None, dilation: int, pad_mode: str
) -> None:
    """Raise ValueError unless the footprint fits at least once into the padded map ``x``, called ``name``."""
    if x.dim() != 4 or x.shape[1] < 1 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (N, C, H, W) with C, H, W at least 1")
    for argument, size in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
        if size < 1:
            raise ValueError(f"{argument} is {size}, expected at least 1")
    if padding is not None and padding < 0:
        raise ValueError(f"padding is {padding}, expected at least 0")
    if pad_mode not in PAD_MODES:
        raise ValueError(f"pad_mode is {pad_mode!r}, expected one of {PAD_MODES}")
    padding = same_padding(kernel_size, dilation) if padding is None else padding
    if min(output_side(side, kernel_size, stride, padding, dilation) for side in x.shape[2:]) < 1:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: too small for kernel_size {kernel_size}, "
            f"dilation {dilation}, padding {padding}"
        )


def check_alike(first_name: str, first: Tensor, name: str, x: Tensor) -> None:
    """Raise ValueError unless both tensors have one dtype and device."""
    if x.dtype != first.dtype or x.device != first.device:
        raise ValueError(
            f"{name}, shape {tuple(x.shape)}, is {x.dtype} on {x.device}, "
            f"expected {first.dtype} on {first.device} as {first_name}"
        )
