"""Factorized bilinear (FB) layers: pairwise interactions of inputs through low-rank factors, with DropFactor.

Li, Wang, Xu and Hou, "Factorized Bilinear Models for Image Recognition", ICCV 2017, arXiv 1611.05709.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import gcd, sqrt
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import fbn

# Products held at a time, per position: as much as a feature map of so many channels. Elsewhere than on a CPU more,
# to start fewer kernels.
PRODUCTS = {"cpu": 2048}
PRODUCTS_ELSEWHERE = 8192
EVAL_SCALES = ("unbiased", "published")


def factorized_bilinear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    kernel_size: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    keep_diagonal: bool = False,
    published_gradient: bool = False,
) -> Tensor:
    """The FB layer: the paper's bilinear term, without the squares of single inputs.

    With ``v`` the (c, kh, kw)-ordered column of inputs at a position and ``A_j = mask ⊙ weight_j``::

        out_j = ‖A_j v‖² − Σ_c (Σ_k A_j[k, c]²) v_c² + bias_j

    Args:
        x: (N, C, H, W).
        weight: (J outputs, K factors, C / groups · kh · kw).
        bias: (J).
        mask: (K), scales the factors; None is all ones. Gets no gradient.
        kernel_size, stride, padding, dilation, groups: as of a convolution.
        keep_diagonal: keep the squares of single inputs, as the paper does: ``out_j = ‖A_j v‖² + bias_j``.
        published_gradient: the published operator's gradient by ``x``, for comparisons: wrong, because its
            diagonal term lacks the factor ``v_c``.

    Returns:
        (N, J, H', W'), channels last in memory; under autocast in autocast's dtype, else in that of ``x``.
    """
    if _autocast_available(x) and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows, size = _rows(x, kernel_size, stride, padding, dilation, groups)
    squared_mask = weight.new_ones(weight.shape[1]) if mask is None else mask.detach().square()
    out = _Bilinear.apply(
        rows, weight.unflatten(0, (groups, -1)), squared_mask, keep_diagonal, published_gradient
    )
    out = out.transpose(0, 1).reshape(x.shape[0], *size, weight.shape[0]).permute(0, 3, 1, 2)
    return out if bias is None else out + bias.to(out.dtype).view(-1, 1, 1)


class FactorizedBilinear(nn.Module):
    """The FB layer with DropFactor; see :func:`factorized_bilinear`.

    DropFactor draws one mask of K factors a forward pass, for all outputs, positions and images: in training
    ``Bernoulli(1 − drop) / sqrt(1 − drop)``. It is drawn on the input's device from that device's default
    generator, so a restored generator state gives the same masks, and of several processes each draws its
    own mask from its own generator.

    Args:
        in_channels, out_channels: C and J.
        factors: K, the rank of the interactions.
        kernel_size, stride, padding, dilation, groups: as of a convolution.
        drop: DropFactor's rate, in [0, 1).
        keep_diagonal: keep the squares of single inputs.
        eval_scale: what evaluation multiplies the factors with. ``"unbiased"``: 1, the expectation of
            training. ``"published"``: sqrt(1 − drop), as the published operator does, whose bilinear term so
            shrinks by 1 − drop between training and evaluation.

    Raises:
        ValueError: an argument is out of range, or the channels do not divide among the groups.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        factors: int = 20,
        kernel_size: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        drop: float = 0.5,
        keep_diagonal: bool = False,
        eval_scale: str = "unbiased",
    ) -> None:
        super().__init__()
        _check(in_channels, out_channels, factors, groups, drop, eval_scale)
        self.in_channels, self.out_channels, self.factors = in_channels, out_channels, factors
        self.kernel_size, self.stride = to_2tuple(kernel_size), to_2tuple(stride)
        self.padding, self.dilation, self.groups = to_2tuple(padding), to_2tuple(dilation), groups
        self.drop, self.keep_diagonal, self.eval_scale = drop, keep_diagonal, eval_scale
        column = in_channels // groups * self.kernel_size[0] * self.kernel_size[1]
        self.weight = nn.Parameter(torch.empty(out_channels, factors, column))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of deviation sqrt(2 / (K · column)), zero bias."""
        nn.init.normal_(self.weight, std=sqrt(2 / self.weight[0].numel()))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, J, H', W')."""
        return factorized_bilinear(
            x,
            self.weight,
            self.bias,
            self.mask(),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.keep_diagonal,
        )

    def mask(self) -> Tensor | None:
        """DropFactor's mask for one forward pass, (K), newly drawn in training; None is all ones."""
        keep = 1 - self.drop
        if self.training and self.drop:
            kept = torch.rand(self.factors, device=self.weight.device) < keep
            return kept.to(self.weight.dtype) / sqrt(keep)
        if self.eval_scale == "published" and not self.training:
            return self.weight.new_full((self.factors,), sqrt(keep))
        return None

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, factors={self.factors}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, groups={self.groups}, drop={self.drop}"
        )


