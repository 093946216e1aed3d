"""What makes SAN's modules fast without a kernel: maps in tiles, made again in the backward pass.

A *footprint* is the window of K positions around a pixel; ``window`` stands for kernel size, stride and dilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernels import differences, san
from kernels.footprint import output_side
from kernels.reference import difference_moments, pad, per_channel, reflected

_ONEDNN = torch.backends.mkldnn.is_available()  # here, since Dynamo does not trace the question

Grid = list[list[Tensor]]
"""Tiles of a map, by group of images and from top to bottom."""


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1×1 convolution over any number of trailing dimensions, (n, c, …) → (n, o, …)."""
    # With one thread and fewer than 16 images, as a tile has, torch leaves oneDNN only what is dilated, which a 1×1
    # convolution cannot tell. oneDNN is the faster one where many channels go to many.
    wide = x.device.type == "cpu" and x.dtype == torch.float32 and min(weight.shape[:2]) >= 64
    dilation = 2 if wide and _ONEDNN else 1
    return F.conv2d(x.flatten(3), weight, bias, dilation=dilation).unflatten(3, x.shape[3:])


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


class NormedFootprint(torch.autograd.Function):
    """relu(scale · footprint + shift) of a padded map (n, C, …) with scale and shift (C, K): (n, C, K, h, w).

    A position at a time, which keeps what is between out of memory.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, scale: Tensor, shift: Tensor, *window: int) -> Tensor:
        views = shifted(padded, *window)
        n, channels, *sides = views[0].shape
        normed = scale.new_empty((n, channels, len(views), *sides))
        for of, view, by, plus in zip(normed.unbind(2), views, scale.unbind(1), shift.unbind(1)):
            torch.addcmul(per_channel(plus), per_channel(by), view, out=of).relu_()
        ctx.save_for_backward(padded, scale, normed)
        ctx.window = window
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded, scale, normed = ctx.saved_tensors
        of_padded = torch.zeros_like(padded, dtype=scale.dtype)
        passed, of_scale = torch.ops.aten.threshold_backward(grad, normed, 0), []
        views, of_views = shifted(padded, *ctx.window), shifted(of_padded, *ctx.window)
        for view, of_view, by, of in zip(views, of_views, scale.unbind(1), passed.unbind(2)):
            of_view.addcmul_(of, per_channel(by))
            of_scale.append((of * view).sum((0, 2, 3)))
        return of_padded.to(padded.dtype), torch.stack(of_scale, 1), passed.sum((0, 3, 4)), None, None, None


class Aggregation(torch.autograd.Function):
    """:func:`kernels.reference.aggregation` of a padded map (n, Cv, …), weights (n, Cw, K, h, w); expands nothing.

    What lies side by side in memory is computed at once: a row, or where rows are short, the channels.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, padded: Tensor, *window: int) -> Tensor:
        ctx.window, ctx.layout = window, torch.contiguous_format
        if weight.shape[1] > weight.shape[4]:
            ctx.layout = torch.channels_last
            weight = weight.contiguous(memory_format=torch.channels_last_3d)
            padded = padded.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(weight, padded)
        values, weights = grouped(padded, weight.shape[1], window), weight.unsqueeze(1).unbind(3)
        total = weights[0] * values[0]
        for at_position, value in zip(weights[1:], values[1:]):
            total.addcmul_(at_position, value)
        return total.flatten(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, padded = ctx.saved_tensors
        grad = grad.contiguous(memory_format=ctx.layout).unflatten(1, (-1, weight.shape[1]))
        of_weight, of_padded = torch.empty_like(weight), torch.zeros_like(padded)
        for value, of_position in zip(grouped(padded, weight.shape[1], ctx.window), of_weight.unbind(2)):
            torch.sum(grad * value, 1, out=of_position)
        of_values = grouped(of_padded, weight.shape[1], ctx.window)
        for of_value, at_position in zip(of_values, weight.unsqueeze(1).unbind(3)):
            of_value.addcmul_(at_position, grad)
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


def moments_of_differences(centre: Tensor, around: Tensor, *window: int) -> tuple[Tensor, Tensor]:
    """:func:`kernels.differences.difference_moments`, which keeps the maps alone, with a kernel or without."""
    if differences.runs(around.device, torch.promote_types(around.dtype, torch.float32)):
        return differences.difference_moments(centre, around, *window)
    return DifferenceMoments.apply(centre, around, *window)


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


class DifferenceMoments(torch.autograd.Function):
    """:func:`kernels.reference.difference_moments`, with a backward pass that sums along rows, then columns.

    In float64 as well, and for the same reason; it keeps its arguments alone.
    """

    @staticmethod
    def forward(ctx: Any, centre: Tensor, around: Tensor, *window: int) -> tuple[Tensor, Tensor]:
        mean, variance = difference_moments(centre, around, *window)
        ctx.save_for_backward(centre, around, mean)
        ctx.window = window
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> tuple[Tensor | None, ...]:
        centre, around, mean = ctx.saved_tensors
        dtype, positions = centre.dtype, ctx.window[0] ** 2
        count = centre[:, 0].numel() * positions
        factor = per_channel(2 * of_variance / count)
        # The gradient of a difference is this, less `factor` times the pixel under the footprint.
        of_each = (centre - per_channel(mean)).mul_(factor).add_(per_channel(of_mean / count))
        around = around.double()
        near, of_near, times = around, of_each, torch.ones_like(of_each[:1, :1])
        for dim in (2, 3):
            near = along(near, dim, *ctx.window).sum(-1)
            of_near, times = (spread_along(x, dim, around.shape[dim], *ctx.window) for x in (of_near, times))
        of_centre = of_each.mul_(positions).sub_(near.mul_(factor))
        of_around = around.mul(times).mul_(factor).sub_(of_near)
        return of_centre.to(dtype), of_around.to(dtype), None, None, None


def along(padded: Tensor, dim: int, kernel_size: int, stride: int, dilation: int) -> Tensor:
    """The pixels under a footprint along ``dim`` alone, as a last dimension: a view."""
    return padded.unfold(dim, dilation * (kernel_size - 1) + 1, stride)[..., ::dilation]


def spread_along(x: Tensor, dim: int, side: int, *window: int) -> Tensor:
    """The transpose of summing :func:`along`: every value added wherever its footprint lies."""
    padded = x.new_zeros((*x.shape[:dim], side, *x.shape[dim + 1 :]))
    for view in along(padded, dim, *window).unbind(-1):
        view.add_(x)
    return padded


class Moments(torch.autograd.Function):
    """(n, C, …) → (3, C): number of samples, mean and biased variance per channel; keeps nothing but its argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
        count = exact[:, 0].numel()
        mean = exact.sum((0, 2)) / count
        variance = (exact - mean.unsqueeze(1)).square_().sum((0, 2)) / count
        ctx.save_for_backward(x, mean)
        return torch.stack((torch.full_like(mean, count), mean, variance))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        of_mean, of_variance = (per_channel(of / x[:, 0].numel(), x.dim() - 2) for of in grad[1:])
        of_x = (x - per_channel(mean, x.dim() - 2)).mul_(2 * of_variance).add_(of_mean)
        return of_x.to(x.dtype)


class BatchMoments(torch.autograd.Function):
    """(n, …) → (2, …): the mean over the batch and that of the squares, in float64; keeps nothing but its argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        square = torch.linalg.vector_norm(x, dim=0, dtype=torch.float64).square() / len(x)
        return torch.stack((x.mean(0, dtype=torch.float64), square))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        of_mean, of_square = (grad / len(x)).to(torch.promote_types(x.dtype, torch.float32))
        return torch.addcmul(of_mean, x, 2 * of_square).to(x.dtype)


def merged(tiles: Grid) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel over all samples of tiles (n, C, …)."""
    count, means, variances = torch.stack([Moments.apply(tile) for group in tiles for tile in group], 1)
    share = count / count.sum(0)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


def evenly(total: int, most: int) -> int:
    """The size of equal parts of ``total``, at most ``most`` where that is at least 1."""
    parts = -(-total // max(most, 1))
    return -(-total // parts) if parts else 1
