"""The gradients of :mod:`kernels.reference`'s operators, written out: what a kernel's must be.

torch derives the same from the reference where that runs by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import reference
from kernels.footprint import output_side
from kernels.reference import footprint, per_channel, standardised


def norm_relu(
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
    """The gradients of x, gamma and beta of :func:`kernels.reference.norm_relu`."""
    exact = x.to(gamma.dtype)
    standard = standardised(exact, mean, variance, eps)
    normed = per_channel(gamma) * standard + per_channel(beta)
    _, chosen = F.max_pool2d(normed, window, return_indices=True)
    of_normed = torch.zeros_like(normed).flatten(2)
    of_normed.scatter_(2, chosen.flatten(2), of_y.to(gamma.dtype).flatten(2))
    of_normed = of_normed.view_as(normed) * (normed > 0)
    of_gamma, of_beta = (of_normed * standard).sum((0, 2, 3)), of_normed.sum((0, 2, 3))
    if batch_statistics:
        mean_gradient = (per_channel(of_beta) + standard * per_channel(of_gamma)) / x[:, 0].numel()
        of_normed = of_normed - mean_gradient
    of_x = of_normed * per_channel(gamma * torch.rsqrt(variance + eps))
    return of_x.to(x.dtype), of_gamma, of_beta


def subtraction2(
    of_y: Tensor, height: int, width: int, kernel_size: int, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """The gradients of the (N, C, height, width) maps of :func:`kernels.reference.subtraction2` without padding."""
    window = (kernel_size, stride, dilation)
    sides = [output_side(side, kernel_size, stride, 0, dilation) for side in (height, width)]
    of_y = of_y.unflatten(3, sides)
    at_centre = torch.zeros_like(of_y)
    at_centre[:, :, (kernel_size - 1) // 2 * (kernel_size + 1)] = of_y.sum(2)
    return spread(at_centre, (height, width), *window), spread(-of_y, (height, width), *window)


def aggregation(
    of_y: Tensor, value: Tensor, weight: Tensor, kernel_size: int, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """The gradients of ``value`` and ``weight`` of :func:`kernels.reference.aggregation` without padding."""
    near = footprint(value, kernel_size, stride, 0, dilation).unflatten(1, (-1, weight.shape[1]))
    of_y = of_y.unflatten(1, (-1, weight.shape[1])).unsqueeze(3)
    by_pixel = weight.unflatten(3, of_y.shape[4:]).unsqueeze(1)
    of_near = (of_y * by_pixel).flatten(1, 2)
    of_value = spread(of_near, value.shape[2:], kernel_size, stride, dilation)
    return of_value, (of_y * near).sum(1).flatten(3)


def difference_moments(
    of_mean: Tensor,
    of_variance: Tensor,
    mean: Tensor,
    centre: Tensor,
    around: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of both maps of :func:`kernels.reference.difference_moments` from those of its results."""
    exact = centre.double(), around.double()
    difference = exact[0].unsqueeze(2) - footprint(exact[1], kernel_size, stride, 0, dilation)
    of_difference = per_channel(of_mean, 3) + 2 * per_channel(of_variance, 3) * (
        difference - per_channel(mean, 3)
    )
    of_difference = of_difference / difference[:, 0].numel()
    of_around = spread(of_difference, around.shape[2:], kernel_size, stride, dilation)
    return of_difference.sum(2).to(centre.dtype), -of_around.to(around.dtype)


