"""Subtraction and aggregation over footprints as operators, differentiable, with the reference's arguments and results.

On CUDA they run the kernels of ``cuda/san.cu``, elsewhere :mod:`kernels.reference`. Padding is left to torch, whose
gradient of it is right for both modes; the operators ``pairwise::subtraction2`` and ``pairwise::aggregation`` take
padded maps.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels import gradients, reference, runtime
from kernels.checks import check_alike, check_footprint, check_weight
from kernels.footprint import Footprint, output_side, same_padding, sizes
from kernels.runtime import TYPES, Kernel

SOURCE = "san.cu"
THREADS = 256


class Maps(Footprint):
    """The sizes, all run-time arguments; as in the source."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("images", "channels", "weights"))


@torch.compiler.assume_constant_result
def runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the operators run a kernel there (see :func:`kernels.runtime.runs`)."""
    return runtime.runs(device, None if dtype in TYPES else f"{dtype} is not a type of the SAN kernels")


def subtraction(
    x: Tensor,
    kernel_size: int,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    pad_mode: str = "reflect",
) -> Tensor:
    """See :func:`kernels.reference.subtraction`."""
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
    """See :func:`kernels.reference.subtraction2`."""
    if not runs(a.device, a.dtype):
        return reference.subtraction2(a, b, kernel_size, stride, padding, dilation, pad_mode)
    check_footprint("a", a, kernel_size, stride, padding, dilation, pad_mode)
    check_alike("a", a, "b", b)
    if a.shape != b.shape:
        raise ValueError(f"b has shape {tuple(b.shape)}, expected {tuple(a.shape)}, the shape of a")
    padding = same_padding(kernel_size, dilation) if padding is None else padding
    a, b = (reference.pad(x, padding, pad_mode) for x in (a, b))
    return padded_subtraction2(a, b, kernel_size, stride, dilation)


def aggregation(
    value: Tensor,
    weight: Tensor,
    kernel_size: int,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    pad_mode: str = "reflect",
) -> Tensor:
    """See :func:`kernels.reference.aggregation`."""
    if not runs(value.device, value.dtype):
        return reference.aggregation(value, weight, kernel_size, stride, padding, dilation, pad_mode)
    check_footprint("value", value, kernel_size, stride, padding, dilation, pad_mode)
    padding = same_padding(kernel_size, dilation) if padding is None else padding
    return padded_aggregation(reference.pad(value, padding, pad_mode), weight, kernel_size, stride, dilation)


@torch.library.custom_op("pairwise::subtraction2", mutates_args=())
def padded_subtraction2(a: Tensor, b: Tensor, kernel_size: int, stride: int, dilation: int) -> Tensor:
    """:func:`subtraction2` of padded maps (N, C, H, W) → (N, C, K, P)."""
    return reference.subtraction2(a, b, kernel_size, stride, 0, dilation).contiguous()


@torch.library.custom_op("pairwise::subtraction2_gradients", mutates_args=())
def padded_subtraction2_gradients(
    of_y: Tensor, height: int, width: int, kernel_size: int, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """The gradients of both padded maps, (N, C, height, width) each."""
    return gradients.subtraction2(of_y, height, width, kernel_size, stride, dilation)


@torch.library.custom_op("pairwise::aggregation", mutates_args=())
def padded_aggregation(value: Tensor, weight: Tensor, kernel_size: int, stride: int, dilation: int) -> Tensor:
    """:func:`aggregation` of a padded map (N, Cv, H, W) with weights (N, Cw, K, P) → (N, Cv, H', W')."""
    return reference.aggregation(value, weight, kernel_size, stride, 0, dilation).contiguous()


@torch.library.custom_op("pairwise::aggregation_gradients", mutates_args=())
def padded_aggregation_gradients(
    of_y: Tensor, value: Tensor, weight: Tensor, kernel_size: int, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """The gradients of the padded map and of the weights."""
    return gradients.aggregation(of_y, value, weight, kernel_size, stride, dilation)


@padded_subtraction2.register_fake
def _(a, b, kernel_size, stride, dilation):  # type: ignore[no-untyped-def]
    height, width = (output_side(side, kernel_size, stride, 0, dilation) for side in a.shape[2:])
    return a.new_empty((*a.shape[:2], kernel_size**2, height * width))


@padded_subtraction2_gradients.register_fake
def _(of_y, height, width, kernel_size, stride, dilation):  # type: ignore[no-untyped-def]
    return tuple(of_y.new_empty((*of_y.shape[:2], height, width)) for _ in range(2))


@padded_aggregation.register_fake
def _(value, weight, kernel_size, stride, dilation):  # type: ignore[no-untyped-def]
    sides = (output_side(side, kernel_size, stride, 0, dilation) for side in value.shape[2:])
    return value.new_empty((*value.shape[:2], *sides))


@padded_aggregation_gradients.register_fake
def _(of_y, value, weight, kernel_size, stride, dilation):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (value, weight))


def _keep_subtraction2(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    a, _, *ctx.window = inputs
    ctx.sides = a.shape[2:]


def _backward_subtraction2(ctx, of_y):  # type: ignore[no-untyped-def]
    return *padded_subtraction2_gradients(of_y, *ctx.sides, *ctx.window), None, None, None


def _keep_aggregation(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    value, weight, *ctx.window = inputs
    ctx.save_for_backward(value, weight)


def _backward_aggregation(ctx, of_y):  # type: ignore[no-untyped-def]
    return *padded_aggregation_gradients(of_y, *ctx.saved_tensors, *ctx.window), None, None, None


padded_subtraction2.register_autograd(_backward_subtraction2, setup_context=_keep_subtraction2)
padded_aggregation.register_autograd(_backward_aggregation, setup_context=_keep_aggregation)


@padded_subtraction2.register_kernel("cuda")
def subtraction2_by_kernel(a: Tensor, b: Tensor, kernel_size: int, stride: int, dilation: int) -> Tensor:
    """:func:`padded_subtraction2` by the kernel."""
    maps = _maps(a, a.shape[1], kernel_size, stride, dilation)
    y = a.new_empty((*a.shape[:2], kernel_size**2, maps.height * maps.width))
    _launch("subtract", y[:, :, 0].numel(), a.contiguous(), b.contiguous(), y, maps)
    return y


@padded_subtraction2_gradients.register_kernel("cuda")
def subtraction2_gradients_by_kernel(
    of_y: Tensor, height: int, width: int, kernel_size: int, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """:func:`padded_subtraction2_gradients` by the kernel."""
    of_a, of_b = (of_y.new_empty((*of_y.shape[:2], height, width)) for _ in range(2))
    maps = _maps(of_a, of_a.shape[1], kernel_size, stride, dilation)
    _launch("subtract_gradient", of_a.numel(), of_y.contiguous(), of_a, of_b, maps)
    return of_a, of_b


@padded_aggregation.register_kernel("cuda")
def aggregation_by_kernel(
    value: Tensor, weight: Tensor, kernel_size: int, stride: int, dilation: int
) -> Tensor:
    """:func:`padded_aggregation` by the kernel."""
    check_weight(value, weight, kernel_size, stride, 0, dilation)
    maps = _maps(value, weight.shape[1], kernel_size, stride, dilation)
    y = value.new_empty((*value.shape[:2], maps.height, maps.width))
    _launch("aggregate", weight[:, :, 0].numel(), value.contiguous(), weight.contiguous(), y, maps)
    return y


@padded_aggregation_gradients.register_kernel("cuda")
def aggregation_gradients_by_kernel(
    of_y: Tensor, value: Tensor, weight: Tensor, kernel_size: int, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """:func:`padded_aggregation_gradients` by the kernels."""
    of_y, value, weight = of_y.contiguous(), value.contiguous(), weight.contiguous()
    of_value, of_weight = torch.empty_like(value), torch.empty_like(weight)
    maps = _maps(value, weight.shape[1], kernel_size, stride, dilation)
    _launch("aggregate_gradient_value", value.numel(), of_y, weight, of_value, maps)
    _launch("aggregate_gradient_weight", weight.numel(), of_y, value, of_weight, maps)
    return of_value, of_weight


def _maps(padded: Tensor, weights: int, kernel_size: int, stride: int, dilation: int) -> Maps:
    images, channels, *sides = padded.shape
    return Maps(*sizes(sides, kernel_size, stride, dilation), images, channels, weights)


def _launch(name: str, threads: int, *arguments: Tensor | Maps) -> None:
    first = arguments[0]
    assert isinstance(first, Tensor)
    kernel = Kernel(SOURCE, name, (("VALUE", TYPES[first.dtype]),))
    runtime.launch(kernel, -(-threads // THREADS), (THREADS, 1, 1), 0, *arguments)
