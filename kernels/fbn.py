"""The squares and sums of a factorized bilinear layer as an operator: one pass over the products, and one backward.

On CUDA it runs the kernels of ``cuda/fbn.cu``, elsewhere :func:`kernels.reference.square_sum`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels import checks, reference, runtime
from kernels.runtime import TYPES, Kernel

SOURCE = "fbn.cu"
THREADS = 256


class Sizes(ctypes.Structure):
    """As in the source."""

    _fields_ = [("outputs", ctypes.c_longlong), ("factors", ctypes.c_int)]


@torch.compiler.assume_constant_result
def runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel runs there (see :func:`kernels.runtime.runs`)."""
    return runtime.runs(device, None if dtype in TYPES else f"{dtype} is not a type of the FBN kernels")


@torch.library.custom_op("pairwise::square_sum", mutates_args=())
def square_sum(products: Tensor, power: Tensor) -> Tensor:
    """See :func:`kernels.reference.square_sum`; ``power`` is float32, or finer as the products."""
    return reference.square_sum(products, power)


@torch.library.custom_op("pairwise::square_sum_gradient", mutates_args=())
def square_sum_gradient(of_y: Tensor, products: Tensor, power: Tensor) -> Tensor:
    """The gradient of the products, of their dtype."""
    return (2 * power * products * of_y.unsqueeze(-1)).to(products.dtype)


@square_sum.register_fake
def _(products, power):  # type: ignore[no-untyped-def]
    return power.new_empty(products.shape[:-1])


@square_sum_gradient.register_fake
def _(of_y, products, power):  # type: ignore[no-untyped-def]
    return products.new_empty(products.shape)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, of_y):  # type: ignore[no-untyped-def]
    return square_sum_gradient(of_y, *ctx.saved_tensors), None


square_sum.register_autograd(_backward, setup_context=_keep)


@square_sum.register_kernel("cuda")
def square_sum_by_kernel(products: Tensor, power: Tensor) -> Tensor:
    """:func:`square_sum` by the kernel."""
    checks.check_products(products, power)
    y = power.new_empty(products.shape[:-1])
    _launch("square_sum", y.numel(), products, products.contiguous(), power.contiguous(), y)
    return y


@square_sum_gradient.register_kernel("cuda")
def square_sum_gradient_by_kernel(of_y: Tensor, products: Tensor, power: Tensor) -> Tensor:
    """:func:`square_sum_gradient` by the kernel."""
    products = products.contiguous()
    of_products = torch.empty_like(products)
    given = (of_y.to(power.dtype).contiguous(), products, power.contiguous())
    _launch("square_sum_gradient", products.numel(), products, *given, of_products)
    return of_products


def _launch(name: str, threads: int, products: Tensor, *tensors: Tensor) -> None:
    kernel = Kernel(SOURCE, name, (("VALUE", TYPES[products.dtype]),))
    sizes = Sizes(products.shape[:-1].numel(), products.shape[-1])
    runtime.launch(kernel, -(-threads // THREADS), (THREADS, 1, 1), 0, *tensors, sizes)
