"""NOAH's sum of values over positions, weighed by a softmax of queries, as an operator.

On CUDA it runs the kernels of ``cuda/noah.cu``, which write no map of weights, elsewhere
:func:`kernels.reference.weighted_sum`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels import checks, reference, runtime
from kernels.runtime import TYPES, Kernel

SOURCE = "noah.cu"
WARPS = 8  # of a block; as in the source


class Sizes(ctypes.Structure):
    """As in the source."""

    _fields_ = [("rows", ctypes.c_longlong), ("length", ctypes.c_int)]


@torch.compiler.assume_constant_result
def runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel runs there (see :func:`kernels.runtime.runs`)."""
    return runtime.runs(device, None if dtype in TYPES else f"{dtype} is not a type of the NOAH kernels")


def weighted_sum(query: Tensor, value: Tensor) -> Tensor:
    """See :func:`kernels.reference.weighted_sum`."""
    if not runs(query.device, query.dtype):
        return reference.weighted_sum(query, value)
    checks.check_rows(query, value)
    y = summed(query, value)[0]
    return y if torch.is_autocast_enabled(query.device.type) else y.to(query.dtype)


@torch.library.custom_op("pairwise::weighted_sum", mutates_args=())
def summed(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`weighted_sum`, and without a gradient the logarithm of each softmax's sum."""
    exact = query.to(torch.promote_types(query.dtype, torch.float32))
    return reference.weighted_sum(query, value), exact.logsumexp(-1)


@torch.library.custom_op("pairwise::weighted_sum_gradients", mutates_args=())
def summed_gradients(
    of_y: Tensor, query: Tensor, value: Tensor, y: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of both inputs."""
    weighted = (query - log_sum.unsqueeze(-1)).exp() * of_y.unsqueeze(-1)
    return (weighted * (value - y.unsqueeze(-1))).to(query.dtype), weighted.to(value.dtype)


@summed.register_fake
def _(query, value):  # type: ignore[no-untyped-def]
    exact = torch.promote_types(query.dtype, torch.float32)
    return tuple(query.new_empty(query.shape[:-1], dtype=exact) for _ in range(2))


@summed_gradients.register_fake
def _(of_y, query, value, y, log_sum):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), value.new_empty(value.shape)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, of_y, _):  # type: ignore[no-untyped-def]
    return summed_gradients(of_y, *ctx.saved_tensors)


summed.register_autograd(_backward, setup_context=_keep)


@summed.register_kernel("cuda")
def summed_by_kernel(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`summed` by the kernel."""
    exact = torch.promote_types(query.dtype, torch.float32)
    y, log_sum = (query.new_empty(query.shape[:-1], dtype=exact) for _ in range(2))
    _launch(
        "weighted_sum",
        (32, WARPS, 1),
        -(-y.numel() // WARPS),
        query.contiguous(),
        value.contiguous(),
        y,
        log_sum,
    )
    return y, log_sum


@summed_gradients.register_kernel("cuda")
def gradients_by_kernel(
    of_y: Tensor, query: Tensor, value: Tensor, y: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`summed_gradients` by the kernel."""
    query, value = query.contiguous(), value.contiguous()
    of_query, of_value = torch.empty_like(query), torch.empty_like(value)
    given = (query, value, y.contiguous(), log_sum.contiguous(), of_y.to(y.dtype).contiguous())
    block = (32 * WARPS, 1, 1)
    _launch("weighted_sum_gradient", block, -(-query.numel() // block[0]), *given, of_query, of_value)
    return of_query, of_value


def _launch(name: str, block: tuple[int, int, int], blocks: int, query: Tensor, *tensors: Tensor) -> None:
    kernel = Kernel(SOURCE, name, (("VALUE", TYPES[query.dtype]),))
    sizes = Sizes(query.shape[:-1].numel(), query.shape[-1])
    runtime.launch(kernel, blocks, block, 0, query, *tensors, sizes)
