"""Batch norm, ReLU and max pooling as one operator, which reads a map twice and keeps nothing else.

On CUDA it runs the kernels of ``cuda/norm.cu`` on channels-last maps, elsewhere :func:`kernels.reference.norm_relu`.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import checks, gradients, reference, runtime
from kernels.runtime import TYPES, Kernel

SOURCE = "norm.cu"
VECTOR_BYTES = 16  # that a thread reads at once
THREADS, LANES = 256, 8  # of a block; channels of a block that adds up parts: as in the source
PARTS = 1024  # sums are of at most so many parts of the pixels: what fills a GPU
ITEMS = 16  # that a thread does at least, for what it reads first


class Maps(ctypes.Structure):
    """The sizes that are run-time arguments; as in the source."""

    _fields_ = (
        *(
            (name, ctypes.c_int)
            for name in ("images", "height", "width", "channels", "columns", "at_once", "parts")
        ),
        ("eps", ctypes.c_double),
        ("share", ctypes.c_double),
    )


def defines(vector: int, window: int, dtype: torch.dtype) -> tuple[tuple[str, str], ...]:
    """The compile-time numbers of the kernels."""
    return (("VALUE", TYPES[dtype]), ("VECTOR", str(vector)), ("WINDOW", str(window)))


@torch.compiler.assume_constant_result
def runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`norm_relu` runs a kernel (see :func:`kernels.runtime.runs`)."""
    return runtime.runs(device, None if dtype in TYPES else f"{dtype} is not a type of the norm's kernels")


@torch.library.custom_op("pairwise::norm_relu", mutates_args=())
def norm_relu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`kernels.reference.norm_relu`; the two results after the first have no gradient."""
    y, *moments = reference.norm_relu(x, gamma, beta, mean, variance, eps, window)
    return y.contiguous(memory_format=torch.channels_last), moments[0].clone(), moments[1].clone()


@torch.library.custom_op("pairwise::norm_relu_gradients", mutates_args=())
def norm_relu_gradients(
    of_y: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    variance: Tensor,
    batch_statistics: bool,
    eps: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gamma and beta."""
    of_x, of_gamma, of_beta = gradients.norm_relu(
        of_y, x, gamma, beta, mean, variance, batch_statistics, eps, window
    )
    return of_x.contiguous(memory_format=torch.channels_last), of_gamma, of_beta


