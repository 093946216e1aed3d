"""Bilinear attentional transforms (BAT): a feature map moved about by two small matrices made from itself.

Chi et al., "Non-Local Neural Networks With Grouped Bilinear Attentional Transforms", CVPR 2020.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.bat import bilinear_transform


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """1×1 convolution with bias, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class BilinearTransform(nn.Module):
    """The transform with its matrices: P and Q come from the input's own row and column maxima.

    A map whose sides are not multiples of ``size`` is resampled bilinearly (``align_corners=False``) to the
    next multiples, ``size · ceil(H / size)`` by ``size · ceil(W / size)``, transformed, and resampled back
    before the last convolution. (The published program has no such inputs.) H and W may differ.

    Args:
        channels: C.
        size: s, side of P and Q.
        groups: k, pairs of P and Q; each serves C/k consecutive channels.

    Raises:
        ValueError: ``groups`` does not divide ``channels``.
    """

    def __init__(self, channels: int, size: int = 7, groups: int = 4) -> None:
        super().__init__()
        check_groups(channels, groups)
        if size < 1:
            raise ValueError(f"size={size}: must be 1 or more")
        self.size, self.groups = size, groups
        self.conv1 = conv_bn_relu(channels, groups)
        self.conv_p = nn.Conv2d(groups, size * size * groups, (size, 1))
        self.conv_q = nn.Conv2d(groups, size * size * groups, (1, size))
        self.conv2 = conv_bn_relu(channels, channels)
        init_convs(self)

    def fitted(self, x: Tensor) -> Tensor:
        """``x`` resampled, where it must be, to sides that are multiples of ``size``."""
        return resample(x, [-(-side // self.size) * self.size for side in x.shape[2:]])

    def matrices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W), H and W multiples of s → P and Q, both (N, k, s, s).

        The rows of P, and the columns of Q, are positive and sum to 1.
        """
        s, k = self.size, self.groups
        cells = self.conv1(x).unflatten(3, (s, -1)).unflatten(2, (s, -1))  # (N, k, s, t, s, u)
        p = self.conv_p(cells.amax((3, 4, 5)).unsqueeze(3)).view(-1, k, s, s)
        q = self.conv_q(cells.amax((2, 3, 5)).unsqueeze(2)).view(-1, k, s, s)
        # sigmoid(a) / Σ sigmoid(a), in the form that cannot become 0 / 0 in half precision.
        return F.logsigmoid(p).softmax(3), F.logsigmoid(q).softmax(2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        fitted = self.fitted(x)
        y = bilinear_transform(fitted, *self.matrices(fitted))
        return self.conv2(resample(y, x.shape[2:]))

    def extra_repr(self) -> str:
        return f"size={self.size}, groups={self.groups}"


class BATBlock(nn.Module):
    """A residual block around the transform: ``x + dropout(expand(transform(reduce(x))))``.

    Args:
        channels: C, of input and output.
        reduction: the transform works on C / ``reduction`` channels.
        size, groups: see :class:`BilinearTransform`.
        dropout: probability of dropping a whole channel of the residual branch.

    Raises:
        ValueError: ``reduction`` does not divide ``channels``, or ``groups`` does not divide the result.
    """

    def __init__(
        self, channels: int, reduction: int = 2, size: int = 7, groups: int = 4, dropout: float = 0.2
    ) -> None:
        super().__init__()
        inner = reduced(channels, reduction)
        self.conv1 = conv_bn_relu(channels, inner)
        self.batransform = BilinearTransform(inner, size, groups)
        self.conv2 = conv_bn_relu(inner, channels)
        self.dropout = nn.Dropout2d(dropout)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        return x + self.dropout(self.conv2(self.batransform(self.conv1(x))))


def resample(x: Tensor, size: list[int] | torch.Size) -> Tensor:
    """(N, C, [T,] H, W) → (N, C, \\*size), linear in each axis; ``x`` itself where it has that size."""
    if list(x.shape[2:]) == list(size):
        return x
    mode = "bilinear" if x.ndim == 4 else "trilinear"
    return F.interpolate(x, size=list(size), mode=mode, align_corners=False)


def init_convs(module: nn.Module) -> None:
    """Kaiming-normal weights, fan-out, ReLU, in every convolution; biases keep torch's own initialisation."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def reduced(channels: int, reduction: int) -> int:
    """``channels / reduction``, or a ValueError that says which reductions divide."""
    if reduction < 1 or channels % reduction:
        raise ValueError(
            f"reduction={reduction} does not divide channels={channels}: use one of {divisors(channels)}"
        )
    return channels // reduction


def check_groups(channels: int, groups: int) -> None:
    """Raise a ValueError that says which ``groups`` divide ``channels``, unless these do."""
    if groups < 1 or channels % groups:
        raise ValueError(
            f"groups={groups} does not divide channels={channels}: use one of {divisors(channels)}"
        )


def divisors(n: int) -> list[int]:
    """All of them, rising: 6 → [1, 2, 3, 6]."""
    return [d for d in range(1, n + 1) if n % d == 0]