def pairwise_attention(
    of_y: Tensor,
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
) -> tuple[Tensor, ...]:
    """The gradients of ``centre`` … ``bias`` of :func:`kernels.reference.pairwise_attention`, first result.

    Args:
        mean, variance: what the norm used; whether of the batch says ``batch_statistics``.
    """
    window = (kernel_size, stride, dilation)
    a = (centre.unsqueeze(2) + footprint(around, kernel_size, stride, 0, dilation)).relu()
    h = torch.einsum("ri,nikhw->nrkhw", mix, a)
    rstd = torch.rsqrt(variance + eps)
    normed = (h - per_channel(mean, 3)) * per_channel(rstd, 3)
    b = (normed * per_channel(gamma, 3) + per_channel(beta, 3)).relu()
    weight = (torch.einsum("or,nrkhw->nokhw", to_weight, b) + per_channel(bias, 3)).softmax(2)

    of_value, of_weight = aggregation(
        of_y.to(weight.dtype), value.to(weight.dtype), weight.flatten(3), *window
    )
    of_weight = of_weight.view_as(weight)
    of_logits = weight * (of_weight - (weight * of_weight).sum(2, keepdim=True))
    of_norm = torch.einsum("or,nokhw->nrkhw", to_weight, of_logits) * (b > 0)
    of_gamma, of_beta = ((of_norm * x).sum((0, 2, 3, 4)) for x in (normed, torch.ones_like(normed)))
    of_h = of_norm
    if batch_statistics:
        count = h[:, 0].numel()
        of_h = of_norm - per_channel(of_beta / count, 3) - normed * per_channel(of_gamma / count, 3)
    of_h = of_h * per_channel(gamma * rstd, 3)
    of_a = torch.einsum("ri,nrkhw->nikhw", mix, of_h) * (a > 0)
    return (
        of_a.sum(2),
        spread(of_a, around.shape[2:], *window),
        of_value.to(value.dtype),
        torch.einsum("nrkhw,nikhw->ri", of_h, a),
        of_gamma,
        of_beta,
        torch.einsum("nokhw,nrkhw->or", of_logits, b),
        of_logits.sum((0, 2, 3, 4)),
    )


def mix_patches(
    of_h: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mix: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, scale, shift and mix of :func:`kernels.reference.mix_patches`."""
    near = footprint(x.to(scale.dtype), kernel_size, stride, 0, dilation)
    a = (near * scale[..., None, None] + shift[..., None, None]).relu()
    of_h = of_h.to(scale.dtype)
    of_norm = torch.einsum("ork,nohw->nrkhw", mix, of_h) * (a > 0)
    of_x = spread(of_norm * scale[..., None, None], x.shape[2:], kernel_size, stride, dilation)
    of_mix = torch.einsum("nohw,nrkhw->ork", of_h, a)
    return of_x.to(x.dtype), (of_norm * near).sum((0, 3, 4)), of_norm.sum((0, 3, 4)), of_mix


def bilinear_transform(of_y: Tensor, x: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, P and Q of :func:`kernels.reference.bilinear_transform`."""
    groups, rows, columns = p.shape[1], p.shape[-1], q.shape[-1]

    def matrices(maps: Tensor) -> Tensor:
        """Every X of a map: (N, k, C/k, t, u, rows, columns)."""
        cells = maps.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).unflatten(1, (groups, -1))
        return cells.permute(0, 1, 2, 4, 6, 3, 5)

    at_x, at_y = matrices(x), matrices(of_y)
    of_p = torch.einsum("ngctuik,ngctujl,nglk->ngij", at_y, at_x, q)
    of_q = torch.einsum("ngij,ngctujl,ngctuik->nglk", p, at_x, at_y)
    return reference.bilinear_transform(of_y, p.mT, q.mT), of_p, of_q


def spread(x: Tensor, sides: Sequence[int], kernel_size: int, stride: int, dilation: int) -> Tensor:
    """The gradient of :func:`kernels.reference.footprint` without padding: (N, C, K, H', W') → (N, C, \\*sides)."""
    total = x.new_zeros((*x.shape[:2], *sides))
    rows, columns = (stride * (side - 1) + 1 for side in x.shape[3:])
    for position, part in enumerate(x.unbind(2)):
        u, v = (dilation * offset for offset in divmod(position, kernel_size))
        total[:, :, u : u + rows : stride, v : v + columns : stride] += part
    return total