class FBNHead(nn.Module):
    """Class maps, a linear and an FB term at every position, averaged to logits.

    The FB term squares its inputs, so they should be bounded: FBN networks end in tanh, not in ReLU.

    Args:
        in_features: channels C of the features.
        num_classes: logits per image.
        factors, drop, keep_diagonal, eval_scale: of the :class:`FactorizedBilinear` layer.
        tanh: apply tanh to the features here, for a backbone that does not end in one.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        factors: int = 20,
        drop: float = 0.5,
        keep_diagonal: bool = False,
        eval_scale: str = "unbiased",
        tanh: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.num_classes, self.tanh = in_features, num_classes, tanh
        self.bilinear = FactorizedBilinear(
            in_features, num_classes, factors, drop=drop, keep_diagonal=keep_diagonal, eval_scale=eval_scale
        )
        self.fc = nn.Conv2d(in_features, num_classes, 1)
        nn.init.kaiming_normal_(self.fc.weight, nonlinearity="relu")
        if self.fc.bias is not None:
            nn.init.zeros_(self.fc.bias)

    def class_maps(self, features: Tensor) -> Tensor:
        """(N, C, \\*positions), any number of position dimensions → (N, classes, \\*positions)."""
        x = features.flatten(2).unsqueeze(-1)
        x = x.tanh() if self.tanh else x
        return (self.fc(x) + self.bilinear(x)).reshape(x.shape[0], self.num_classes, *features.shape[2:])

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, \\*positions) → logits (N, classes)."""
        return self.class_maps(features).flatten(2).mean(2)

    def pairs(self, features: Tensor, index: int) -> Tensor:
        """What every pair of features adds to the logit of class ``index`` by the FB term.

        (N, C, \\*positions) → (N, C, C), symmetric: a pair adds the sum of its two entries. The sum over all is the
        FB term's part of the logit in evaluation, without the bias.
        """
        x = features.flatten(2)
        x = x.tanh() if self.tanh else x
        factors, mask = self.bilinear.weight[index], self.bilinear.mask()
        factors = factors if mask is None else factors * mask[:, None]
        pairs = factors.mT @ factors * (x @ x.mT / x.shape[2])
        return pairs if self.bilinear.keep_diagonal else pairs - torch.diag_embed(pairs.diagonal(0, 1, 2))


