"""What makes SAN's modules fast without a kernel: maps in tiles, made again in the backward pass, and folded norms.

A *footprint* is the window of K positions around a pixel; ``window`` stands for kernel size, stride and dilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernels import san
from kernels.footprint import output_side
from kernels.reference import pad, reflected

Grid = list[list[Tensor]]
"""Tiles of a map, by group of images and from top to bottom."""


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1×1 convolution over any number of trailing dimensions, (n, c, …) → (n, o, …)."""
    return F.conv2d(x.flatten(3), weight, bias).unflatten(3, x.shape[3:])


def per_channel(x: Tensor, trailing: int = 2) -> Tensor:
    """(C,) → (C, 1, …) with ``trailing`` ones."""
    return x.view(-1, *[1] * trailing)


def shifted(padded: Tensor, kernel_size: int, stride: int, dilation: int) -> list[Tensor]:
    """Per footprint position the padded map as every output pixel sees it: K views of shape (n, C, h, w)."""
    height, width = (output_side(side, kernel_size, stride, 0, dilation) for side in padded.shape[2:])
    offsets = [(dilation * u, dilation * v) for u in range(kernel_size) for v in range(kernel_size)]
    rows, columns = stride * (height - 1) + 1, stride * (width - 1) + 1
    return [padded[:, :, u : u + rows : stride, v : v + columns : stride] for u, v in offsets]


class Reflected(torch.autograd.Function):
    """:func:`kernels.reference.pad` of a map, with a backward pass that folds the borders back, a strip at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: int) -> Tensor:
        ctx.padding = padding
        return pad(x, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        for dim in (2, 3):
            grad = folded_back(grad, dim, ctx.padding)
        return grad, None


def folded_back(grad: Tensor, dim: int, padding: int) -> Tensor:
    """What a map's gradient along ``dim`` is, given that of the map with ``padding`` reflected pixels on both sides."""
    side = grad.shape[dim] - 2 * padding
    if padding >= side:  # pixels come more than once on a side
        once = grad.new_zeros((*grad.shape[:dim], side, *grad.shape[dim + 1 :]))
        return once.index_add_(dim, reflected(side, padding, grad.device), grad)
    inside = grad.narrow(dim, padding, side).clone()
    inside.narrow(dim, 1, padding).add_(grad.narrow(dim, 0, padding).flip(dim))
    inside.narrow(dim, side - 1 - padding, padding).add_(grad.narrow(dim, padding + side, padding).flip(dim))
    return inside


class Footprint(torch.autograd.Function):
    """:func:`kernels.reference.footprint` of a padded map, with a backward pass without a map per position."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, *window: int) -> Tensor:
        ctx.shape, ctx.window = padded.shape, window
        return torch.stack(shifted(padded, *window), 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_padded = grad.new_zeros(ctx.shape)
        for view, at_position in zip(shifted(of_padded, *ctx.window), grad.unbind(2)):
            view.add_(at_position)
        return of_padded, None, None, None


class Aggregation(torch.autograd.Function):
    """:func:`kernels.reference.aggregation` of a padded map (n, Cv, …), weights (n, Cw, K, h, w); expands nothing."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, padded: Tensor, *window: int) -> Tensor:
        ctx.save_for_backward(weight, padded)
        ctx.window = window
        values, weights = grouped(padded, weight.shape[1], window), weight.unsqueeze(1).unbind(3)
        total = weights[0] * values[0]
        for at_position, value in zip(weights[1:], values[1:]):
            total.addcmul_(at_position, value)
        return total.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, padded = ctx.saved_tensors
        grad = grad.unflatten(1, (-1, weight.shape[1]))
        values = grouped(padded, weight.shape[1], ctx.window)
        of_weight = torch.stack([(grad * value).sum(1) for value in values], 2)
        of_padded = torch.zeros_like(padded)
        for view, at_position in zip(
            grouped(of_padded, weight.shape[1], ctx.window), weight.unsqueeze(1).unbind(3)
        ):
            view.addcmul_(at_position, grad)
        return of_weight, of_padded, None, None, None


def grouped(padded: Tensor, weight_channels: int, window: tuple[int, ...]) -> list[Tensor]:
    """:func:`shifted` views with the channels that share weights apart: (n, share, Cw, h, w)."""
    return [view.unflatten(1, (-1, weight_channels)) for view in shifted(padded, *window)]


def aggregated(weight: Tensor, padded: Tensor, *window: int) -> Tensor:
    """Aggregation of the dtype of ``padded``, summed in float32 if that is finer."""
    if san.runs(padded.device, padded.dtype):
        return san.padded_aggregation(padded, weight.flatten(3).to(padded.dtype), *window)
    exact = torch.promote_types(padded.dtype, torch.float32)
    return Aggregation.apply(weight.to(exact), padded.to(exact), *window).to(padded.dtype)


def over(function: Callable[..., Tensor], *grids: Grid) -> Grid:
    """``function`` of every tile; for the backward pass only its arguments are kept."""
    if torch.is_grad_enabled():
        function = recomputed(function)
    return [[function(*tiles) for tiles in zip(*rows)] for rows in zip(*grids)]


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function``, run again in the backward pass."""
    return lambda *tiles: checkpoint(function, *tiles, use_reentrant=False, preserve_rng_state=False)


def joined(tiles: Grid) -> Tensor:
    """The map from its tiles."""
    return torch.cat([torch.cat(group, 2) for group in tiles])


def uses_batch(norm: nn.BatchNorm2d) -> bool:
    """Whether ``norm`` takes its statistics from the batch."""
    return norm.training or norm.running_mean is None


def folded(
    norm: Any, count: int, batch_moments: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """``norm`` as a scale and shift per channel, of its parameters' dtype or float32 if that is finer.

    In training from ``batch_moments()``, the mean and biased variance over ``count`` samples, which
    also go into the running statistics by torch's rules.
    """
    if uses_batch(norm):
        mean, variance = batch_moments()
        if norm.training and norm.track_running_stats:
            update_running(norm, mean, variance * (count / (count - 1)))
    else:
        mean, variance = norm.running_mean, norm.running_var
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return scale.to(dtype), (norm.bias - mean * scale).to(dtype)


def update_running(norm: Any, mean: Tensor, unbiased_variance: Tensor) -> None:
    """The running statistics of ``norm`` after a batch."""
    norm.num_batches_tracked.add_(1)  # torch.compile returns it in place of the result when it is `+= 1`
    momentum = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased_variance)):
        running.mul_(1 - momentum).add_((batch.detach() * momentum).to(running.dtype))


def moments(x: Tensor) -> Tensor:
    """(n, C, …) → (3, C): number of samples, mean and biased variance per channel."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
    count = x[:, 0].numel()
    mean = x.sum((0, 2)) / count
    variance = (x - mean.unsqueeze(1)).square().sum((0, 2)) / count
    return torch.stack((torch.full_like(mean, count), mean, variance))


def merged(tiles: Grid) -> tuple[Tensor, Tensor]:
    """Mean and variance over all samples from the :func:`moments` of tiles."""
    count, means, variances = torch.stack([tile for group in tiles for tile in group], 1)
    share = count / count.sum(0)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)
