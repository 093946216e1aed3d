"""The first layer of patchwise attention's mapping as an operator: norm, ReLU and mixing of whole footprints.

On CUDA it runs the kernels of ``cuda/patchwise.cu``, which copy no footprint, elsewhere
:func:`kernels.reference.mix_patches`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels import checks, gradients, reference, runtime
from kernels.footprint import Footprint, output_side, sizes
from kernels.runtime import TYPES, Kernel

SOURCE = "patchwise.cu"
THREADS = 128  # of a block, and the most numbers it sums below; as in the source
OUTPUTS_AT_ONCE = {torch.float64: 3}
OUTPUTS_AT_ONCE_ELSE = 8
LARGEST_KERNEL = 7
CHANNELS_AT_ONCE = 4
PIXELS_AT_ONCE = 4096


class Maps(Footprint):
    """The sizes that are run-time arguments; as in the source."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("images", "inputs"))


def at_once(outputs: int, dtype: torch.dtype) -> int:
    """Outputs that a thread does: the largest divisor for which a block's sums fit the shared memory of every GPU."""
    most = OUTPUTS_AT_ONCE.get(dtype, OUTPUTS_AT_ONCE_ELSE)
    return max(count for count in range(1, most + 1) if outputs % count == 0)


def defines(outputs: int, kernel_size: int, dtype: torch.dtype) -> tuple[tuple[str, str], ...]:
    """The compile-time numbers of the kernels."""
    sizes = {
        "OUTPUTS": outputs,
        "AT_ONCE": at_once(outputs, dtype),
        "KERNEL": kernel_size,
        "VALUE": TYPES[dtype],
    }
    return tuple((name, str(value)) for name, value in sizes.items())


@torch.compiler.assume_constant_result
def runs(device: torch.device, kernel_size: int, dtype: torch.dtype) -> bool:
    """Whether :func:`mix_patches` runs a kernel (see :func:`kernels.runtime.runs`)."""
    lacking = None
    if dtype not in TYPES:
        lacking = f"{dtype} is not a type of the patchwise kernels"
    elif kernel_size > LARGEST_KERNEL:
        lacking = f"a footprint of side {kernel_size} has no patchwise kernel, at most {LARGEST_KERNEL} have"
    return runtime.runs(device, lacking)


@torch.library.custom_op("pairwise::mix_patches", mutates_args=())
def mix_patches(
    x: Tensor, scale: Tensor, shift: Tensor, mix: Tensor, kernel_size: int, stride: int, dilation: int
) -> Tensor:
    """See :func:`kernels.reference.mix_patches`; scale, shift and mix are float32, or finer as x."""
    return reference.mix_patches(x, scale, shift, mix, kernel_size, stride, dilation).contiguous()


@torch.library.custom_op("pairwise::mix_patches_gradients", mutates_args=())
def mix_patches_gradients(
    of_h: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mix: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, scale, shift and mix."""
    return gradients.mix_patches(of_h, x, scale, shift, mix, kernel_size, stride, dilation)


@mix_patches.register_fake
def _(x, scale, shift, mix, kernel_size, stride, dilation):  # type: ignore[no-untyped-def]
    sides = (output_side(side, kernel_size, stride, 0, dilation) for side in x.shape[2:])
    return x.new_empty((x.shape[0], mix.shape[0], *sides))


@mix_patches_gradients.register_fake
def _(of_h, *inputs):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:4])


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, kernel_size, stride, dilation = inputs
    ctx.save_for_backward(*tensors)
    ctx.window = (kernel_size, stride, dilation)


def _backward(ctx, of_h):  # type: ignore[no-untyped-def]
    return *mix_patches_gradients(of_h, *ctx.saved_tensors, *ctx.window), None, None, None


mix_patches.register_autograd(_backward, setup_context=_keep)


@mix_patches.register_kernel("cuda")
def mix_patches_by_kernel(
    x: Tensor, scale: Tensor, shift: Tensor, mix: Tensor, kernel_size: int, stride: int, dilation: int
) -> Tensor:
    """:func:`mix_patches` by the kernel."""
    checks.check_patches(x, scale, shift, mix, kernel_size, stride, dilation)
    maps = _maps(x, kernel_size, stride, dilation)
    h = x.new_empty((x.shape[0], mix.shape[0], maps.height, maps.width))
    blocks = _blocks(h[:, 0].numel(), THREADS) * (mix.shape[0] // at_once(mix.shape[0], x.dtype))
    last = mix.permute(1, 2, 0).contiguous()
    _launch(
        "mix_patches",
        blocks,
        mix,
        kernel_size,
        x.contiguous(),
        scale.contiguous(),
        shift.contiguous(),
        last,
        h,
        maps,
    )
    return h


@mix_patches_gradients.register_kernel("cuda")
def gradients_by_kernels(
    of_h: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mix: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`mix_patches_gradients` by the kernels."""
    of_h, x, scale, shift = (t.contiguous() for t in (of_h, x, scale, shift))
    maps, (outputs, inputs, _) = _maps(x, kernel_size, stride, dilation), mix.shape
    given = (of_h, x, scale, shift, mix.permute(1, 2, 0).contiguous())
    of_x = torch.empty_like(x)
    blocks = _blocks(x[:, 0].numel(), THREADS) * _blocks(inputs, CHANNELS_AT_ONCE)
    _launch("gradient_map", blocks, mix, kernel_size, *given, of_x, maps)
    chunks, parts = _blocks(of_h[:, 0].numel(), PIXELS_AT_ONCE), outputs // at_once(outputs, x.dtype)
    of_mix = scale.new_empty((chunks, inputs, kernel_size**2, outputs))
    of_norm = scale.new_empty((chunks, parts, 2, inputs, kernel_size**2))
    blocks = chunks * parts * kernel_size * inputs
    pixels = ctypes.c_int(PIXELS_AT_ONCE)
    _launch("gradient_parameters", blocks, mix, kernel_size, *given, of_mix, of_norm, maps, pixels)
    of_scale, of_shift = (of_norm[:, :, which].sum((0, 1)) for which in (0, 1))
    return of_x, of_scale, of_shift, of_mix.sum(0).permute(2, 0, 1).contiguous()


def _blocks(count: int, at_once: int) -> int:
    return -(-count // at_once)


def _maps(x: Tensor, kernel_size: int, stride: int, dilation: int) -> Maps:
    return Maps(*sizes(x.shape[2:], kernel_size, stride, dilation), *x.shape[:2])


def _launch(
    name: str, blocks: int, mix: Tensor, kernel_size: int, x: Tensor, *arguments: runtime.Argument
) -> None:
    kernel = Kernel(SOURCE, name, defines(mix.shape[0], kernel_size, x.dtype))
    runtime.launch(kernel, blocks, (THREADS, 1, 1), 0, x, *arguments)