class _Bilinear(torch.autograd.Function):
    """The FB form of rows: one matrix product with all factors, squared and summed a few outputs at a time.

    rows (G, M, C), weight (G, J, K, C), squared_mask (K) → (G, M, J). The products of rows and factors,
    (G, M, J, K), are never whole in memory and not kept: the backward pass makes them anew.
    Half-precision rows are summed in float32, and ``weight`` keeps its own precision outside the products.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, squared_mask: Tensor, keep_diagonal: bool, published: bool
    ) -> Tensor:
        with _without_autocast(rows):
            power = squared_mask.to(_sum_dtype(rows))
            parts = [weight[:, part] for part in _parts(weight)]
            out = torch.cat([_square_sums(rows, w, power) for w in parts], -1)
            diagonal = None
            if not keep_diagonal:
                diagonal = torch.cat([_diagonal(rows, w, power) for w in parts], 1)
                out = out - _squares(rows) @ diagonal.mT
        ctx.published = published
        ctx.save_for_backward(rows, weight, power, diagonal)
        return out.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, power, diagonal = ctx.saved_tensors
        for_rows, for_weight = ctx.needs_input_grad[:2]
        with _without_autocast(rows):
            grad = grads[0].to(power.dtype)
            moments = None if diagonal is None else grad.mT @ _squares(rows)
            grad_rows = torch.zeros_like(rows, dtype=power.dtype) if for_rows else None
            grad_weight = torch.empty_like(weight) if for_weight else None
            for part in _parts(weight):
                w = weight[:, part]
                # d loss / d products, (G, M, outputs · K)
                slope = _slopes(rows, w, power, grad[..., part]).flatten(2)
                if grad_rows is not None:
                    grad_rows += slope @ w.flatten(1, 2).to(rows.dtype)
                if grad_weight is not None:
                    of_factors = (slope.mT @ rows).view_as(w).to(power.dtype)
                    if moments is not None:
                        of_factors -= 2 * power[:, None] * w * moments[:, part, None]
                    grad_weight[:, part] = of_factors
            if grad_rows is not None and diagonal is not None:
                of_diagonal = 2 * (grad @ diagonal)
                grad_rows -= of_diagonal if ctx.published else of_diagonal * rows
        return None if grad_rows is None else grad_rows.to(rows.dtype), grad_weight, None, None, None


def _products(rows: Tensor, weight: Tensor) -> Tensor:
    """(G, M, C) by (G, J, K, C) → new (G, M, J, K)."""
    products = rows @ weight.flatten(1, 2).to(rows.dtype).mT
    return products.unflatten(-1, weight.shape[1:3])


def _square_sums(rows: Tensor, weight: Tensor, power: Tensor) -> Tensor:
    """``Σ_k power_k · products²``, (G, M, J), of the dtype for sums."""
    products = _products(rows, weight)
    if fbn.runs(rows.device, rows.dtype):
        return fbn.square_sum(products, power)
    return products.to(power.dtype).square_() @ power  # in place: `products` is ours


def _slopes(rows: Tensor, weight: Tensor, power: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the products of which :func:`_square_sums` has the gradient ``grad``, of the rows' dtype."""
    products = _products(rows, weight)
    if fbn.runs(rows.device, rows.dtype):
        return fbn.square_sum_gradient(grad, products, power)
    return products.to(power.dtype).mul_(grad.unsqueeze(-1)).mul_(2 * power).to(rows.dtype)


def _diagonal(rows: Tensor, weight: Tensor, power: Tensor) -> Tensor:
    """``Σ_k m_k² weight[..., k, c]²``, of the weights as the products see them: (G, J, C)."""
    return power @ weight.to(rows.dtype).to(power.dtype).square()


def _squares(rows: Tensor) -> Tensor:
    return rows.to(_sum_dtype(rows)).square()


def _parts(weight: Tensor) -> list[slice]:
    """The outputs of (G, J, K, C) in slices of at most so many products a position, or one output."""
    groups, outputs, factors, _ = weight.shape
    at_once = PRODUCTS.get(weight.device.type, PRODUCTS_ELSEWHERE)
    size = max(1, at_once // (groups * factors))
    return [slice(start, start + size) for start in range(0, outputs, size)]


def _rows(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
    groups: int,
) -> tuple[Tensor, tuple[int, int]]:
    """(N, C, H, W) → columns of inputs as rows (groups, N·H'·W', C / groups · kh · kw), and (H', W')."""
    kernel, step, pad, spread = (to_2tuple(v) for v in (kernel_size, stride, padding, dilation))
    height, width = (
        (x.shape[2 + i] + 2 * pad[i] - spread[i] * (kernel[i] - 1) - 1) // step[i] + 1 for i in (0, 1)
    )
    if kernel == (1, 1) and pad == (0, 0):
        columns = x[:, :, :: step[0], :: step[1]].flatten(2)
    else:
        columns = F.unfold(x, kernel, spread, pad, step)
    rows = columns.unflatten(1, (groups, -1)).permute(1, 0, 3, 2)
    return rows.reshape(groups, -1, rows.shape[-1]), (height, width)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _autocast_available(x: Tensor) -> bool:
    return torch.amp.is_autocast_available(x.device.type)


def _without_autocast(x: Tensor) -> AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False) if _autocast_available(x) else nullcontext()


def _check(
    in_channels: int, out_channels: int, factors: int, groups: int, drop: float, eval_scale: str
) -> None:
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("factors", factors)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be 1 or more")
    if groups < 1 or in_channels % groups or out_channels % groups:
        common = gcd(in_channels, out_channels)
        right = [g for g in range(1, common + 1) if common % g == 0]
        raise ValueError(
            f"groups={groups} does not divide in_channels={in_channels} and out_channels={out_channels}: "
            f"{right} would"
        )
    if not 0 <= drop < 1:
        raise ValueError(f"drop={drop}: must be in [0, 1)")
    if eval_scale not in EVAL_SCALES:
        raise ValueError(f"eval_scale={eval_scale!r}: must be one of {EVAL_SCALES}")
