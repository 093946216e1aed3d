"""Pairwise self-attention as one operator: from two maps to be compared and a map of values to the result.

On CUDA it runs kernels that hold nothing with a value per pixel *and* footprint position: those of
:mod:`kernels.pairwise_mma` where tensor cores take the type and the channels, else those of
:mod:`kernels.pairwise_simt`. Elsewhere it is :func:`kernels.reference.pairwise_attention`, its definition.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import checks, gradients, pairwise_mma, pairwise_simt, reference, runtime
from kernels.footprint import Footprint, sizes


class Maps(Footprint):
    """The sizes that are run-time arguments; as in the source."""

    _fields_ = (("images", ctypes.c_int),)


@torch.compiler.assume_constant_result
def runs(
    device: torch.device, inputs: int, hidden: int, weights: int, channels: int, value: torch.dtype
) -> bool:
    """Whether :func:`pairwise_attention` runs a kernel for such a module (see :func:`kernels.runtime.runs`)."""
    found = _plan(device, inputs, hidden, weights, channels, value)
    lacking = found if isinstance(found, str) else None
    if lacking is None and device.type == "cuda" and runtime.missing() is None:
        needed = found.shared_bytes  # type: ignore[union-attr]
        if needed > runtime.shared_limit(device):
            lacking = f"{needed} bytes of shared memory a block are more than this GPU has"
    return runtime.runs(device, lacking)


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
    return gradients.pairwise_attention(  # type: ignore[return-value]
        of_y, mean, variance, batch_statistics, *tensors, eps, kernel_size, stride, dilation
    )


@pairwise_attention.register_fake
def _(centre, around, value, mix, gamma, beta, to_weight, bias, *rest):  # type: ignore[no-untyped-def]
    images, _, height, width = centre.shape
    how = _plan(value.device, centre.shape[1], mix.shape[0], bias.shape[0], value.shape[1], value.dtype)
    layout = torch.channels_last if isinstance(how, pairwise_mma.Plan) else torch.contiguous_format
    y = value.new_empty((images, value.shape[1], height, width)).to(memory_format=layout)
    log_sum = centre.new_empty((images, bias.shape[0], height, width)).to(memory_format=layout)
    return y, log_sum, centre.new_empty(gamma.shape), centre.new_empty(gamma.shape)


@pairwise_attention_gradients.register_fake
def _(of_y, y, log_sum, mean, variance, batch_statistics, *inputs):  # type: ignore[no-untyped-def]
    centre, _, value, mix, *_, bias = inputs[:8]
    how = _plan(value.device, centre.shape[1], mix.shape[0], bias.shape[0], value.shape[1], value.dtype)
    layout = torch.channels_last if isinstance(how, pairwise_mma.Plan) else torch.contiguous_format
    return tuple(
        torch.empty_like(x, memory_format=layout if x.dim() == 4 else torch.contiguous_format)
        for x in inputs[:8]
    )


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
    inputs = Inputs(*tensors)
    checks.check_pairwise(*inputs, kernel_size, stride, dilation)
    passes = _passes(inputs, kernel_size, stride, dilation)
    if mean is None or variance is None:
        count = inputs.centre[:, 0].numel() * kernel_size**2
        exact_mean, square = passes.hidden_moments() / count
        variance = (square - exact_mean.square()).clamp_min(0).to(inputs.mix.dtype)
        mean = exact_mean.to(inputs.mix.dtype)
    y, log_sum = passes.attend(_layers(inputs, mean, torch.rsqrt(variance + eps)))
    return y, log_sum, mean.clone(), variance.clone()


@pairwise_attention_gradients.register_kernel("cuda")
def gradients_by_kernels(*arguments: Any) -> tuple[Tensor, ...]:
    """:func:`pairwise_attention_gradients` by the kernels."""
    of_y, y, log_sum, mean, variance, batch_statistics, *tensors, eps, kernel_size, stride, dilation = (
        arguments
    )
    inputs = Inputs(*tensors)
    passes = _passes(inputs, kernel_size, stride, dilation)
    rstd = torch.rsqrt(variance + eps)
    layers = _layers(inputs, mean, rstd)
    scale = layers[0]
    # Σ_q w · dL/dw, which the softmax's gradient needs, is dL/dy · y: no pass over the footprint.
    of_y_times_y = (of_y.to(log_sum.dtype) * y).unflatten(1, (-1, log_sum.shape[1])).sum(1)
    (of_beta, times_hidden), of_bias, of_to_weight = passes.gradient_sums(layers, log_sum, of_y, of_y_times_y)
    of_gamma = (times_hidden - mean * of_beta) * rstd
    first, second = torch.zeros_like(scale), torch.zeros_like(scale)
    if batch_statistics:
        count = inputs.centre[:, 0].numel() * kernel_size**2
        first = (scale * (mean * rstd * of_gamma - of_beta) / count).to(scale.dtype)
        second = (-scale * rstd * of_gamma / count).to(scale.dtype)
    of_centre, of_around, of_value, of_mix = passes.gradients(first, second)
    of_norm = (of_gamma.to(scale.dtype), of_beta.to(scale.dtype))
    return of_centre, of_around, of_value, of_mix, *of_norm, of_to_weight, of_bias


def _layers(inputs: Inputs, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    """The second norm as a scale and a shift, and the layer behind it."""
    scale = inputs.gamma * rstd
    return scale, inputs.beta - mean * scale, inputs.to_weight.contiguous(), inputs.bias.contiguous()


def _passes(
    inputs: Inputs, kernel_size: int, stride: int, dilation: int
) -> pairwise_simt.Passes | pairwise_mma.Passes:
    centre, around, value, mix, *_, bias = inputs
    maps = Maps(*sizes(around.shape[2:], kernel_size, stride, dilation), around.shape[0])
    how = _plan(value.device, centre.shape[1], mix.shape[0], bias.shape[0], value.shape[1], value.dtype)
    if isinstance(how, str):
        raise ValueError(how)
    if isinstance(how, pairwise_mma.Plan):
        return pairwise_mma.Passes(how, maps, centre, around, value, mix.contiguous())
    return pairwise_simt.Passes(how, maps, *(x.contiguous() for x in (centre, around, value, mix)))


def _plan(device: torch.device, *numbers: Any) -> pairwise_simt.Plan | pairwise_mma.Plan | str:
    """How a module of these inputs, hidden, weight and value channels and type runs, or why not."""
    cores = pairwise_mma.plan(*numbers) if runtime.tensor_cores(device) else None
    return cores or pairwise_simt.plan(*numbers)
