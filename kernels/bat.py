"""The bilinear attentional transform as an operator: P · x · Q in one pass over x, forward and backward.

On CUDA it runs the kernels of ``cuda/bat.cu``, on maps that lie channels first or last or are a clip's frames,
elsewhere :func:`kernels.reference.bilinear_transform`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels import checks, gradients, reference, runtime
from kernels.runtime import TYPES, Kernel

SOURCE = "bat.cu"
LARGEST_SIDE = 8
"""Of P and Q: a thread holds a matrix of so many rows and columns in registers."""


class Maps(ctypes.Structure):
    """Strides in numbers, and sizes; as in the source."""

    _fields_ = [
        *((name, ctypes.c_longlong) for name in ("of_image", "of_channel", "of_row", "of_column")),
        *(
            (name, ctypes.c_int)
            for name in ("images", "channels", "groups", "height", "width", "channels_last")
        ),
    ]


def threads(dtype: torch.dtype) -> int:
    """Threads of a block: the sums of a gradient's block fit the shared memory that every GPU has."""
    return 64 if dtype == torch.float64 else 128


def defines(rows: int, columns: int, dtype: torch.dtype) -> tuple[tuple[str, str], ...]:
    """The compile-time numbers of the kernels for P of ``rows``² and Q of ``columns``²."""
    sizes = {"S_ROWS": rows, "S_COLUMNS": columns, "THREADS": threads(dtype), "VALUE": TYPES[dtype]}
    return tuple((name, str(value)) for name, value in sizes.items())


@torch.compiler.assume_constant_result
def runs(device: torch.device, rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether a kernel runs for P of ``rows``² and Q of ``columns``² (see :func:`kernels.runtime.runs`)."""
    lacking = None
    if dtype not in TYPES:
        lacking = f"{dtype} is not a type of the BAT kernels"
    elif max(rows, columns) > LARGEST_SIDE:
        lacking = f"P and Q of sides {rows} and {columns} have no kernel, at most {LARGEST_SIDE} have"
    return runtime.runs(device, lacking)


def bilinear_transform(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """See :func:`kernels.reference.bilinear_transform`; P and Q may be of a finer dtype than x."""
    if not runs(x.device, p.shape[-1], q.shape[-1], x.dtype):
        return reference.bilinear_transform(x, p, q)
    checks.check_transform(x, p, q)
    exact = torch.promote_types(x.dtype, torch.float32)
    return transform(x, p.to(exact), q.to(exact))


def temporal_transform(x: Tensor, m: Tensor) -> Tensor:
    """M · x along time: the transform with a Q of one column, over maps of T rows and H·W columns.

    Args:
        x: (N, C, T, H, W), T a multiple of M's side.
        m: (N, k, s, s), as P of :func:`bilinear_transform`.

    Returns:
        (N, C, T, H, W), lying in memory as x does.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    maps, one = x.flatten(3), m.new_ones((*m.shape[:2], 1, 1), dtype=exact)
    checks.check_transform(maps, m, one)
    return transform(maps, m.to(exact), one).unflatten(3, x.shape[3:])


@torch.library.custom_op("pairwise::bilinear_transform", mutates_args=())
def transform(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """:func:`bilinear_transform` with P and Q in float32, or finer as x; the result lies in memory as x does."""
    y = reference.bilinear_transform(x.to(p.dtype), p, q)
    return torch.empty_like(_dense(x)).copy_(y)


@torch.library.custom_op("pairwise::bilinear_transform_gradients", mutates_args=())
def transform_gradients(
    of_y: Tensor, x: Tensor, p: Tensor, q: Tensor, needs_q: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, P and Q; without ``needs_q`` a kernel leaves that of Q zero."""
    of_x, of_p, of_q = gradients.bilinear_transform(of_y.to(p.dtype), x.to(p.dtype), p, q)
    return torch.empty_like(_dense(x)).copy_(of_x), of_p, of_q


@transform.register_fake
def _(x, p, q):  # type: ignore[no-untyped-def]
    return torch.empty_like(_dense(x))


@transform_gradients.register_fake
def _(of_y, x, p, q, needs_q):  # type: ignore[no-untyped-def]
    return torch.empty_like(_dense(x)), p.new_empty(p.shape), q.new_empty(q.shape)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, of_y):  # type: ignore[no-untyped-def]
    return transform_gradients(of_y, *ctx.saved_tensors, ctx.needs_input_grad[2])


transform.register_autograd(_backward, setup_context=_keep)


@transform.register_kernel("cuda")
def transform_by_kernel(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """:func:`transform` by the kernel."""
    x = _dense(x)
    return _transformed(x, p, q)


@transform_gradients.register_kernel("cuda")
def gradients_by_kernels(
    of_y: Tensor, x: Tensor, p: Tensor, q: Tensor, needs_q: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`transform_gradients` by the kernels."""
    x, p, q = _dense(x), p.contiguous(), q.contiguous()
    of_y = torch.empty_like(x).copy_(of_y)  # lies as x does
    of_x = _transformed(of_y, p.mT, q.mT)
    of_p, of_q = torch.empty_like(p), torch.zeros_like(q)
    blocks = p.shape[0] * p.shape[1]
    _launch("gradient_p", blocks, p, q, x, q, of_y, of_p, _maps(x, p))
    if needs_q:
        _launch("gradient_q", blocks, p, q, x, p, of_y, of_q, _maps(x, p))
    return of_x, of_p, of_q


def _transformed(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    y = torch.empty_like(x)
    matrices = x.numel() // (p.shape[-1] * q.shape[-1])
    _launch(
        "transform", -(-matrices // threads(x.dtype)), p, q, x, p.contiguous(), q.contiguous(), y, _maps(x, p)
    )
    return y


def _dense(x: Tensor) -> Tensor:
    """``x`` if it lies in memory without gaps or overlaps, whatever the order of its axes, else a copy that does."""
    filled = 1
    for stride, side in sorted((stride, side) for stride, side in zip(x.stride(), x.shape) if side != 1):
        if stride != filled:
            return x.contiguous()
        filled *= side
    return x


def _maps(x: Tensor, p: Tensor) -> Maps:
    images, channels, height, width = x.shape
    # Neighbouring threads take what lies side by side.
    return Maps(*x.stride(), images, channels, p.shape[1], height, width, int(x.stride(1) < x.stride(3)))


def _launch(name: str, blocks: int, p: Tensor, q: Tensor, *arguments: Tensor | Maps) -> None:
    first = arguments[0]
    assert isinstance(first, Tensor)
    kernel = Kernel(SOURCE, name, defines(p.shape[-1], q.shape[-1], first.dtype))
    runtime.launch(kernel, blocks, (threads(first.dtype), 1, 1), 0, *arguments)
