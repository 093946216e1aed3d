"""Pairwise self-attention as one operator: from two maps to be compared and a map of values to the result.

On CUDA it runs the kernels of ``cuda/pairwise.cu``, which hold nothing that has a value per pixel *and* footprint
position; elsewhere :func:`kernels.reference.pairwise_attention`, its definition.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import reference, runtime
from kernels.footprint import Footprint, sizes
from kernels.runtime import TYPES, Kernel

SOURCE = "pairwise.cu"

# Warps that share 32 pixels, by hidden channels: each then has 16 hidden values in registers. Above, tiles in shared
# memory are too large for most devices, and matrix products over an expanded tensor compete.
GROUPS = {32: 2, 64: 4}
MOST_HIDDEN_OF_A_WARP, MOST_WEIGHTS_OF_A_WARP, MOST_SHARE = 16, 8, 8
WARPS_OF_A_BLOCK = 4


class Plan(NamedTuple):
    """How a module's channels are spread over warps: the compile-time numbers of the kernels."""

    inputs: int
    hidden: int
    weights: int
    share: int
    groups: int
    tiles: int
    value: torch.dtype
    real: torch.dtype

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        numbers = zip(("IN", "HIDDEN", "WEIGHTS", "SHARE", "GROUPS", "TILES"), map(str, self[:6]))
        return (*numbers, ("VALUE", TYPES[self.value]), ("REAL", TYPES[self.real]))

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads: lanes, warps that share 32 pixels, tiles of 32 pixels."""
        return 32, self.groups, self.tiles

    def blocks(self, pixels: int) -> int:
        """Blocks for so many pixels."""
        return -(-pixels // (32 * self.tiles))

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the layers' weights and the tiles, or the sums at the end, whichever is more."""
        slice_ = (-(-self.inputs // self.groups) + 3) // 4 * 4
        rows, warps = slice_ * self.groups, self.groups * self.tiles
        layers = self.hidden * rows + self.weights * self.hidden + 2 * self.hidden + self.weights
        tiles = self.tiles * 36 * (rows + 2 * self.hidden + self.weights)
        real = self.real.itemsize
        hidden, weights = self.hidden // self.groups, self.weights // self.groups
        sums = warps * 34 * max(2 * hidden * 8, (2 * hidden + weights) * real)
        return max(((layers + 3) // 4 * 4 + tiles) * real, sums)


class Maps(Footprint):
    """The sizes that are run-time arguments; as in the source."""

    _fields_ = (("images", ctypes.c_int),)


def plan(inputs: int, hidden: int, weights: int, channels: int, value: torch.dtype) -> Plan | str:
    """The plan for a module of these channels, or why the kernels have none."""
    groups, share = GROUPS.get(hidden, 1), channels // weights
    if value not in TYPES:
        return f"{value} is not a type of the pairwise kernels"
    if (
        hidden // groups > MOST_HIDDEN_OF_A_WARP
        or weights % groups
        or weights // groups > MOST_WEIGHTS_OF_A_WARP
    ):
        return f"pairwise attention with {hidden} hidden and {weights} weight channels goes through matrix products"
    if share > MOST_SHARE:
        return f"pairwise attention with {share} channels a weight has no kernel, at most {MOST_SHARE} have"
    real = torch.promote_types(value, torch.float32)
    return Plan(inputs, hidden, weights, share, groups, max(1, WARPS_OF_A_BLOCK // groups), value, real)


@torch.compiler.assume_constant_result
def runs(
    device: torch.device, inputs: int, hidden: int, weights: int, channels: int, value: torch.dtype
) -> bool:
    """Whether :func:`pairwise_attention` runs a kernel for such a module (see :func:`kernels.runtime.runs`)."""
    found = plan(inputs, hidden, weights, channels, value)
    if isinstance(found, str):
        return runtime.runs(device, found)
    if (
        device.type == "cuda"
        and runtime.missing() is None
        and found.shared_bytes > runtime.shared_limit(device)
    ):
        return runtime.runs(
            device, f"{found.shared_bytes} bytes of shared memory a block are more than this GPU has"
        )
    return runtime.runs(device, None)


@torch.library.custom_op("pairwise::pairwise_attention", mutates_args=())
def pairwise_attention(
    centre: Tensor,
    around: Tensor,
    value: Tensor,
    mix: Tensor,
    gamma: Tensor,
    beta: Tensor,
    to_weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`kernels.reference.pairwise_attention`.

    The three results after the first have no gradient. Whether a CUDA tensor's shape has a kernel: :func:`runs`.
    """
    results = reference.pairwise_attention(
        centre,
        around,
        value,
        mix,
        gamma,
        beta,
        to_weight,
        bias,
        mean,
        variance,
        eps,
        kernel_size,
        stride,
        dilation,
    )
    return tuple(result.clone() for result in results)  # type: ignore[return-value]  # an operator gives new tensors


@torch.library.custom_op("pairwise::pairwise_attention_gradients", mutates_args=())
def pairwise_attention_gradients(
    of_y: Tensor,
    y: Tensor,
    log_sum: Tensor,
    mean: Tensor,
    variance: Tensor,
    batch_statistics: bool,
    centre: Tensor,
    around: Tensor,
    value: Tensor,
    mix: Tensor,
    gamma: Tensor,
    beta: Tensor,
    to_weight: Tensor,
    bias: Tensor,
    eps: float,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``centre`` … ``bias`` from that of :func:`pairwise_attention`'s first result."""
    tensors = (centre, around, value, mix, gamma, beta, to_weight, bias)
    return reference.pairwise_attention_gradients(  # type: ignore[return-value]
        of_y, mean, variance, batch_statistics, *tensors, eps, kernel_size, stride, dilation
    )


@pairwise_attention.register_fake
def _(centre, around, value, mix, gamma, beta, to_weight, bias, *rest):  # type: ignore[no-untyped-def]
    images, _, height, width = centre.shape
    y = value.new_empty((images, value.shape[1], height, width))
    log_sum = centre.new_empty((images, bias.shape[0], height, width))
    return y, log_sum, centre.new_empty(gamma.shape), centre.new_empty(gamma.shape)


@pairwise_attention_gradients.register_fake
def _(of_y, y, log_sum, mean, variance, batch_statistics, *inputs):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:8])


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, mean, _, eps, kernel_size, stride, dilation = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.batch_statistics, ctx.rest = mean is None, (eps, kernel_size, stride, dilation)


def _backward(ctx, of_y, *_):  # type: ignore[no-untyped-def]
    output, tensors = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    gradients = pairwise_attention_gradients(of_y, *output, ctx.batch_statistics, *tensors, *ctx.rest)
    return *gradients, *[None] * 6


pairwise_attention.register_autograd(_backward, setup_context=_keep)


class Inputs(NamedTuple):
    """The tensors that have gradients; see :func:`kernels.reference.pairwise_attention`."""

    centre: Tensor
    around: Tensor
    value: Tensor
    mix: Tensor
    gamma: Tensor
    beta: Tensor
    to_weight: Tensor
    bias: Tensor


@pairwise_attention.register_kernel("cuda")
def forward_by_kernels(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`pairwise_attention` by the kernels."""
    *tensors, mean, variance, eps, kernel_size, stride, dilation = arguments
    inputs = Inputs(*(x.contiguous() for x in tensors))
    reference.check_pairwise(*inputs, kernel_size, stride, dilation)
    centre, around, value, mix, gamma, beta, to_weight, bias = inputs
    how, maps = _plan_of(around, value, mix, to_weight), _maps(around, kernel_size, stride, dilation)
    pixels = centre[:, 0].numel()
    if mean is None or variance is None:
        partial = mix.new_empty((how.blocks(pixels) * how.tiles, 2, how.hidden), dtype=torch.float64)
        _launch(how, "hidden_moments", pixels, centre, around, mix, partial, maps)
        exact_mean, square = partial.sum(0) / (pixels * kernel_size**2)
        variance = (square - exact_mean.square()).clamp_min(0).to(mix.dtype)
        mean = exact_mean.to(mix.dtype)
    scale = gamma * torch.rsqrt(variance + eps)
    shift = beta - mean * scale
    y = value.new_empty((value.shape[0], value.shape[1], *centre.shape[2:]))
    log_sum = centre.new_empty((centre.shape[0], bias.shape[0], *centre.shape[2:]))
    _launch(
        how, "attend", pixels, centre, around, value, mix, scale, shift, to_weight, bias, y, log_sum, maps
    )
    return y, log_sum, mean.clone(), variance.clone()


@pairwise_attention_gradients.register_kernel("cuda")
def gradients_by_kernels(*arguments: Any) -> tuple[Tensor, ...]:
    """:func:`pairwise_attention_gradients` by the kernels."""
    of_y, y, log_sum, mean, variance, batch_statistics, *tensors, eps, kernel_size, stride, dilation = (
        arguments
    )
    centre, around, value, mix, gamma, beta, to_weight, bias = Inputs(*(x.contiguous() for x in tensors))
    of_y = of_y.contiguous()
    how, maps = _plan_of(around, value, mix, to_weight), _maps(around, kernel_size, stride, dilation)
    pixels, padded_pixels = centre[:, 0].numel(), around[:, 0].numel()
    rstd = torch.rsqrt(variance + eps)
    scale = gamma * rstd
    shift = beta - mean * scale
    # Σ_q w · dL/dw, which the softmax's gradient needs, is dL/dy · y: no pass over the footprint.
    of_y_times_y = (of_y.to(how.real) * y).unflatten(1, (how.share, how.weights)).sum(1)
    given = (centre, around, value, mix, scale, shift, to_weight, bias, log_sum, of_y, of_y_times_y)

    tiles = how.blocks(pixels) * how.tiles
    norm_sums = mix.new_empty((tiles, 2, how.hidden))
    of_bias, of_to_weight = mix.new_empty((tiles, how.weights)), mix.new_empty((tiles, *to_weight.shape))
    _launch(how, "gradient_sums", pixels, *given, norm_sums, of_bias, of_to_weight, maps)
    of_beta, times_hidden = norm_sums.sum(0, dtype=torch.float64)
    of_gamma = (times_hidden - mean * of_beta) * rstd
    first, second = torch.zeros_like(scale), torch.zeros_like(scale)
    if batch_statistics:
        count = pixels * kernel_size**2
        first = (scale * (mean * rstd * of_gamma - of_beta) / count).to(mix.dtype)
        second = (-scale * rstd * of_gamma / count).to(mix.dtype)

    of_centre, of_around, of_value = (torch.empty_like(x) for x in (centre, around, value))
    of_mix = mix.new_empty((tiles, *mix.shape))
    _launch(how, "gradient_centre", pixels, *given, first, second, of_centre, of_mix, maps)
    _launch(how, "gradient_around", padded_pixels, *given, first, second, of_around, of_value, maps)
    gradients = Inputs(
        centre=of_centre,
        around=of_around,
        value=of_value,
        mix=of_mix.sum(0),
        gamma=of_gamma.to(mix.dtype),
        beta=of_beta.to(mix.dtype),
        to_weight=of_to_weight.sum(0),
        bias=of_bias.sum(0),
    )
    return tuple(gradients)


def _plan_of(around: Tensor, value: Tensor, mix: Tensor, to_weight: Tensor) -> Plan:
    found = plan(around.shape[1], mix.shape[0], to_weight.shape[0], value.shape[1], value.dtype)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _maps(around: Tensor, kernel_size: int, stride: int, dilation: int) -> Maps:
    return Maps(*sizes(around.shape[2:], kernel_size, stride, dilation), around.shape[0])


def _launch(how: Plan, name: str, pixels: int, *arguments: Tensor | Maps) -> None:
    runtime.launch(
        Kernel(SOURCE, name, how.defines), how.blocks(pixels), how.block, how.shared_bytes, *arguments
    )