@norm_relu.register_fake
def _(x, gamma, beta, mean, variance, eps, window):  # type: ignore[no-untyped-def]
    images, channels, height, width = x.shape
    y = x.new_empty(images, channels, height // window, width // window)
    return y.to(memory_format=torch.channels_last), torch.empty_like(gamma), torch.empty_like(gamma)


@norm_relu_gradients.register_fake
def _(of_y, x, gamma, beta, *rest):  # type: ignore[no-untyped-def]
    of_x = torch.empty_like(x, memory_format=torch.channels_last)
    return of_x, torch.empty_like(gamma), torch.empty_like(beta)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, gamma, beta, given, _, *ctx.rest = inputs
    ctx.save_for_backward(x, gamma, beta, *output[1:])
    ctx.batch_statistics = given is None


def _backward(ctx, of_y, *_):  # type: ignore[no-untyped-def]
    gradients = norm_relu_gradients(of_y, *ctx.saved_tensors, ctx.batch_statistics, *ctx.rest)
    return *gradients, *[None] * 4


norm_relu.register_autograd(_backward, setup_context=_keep)


@norm_relu.register_kernel("cuda")
def norm_relu_by_kernels(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`norm_relu` by the kernels."""
    checks.check_norm(x, gamma, beta, mean, window)
    x = x.contiguous(memory_format=torch.channels_last)
    height, width = (side // window for side in x.shape[2:])
    y = torch.empty_like(x[:, :, :height, :width], memory_format=torch.channels_last)
    layout = _layout(window, eps, True, x, y)
    if mean is None or variance is None:
        mean, variance = torch.empty_like(gamma), torch.empty_like(gamma)
        partial, maps = layout.sums("value_sums", x[:, 0].numel(), x)
        layout.add_up("statistics", maps, x, partial, mean, variance)
    else:
        mean, variance = (t.to(gamma.dtype, copy=True).contiguous() for t in (mean, variance))
    layout.change("norm_relu", x, mean, variance, gamma.contiguous(), beta.contiguous(), y)
    return y, mean, variance


@norm_relu_gradients.register_kernel("cuda")
def gradients_by_kernels(
    of_y: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    variance: Tensor,
    batch_statistics: bool,
    eps: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`norm_relu_gradients` by the kernels."""
    of_y, x = (t.contiguous(memory_format=torch.channels_last) for t in (of_y, x))
    of_x, of_gamma, of_beta = torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(beta)
    layout = _layout(window, eps, batch_statistics, x, of_x, of_y)
    norm = (mean, variance, gamma.contiguous(), beta.contiguous())
    partial, maps = layout.sums("gradient_sums", layout.windows, of_y, x, *norm)
    layout.add_up("gradient_totals", maps, partial, variance, of_gamma, of_beta)
    layout.change("gradient", of_y, x, *norm, of_gamma, of_beta, of_x)
    return of_x, of_gamma, of_beta


class Layout(NamedTuple):
    """How threads share a map; their items are pixels, or the windows that are pooled."""

    images: int
    height: int
    width: int
    channels: int
    vector: int
    """Channels of a thread."""
    columns: int
    """Threads side by side along the channels, a power of two."""
    window: int
    eps: float
    share: float
    """Of a pixel in the statistics, 0 if they are given."""
    dtype: torch.dtype

    @property
    def windows(self) -> int:
        """How many windows there are, with those that the borders cut."""
        return self.images * -(-self.height // self.window) * -(-self.width // self.window)

    def sums(self, name: str, items: int, *tensors: Tensor) -> tuple[Tensor, Maps]:
        """Both sums over ``items``, in parts: (parts, 2, channels)."""
        step = THREADS // self.columns
        maps = self._maps(items, max(ITEMS, -(-items * self._groups // (PARTS * step))) * step)
        real = torch.promote_types(self.dtype, torch.float32)
        partial = tensors[0].new_empty((maps.parts, 2, self.channels), dtype=real)
        self._launch(name, maps.parts * self._groups, *tensors, partial, maps)
        return partial, maps

    def add_up(self, name: str, maps: Maps, *tensors: Tensor) -> None:
        """What becomes of the parts' sums, channel by channel."""
        self._launch(name, -(-self.channels // LANES), *tensors, maps)

    def change(self, name: str, *tensors: Tensor) -> None:
        """One map from others, window by window."""
        maps = self._maps(self.windows, ITEMS * THREADS // self.columns)
        self._launch(name, maps.parts * self._groups, *tensors, maps)

    @property
    def _groups(self) -> int:
        return -(-self.channels // (self.vector * self.columns))  # blocks that all channels need

    def _maps(self, items: int, at_once: int) -> Maps:
        return Maps(*self[:4], self.columns, at_once, -(-items // at_once), self.eps, self.share)

    def _launch(self, name: str, blocks: int, *arguments: runtime.Argument) -> None:
        kernel = Kernel(SOURCE, name, defines(self.vector, self.window, self.dtype))
        runtime.launch(kernel, blocks, (THREADS, 1, 1), 0, *arguments)


def _layout(window: int, eps: float, batch_statistics: bool, x: Tensor, *others: Tensor) -> Layout:
    """For ``x``, which is normed, and other maps of its type, all channels last."""
    images, channels, height, width = x.shape
    vector = VECTOR_BYTES // x.element_size()
    if channels % vector or any(t.data_ptr() % VECTOR_BYTES for t in (x, *others)):
        vector = 1
    columns = min(THREADS, 1 << (-(-channels // vector)).bit_length() - 1)
    share = 1 / (images * height * width) if batch_statistics and x.numel() else 0.0
    return Layout(images, height, width, channels, vector, columns, window, eps, share, x.dtype)
