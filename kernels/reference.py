"""The operators as the papers write them: slow, plain, and the judge of everything faster.

Those of self-attention (Zhao, Jia, Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020, section 3)
slide a *footprint* of K = kernel_size² positions over a map, enumerated row by row. With
padding p, stride s and dilation d, footprint position (u, v) of the output pixel (h, w) is the map's pixel
(s·h + d·u − p, s·w + d·v − p); P = H'·W' counts the output pixels, H' = (H + 2p − d·(kernel_size − 1) − 1) // s + 1.
Outside the map lies either its mirror image (``reflect``; the border pixel is not repeated, and a footprint
larger than the map is reflected as often as it takes) or nothing but zeros (``zero``).

Every dtype and device, any order of derivatives.
A compiled kernel must give the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.checks import check_alike, check_footprint, check_norm, check_pairwise, check_weight
from kernels.footprint import same_padding


def subtraction(
    x: Tensor,
    kernel_size: int,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    pad_mode: str = "reflect",
) -> Tensor:
    """A map's value at the footprint's centre minus its value at each footprint position.

    Args:
        x: (N, C, H, W).
        kernel_size, stride, dilation: in pixels, at least 1.
        padding: pixels on each side, by default :func:`same_padding`.
        pad_mode: ``reflect`` or ``zero``.

    Returns:
        (N, C, K, P).

    Raises:
        ValueError: a shape, size or mode that makes no sense.
    """
    return subtraction2(x, x, kernel_size, stride, padding, dilation, pad_mode)


def subtraction2(
    a: Tensor,
    b: Tensor,
    kernel_size: int,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    pad_mode: str = "reflect",
) -> Tensor:
    """``a`` at the footprint's centre, position ((k−1)//2, (k−1)//2), minus ``b`` at each footprint position.

    Args:
        a, b: (N, C, H, W), of one dtype and device.

    Returns:
        (N, C, K, P); the other arguments and errors are those of :func:`subtraction`.
    """
    check_footprint("a", a, kernel_size, stride, padding, dilation, pad_mode)
    check_alike("a", a, "b", b)
    if a.shape != b.shape:
        raise ValueError(f"b has shape {tuple(b.shape)}, expected {tuple(a.shape)}, the shape of a")
    centre = (kernel_size - 1) // 2 * (kernel_size + 1)
    at_centre = footprint(a, kernel_size, stride, padding, dilation, pad_mode)[:, :, centre : centre + 1]
    return (at_centre - footprint(b, kernel_size, stride, padding, dilation, pad_mode)).flatten(3)


def aggregation(
    value: Tensor,
    weight: Tensor,
    kernel_size: int,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    pad_mode: str = "reflect",
) -> Tensor:
    """Weighted sum over the footprint; channel c of ``value`` uses weight channel c mod Cw.

    Args:
        value: (N, Cv, H, W).
        weight: (N, Cw, K, P), Cv a multiple of Cw, of the dtype and device of ``value``.

    Returns:
        (N, Cv, H', W'); the other arguments and errors are those of :func:`subtraction`.
    """
    check_footprint("value", value, kernel_size, stride, padding, dilation, pad_mode)
    check_weight(value, weight, kernel_size, stride, padding, dilation)
    neighbours = footprint(value, kernel_size, stride, padding, dilation, pad_mode)
    channels, _, height, width = neighbours.shape[1:]
    weight_channels = weight.shape[1]
    grouped = neighbours.unflatten(1, (channels // weight_channels, weight_channels))
    by_pixel = weight.unflatten(3, (height, width)).unsqueeze(1)
    return (grouped * by_pixel).sum(3).flatten(1, 2)


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
    stride: int = 1,
    dilation: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairwise self-attention from two maps that are to be compared (section 3.1), without a map's padding.

    For output pixel i and the pixel q at a position of its footprint: ``a = relu(centre[i] + around[q])``,
    ``h = mix · a``, ``b = relu(norm(h))``, ``l = to_weight · b + bias``, a softmax of l over the footprint, and with
    it the sum of ``value`` over the footprint. A batch norm before the first relu is a scale and shift of both maps.

    Args:
        centre: (N, I, H', W').
        around: (N, I, H, W), padded already, H' = (H − dilation·(kernel_size − 1) − 1) // stride + 1.
        value: (N, C, H, W), padded alike; its dtype may be another.
        mix: (R, I).
        gamma, beta: (R,), the batch norm's.
        to_weight, bias: (Cw, R) and (Cw,); Cw divides C, channel c uses weight channel c mod Cw.
        mean, variance: (R,), statistics for the batch norm; None for those of this batch.

    Returns:
        (N, C, H', W') of the dtype of ``value``; (N, Cw, H', W') the logarithm of each softmax's sum; (R,) and (R,)
        the mean and the biased variance that the norm used.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_pairwise(centre, around, value, mix, gamma, beta, to_weight, bias, kernel_size, stride, dilation)
    window = (kernel_size, stride, 0, dilation)
    a = (centre.unsqueeze(2) + footprint(around, *window)).relu()
    h = torch.einsum("ri,nikhw->nrkhw", mix, a)
    if mean is None or variance is None:
        variance, mean = torch.var_mean(h, (0, 2, 3, 4), correction=0)
    normed = (h - per_channel(mean, 3)) * per_channel(torch.rsqrt(variance + eps), 3)
    b = (normed * per_channel(gamma, 3) + per_channel(beta, 3)).relu()
    logits = torch.einsum("or,nrkhw->nokhw", to_weight, b) + per_channel(bias, 3)
    weight = logits.softmax(2).flatten(3)
    y = aggregation(value.to(weight.dtype), weight, *window).to(value.dtype)
    return y, logits.logsumexp(2), mean, variance


def norm_relu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    window: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm, ReLU and max pooling: (N, C, H, W) → (N, C, H // window, W // window).

    Args:
        gamma, beta, mean, variance: (C,), of float32 or finer; without the last two they are the batch's.
        window: side of what is pooled, in pixels; 1 for no pooling.

    Returns:
        The result, of the dtype of x, and the mean and the biased variance.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_norm(x, gamma, beta, mean, window)
    exact = x.to(gamma.dtype)
    if mean is None or variance is None:
        variance, mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    y = F.max_pool2d(
        (per_channel(gamma) * standardised(exact, mean, variance, eps) + per_channel(beta)).relu(), window
    )
    return y.to(x.dtype), mean, variance


def difference_moments(
    centre: Tensor, around: Tensor, kernel_size: int, stride: int = 1, dilation: int = 1
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of centre − footprint, over all pixels and positions, in float64.

    With m and q a footprint's mean and mean square, E[(c − f)²] = E[c² − 2·c·m + q], from means over footprints alone;
    in double precision, since these terms can be a thousand times their sum.

    Args:
        centre: (N, C, h, w).
        around: (N, C, H, W), padded already.
    """
    centre, around = centre.double(), around.double()
    reach = dilation * (kernel_size - 1) + 1
    local = torch.cat((around, around.square()), 1)
    for dim in (2, 3):
        local = local.unfold(dim, reach, stride)[..., ::dilation].mean(-1)
    local_mean, local_square = local.chunk(2, 1)
    mean = (centre - local_mean).mean((0, 2, 3))
    square = (centre.square() - 2 * centre * local_mean + local_square).mean((0, 2, 3))
    return mean, square - mean.square()


