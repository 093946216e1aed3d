"""Mean and variance of the differences between pixels and those under their footprints, as an operator.

On CUDA it runs the kernels of ``cuda/differences.cu``, elsewhere :func:`kernels.reference.difference_moments`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels import gradients, reference, runtime
from kernels.footprint import Footprint, sizes
from kernels.runtime import TYPES, Kernel

SOURCE = "differences.cu"
THREADS = 128  # of a block; as in the source
PIXELS_AT_ONCE = 1024


class Maps(Footprint):
    """The sizes that are run-time arguments; as in the source."""

    _fields_ = (("channels", ctypes.c_int), ("pixels_at_once", ctypes.c_int))


@torch.compiler.assume_constant_result
def runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel runs there (see :func:`kernels.runtime.runs`)."""
    lacking = (
        None
        if dtype in (torch.float32, torch.float64)
        else f"{dtype} is not a type of the difference kernels"
    )
    return runtime.runs(device, lacking)


def difference_moments(
    centre: Tensor, around: Tensor, kernel_size: int, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """See :func:`kernels.reference.difference_moments`."""
    centre, around = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (centre, around))
    if not runs(centre.device, centre.dtype):
        return reference.difference_moments(centre, around, kernel_size, stride, dilation)
    return moments(centre, around, kernel_size, stride, dilation)


@torch.library.custom_op("pairwise::difference_moments", mutates_args=())
def moments(
    centre: Tensor, around: Tensor, kernel_size: int, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """:func:`difference_moments`."""
    return reference.difference_moments(centre, around, kernel_size, stride, dilation)


@torch.library.custom_op("pairwise::difference_moments_gradients", mutates_args=())
def moments_gradients(
    of_mean: Tensor,
    of_variance: Tensor,
    mean: Tensor,
    centre: Tensor,
    around: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of both maps."""
    window = (kernel_size, stride, dilation)
    return gradients.difference_moments(of_mean, of_variance, mean, centre, around, *window)


@moments.register_fake
def _(centre, around, kernel_size, stride, dilation):  # type: ignore[no-untyped-def]
    return tuple(centre.new_empty(centre.shape[1], dtype=torch.float64) for _ in range(2))


@moments_gradients.register_fake
def _(of_mean, of_variance, mean, centre, around, kernel_size, stride, dilation):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (centre, around))


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    centre, around, *window = inputs
    ctx.save_for_backward(output[0], centre, around)
    ctx.window = window


def _backward(ctx, of_mean, of_variance):  # type: ignore[no-untyped-def]
    gradients = moments_gradients(of_mean, of_variance, *ctx.saved_tensors, *ctx.window)
    return *gradients, None, None, None


moments.register_autograd(_backward, setup_context=_keep)


@moments.register_kernel("cuda")
def moments_by_kernel(
    centre: Tensor, around: Tensor, kernel_size: int, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """:func:`moments` by the kernel."""
    centre, around = centre.contiguous(), around.contiguous()
    images, channels, *sides = centre.shape
    maps = _maps(around, kernel_size, stride, dilation)
    parts = -(-sides[0] * sides[1] // PIXELS_AT_ONCE)
    # Sums are of what is left of a difference after one of them, so that squares lose nothing.
    pivot = (centre[0, :, 0, 0] - around[0, :, 0, 0]).contiguous()
    partial = centre.new_empty((images, channels, parts, 2), dtype=torch.float64)
    _launch("difference_sums", images * channels * parts, centre, around, pivot, partial, maps)
    count = images * sides[0] * sides[1] * kernel_size**2
    shifted_mean, square = partial.sum((0, 2)).unbind(1)
    shifted_mean, square = shifted_mean / count, square / count
    return pivot + shifted_mean, square - shifted_mean.square()


@moments_gradients.register_kernel("cuda")
def gradients_by_kernel(
    of_mean: Tensor,
    of_variance: Tensor,
    mean: Tensor,
    centre: Tensor,
    around: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """:func:`moments_gradients` by the kernels."""
    centre, around = centre.contiguous(), around.contiguous()
    maps, images = _maps(around, kernel_size, stride, dilation), ctypes.c_int(around.shape[0])
    count = centre[:, 0].numel() * kernel_size**2
    by_channel = tuple(x.to(centre.dtype) for x in (mean, of_mean / count, 2 * of_variance / count))
    of_centre, of_around = torch.empty_like(centre), torch.empty_like(around)
    for name, result in (("gradient_centre", of_centre), ("gradient_around", of_around)):
        _launch(name, -(-result.numel() // THREADS), centre, around, *by_channel, result, maps, images)
    return of_centre, of_around


def _maps(around: Tensor, kernel_size: int, stride: int, dilation: int) -> Maps:
    return Maps(*sizes(around.shape[2:], kernel_size, stride, dilation), around.shape[1], PIXELS_AT_ONCE)


def _launch(
    name: str, blocks: int, centre: Tensor, *arguments: Tensor | ctypes.Structure | ctypes.c_int
) -> None:
    kernel = Kernel(SOURCE, name, (("REAL", TYPES[centre.dtype]),))
    runtime.launch(kernel, blocks, (THREADS, 1, 1), 0, centre, *arguments)