def mix_patches(
    x: Tensor, scale: Tensor, shift: Tensor, mix: Tensor, kernel_size: int, stride: int = 1, dilation: int = 1
) -> Tensor:
    """Footprints normed, through a ReLU and mixed to outputs: the first layer of patchwise attention's mapping.

    ``h[o, i] = Σ_r Σ_j mix[o, r, j] · relu(scale[r, j] · x[r, q] + shift[r, j])``, q under position j of pixel i's
    footprint (section 3.2, where a batch norm gives scale and shift).

    Args:
        x: (N, R, H, W), padded already.
        scale, shift: (R, K), float32 or finer as x.
        mix: (O, R, K), of their dtype.

    Returns:
        (N, O, H', W') of the dtype of x.
    """
    near = footprint(x.to(scale.dtype), kernel_size, stride, 0, dilation)
    a = (near * scale[..., None, None] + shift[..., None, None]).relu()
    return torch.einsum("ork,nrkhw->nohw", mix, a).to(x.dtype)


def bilinear_transform(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """``(P ⊗ I) · x · (Q ⊗ I)`` for every channel, with the Kronecker products never formed.

    With t = H/s and u = W/s, ``y[i·t + r, c·u + v] = Σ_j Σ_l P[i, j] · x[j·t + r, l·u + v] · Q[l, c]``:
    two s×s contractions over a view of x. The sides of P and Q may differ.

    Args:
        x: (N, C, H, W), H a multiple of P's side and W of Q's.
        p: (N, k, s, s), acts on the rows; group g of k serves the channels g·C/k … (g+1)·C/k − 1.
        q: (N, k, s, s), acts on the columns, in the same groups.

    Returns:
        (N, C, H, W).

    Chi et al., "Non-Local Neural Networks With Grouped Bilinear Attentional Transforms", CVPR 2020.
    """
    n, channels, height, width = x.shape
    groups, rows, columns = p.shape[1], p.shape[-1], q.shape[-1]
    split = (n, groups, channels // groups, rows, height // rows, columns, width // columns)
    rows_first = x.reshape(split).permute(0, 1, 3, 5, 2, 4, 6).reshape(n * groups, rows, -1)
    y = torch.bmm(p.reshape(n * groups, rows, rows), rows_first)
    # The right-hand contraction is also a left product, by Qᵀ, once the columns are the rows of a matrix.
    y = q.mT.reshape(n * groups, 1, columns, columns) @ y.reshape(n * groups, rows, columns, -1)
    y = y.reshape(n, groups, rows, columns, *split[2::2]).permute(0, 1, 4, 2, 5, 3, 6)
    y = y.reshape(n, channels, height, width)
    # With sides that vary, inductor (torch 2.14) cannot keep a view for a convolution's backward: make a tensor.
    return y.contiguous(memory_format=torch.channels_last) if torch.compiler.is_compiling() else y


def weighted_sum(query: Tensor, value: Tensor) -> Tensor:
    """``Σ_l softmax_l(query)[l] · value[l]``, the sum of NOAH's heads: (…, L) and (…, L) → (…).

    Li, Zhou and Yao, "NOAH: A New Head Structure To Improve Deep Neural Networks For Image Classification".
    """
    return (query.softmax(-1) * value).sum(-1)


def square_sum(products: Tensor, power: Tensor) -> Tensor:
    """``Σ_k power[k] · products[…, k]²``, the squares and sums of a factorized bilinear layer: (…, K), (K) → (…).

    Of the dtype of ``power``. Li, Wang, Xu and Hou, "Factorized Bilinear Models for Image Recognition", ICCV 2017.
    """
    return products.to(power.dtype).square() @ power


def footprint(
    x: Tensor,
    kernel_size: int,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    pad_mode: str = "reflect",
) -> Tensor:
    """The values under each footprint, (N, C, H, W) → (N, C, K, H', W')."""
    padding = same_padding(kernel_size, dilation) if padding is None else padding
    windows = pad(x, padding, pad_mode)
    for dim in (2, 3):
        windows = windows.unfold(dim, dilation * (kernel_size - 1) + 1, stride)[..., ::dilation]
    return windows.permute(0, 1, 4, 5, 2, 3).flatten(2, 3)


def standardised(x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """(N, C, H, W) with mean 0 and variance 1 per channel."""
    return (x - per_channel(mean)) * per_channel(torch.rsqrt(variance + eps))


def per_channel(x: Tensor, trailing: int = 2) -> Tensor:
    """(C,) → (C, 1, …) with ``trailing`` ones."""
    return x.view(-1, *[1] * trailing)


def pad(x: Tensor, padding: int, pad_mode: str = "reflect") -> Tensor:
    """(N, C, H, W) → (N, C, H + 2·padding, W + 2·padding)."""
    if pad_mode == "zero":
        return F.pad(x, (padding,) * 4)
    rows, columns = (reflected(side, padding, x.device) for side in x.shape[2:])
    return x.index_select(2, rows).index_select(3, columns)


def reflected(side: int, padding: int, device: torch.device) -> Tensor:
    """The pixel behind each position −padding … side + padding − 1: a triangular wave of period 2·(side − 1)."""
    position, period = torch.arange(-padding, side + padding, device=device), 2 * (side - 1)
    if period == 0:
        return torch.zeros_like(position)
    position = position % period
    return torch.minimum(position, period - position)
