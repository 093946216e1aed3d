"""Bilinear attentional transforms (BAT) of clips: in the plane of every frame, and along time.

Chi et al., "Non-Local Neural Networks With Grouped Bilinear Attentional Transforms", CVPR 2020. The video
programs differ from the image ones (:mod:`common.attention.bat`): softmax for sigmoid, and larger maps have
larger matrices, which is what makes fully-convolutional testing possible.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attention.bat import bilinear_transform, check_groups, reduced, resample
from common.frames import FrameConv3d, FrameNorm, clips, frames
from kernels import bat


def temporal_transform(x: Tensor, m: Tensor) -> Tensor:
    """``(M ⊗ I) · x`` along time for every channel and pixel, with neither the product nor copies of M formed.

    With r = T/s, ``y[i·r + a] = Σ_j M[i, j] · x[j·r + a]``: one s×s contraction over a view of x.

    Args:
        x: (N, C, T, H, W), T a multiple of s.
        m: (N, k, s, s); group g of k serves the channels g·C/k … (g+1)·C/k − 1.

    Returns:
        (N, C, T, H, W).
    """
    if bat.runs(x.device, m.shape[-1], 1, x.dtype):
        return bat.temporal_transform(x, m)
    n, channels, length, *space = x.shape
    groups, size = m.shape[1], m.shape[-1]
    split = x.reshape(n, groups, channels // groups, size, length // size, *space)
    time_first = split.transpose(2, 3).reshape(n * groups, size, -1)
    y = torch.bmm(m.reshape(n * groups, size, size), time_first)
    y = y.reshape(n, groups, size, channels // groups, length // size, *space)
    y = y.permute(0, 2, 4, 1, 3, 5, 6).reshape(n * length, channels, *space)
    return clips(y, length)


def overlay(windows: Tensor) -> Tensor:
    """Put small matrices along the diagonal of a large one, each a step further, and average where they overlap.

    Args:
        windows: (…, s, s, w); window i stands at the offset (i, i).

    Returns:
        (…, m, m), m = s + w − 1; zero where no window is.
    """
    side, count = windows.shape[-2:]
    if count == 1:
        return windows.squeeze(-1)
    places = [(i, count - 1 - i) * 2 for i in range(count)]
    total = torch.stack([F.pad(w, place) for w, place in zip(windows.unbind(-1), places)]).sum(0)
    one = windows.new_ones(side, side)
    covered = torch.stack([F.pad(one, place) for place in places]).sum(0)
    return total / covered.clamp(min=1)


def matrix_side(side: int, size: int) -> int:
    """m, the side of P for a map of ``side`` rows (of Q, for its columns): ``side // (side // size)``."""
    return side // (side // size)


def fitting_side(side: int, size: int) -> int:
    """``side`` where m divides it, else the next multiple of ``size``."""
    if side >= size and side % matrix_side(side, size) == 0:
        return side
    return next_multiple(side, size)


def next_multiple(length: int, size: int) -> int:
    """The least multiple of ``size`` that is at least ``length``."""
    return -(-length // size) * size


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """1×1×1 convolution with bias, batch norm, ReLU."""
    return nn.Sequential(FrameConv3d(in_channels, out_channels, 1), FrameNorm(out_channels), nn.ReLU())


class BilinearTransform3d(nn.Module):
    """The transform of every frame by its own P and Q, then along time by the clip's M.

    P is m×m for a map of H = m·t rows, with t = H // s: s×s where H is a multiple of s. Where m > s (8 for 16
    and 32 rows) it is made of the m − s + 1 windows of :func:`overlay`. Likewise Q for the columns.

    A map that m does not divide is resampled to the next multiple of ``size``, and with ``time_groups`` a clip
    that ``time_size`` does not divide to the next multiple of that: linearly in each axis
    (``align_corners=False``), transformed, and resampled back before the last convolution. (The published
    program has no such inputs.) H and W may differ.

    Args:
        channels: C.
        size: s.
        groups: k, pairs of P and Q for a frame; each serves C/k consecutive channels.
        time_size: side of M.
        time_groups: matrices M for a clip; each serves C/``time_groups`` consecutive channels. 0: no temporal
            transform.

    Raises:
        ValueError: ``groups`` or ``time_groups`` does not divide ``channels``.
    """

    def __init__(
        self, channels: int, size: int = 7, groups: int = 8, time_size: int = 4, time_groups: int = 0
    ) -> None:
        super().__init__()
        check_groups(channels, groups)
        if min(size, time_size) < 1:
            raise ValueError(f"size={size}, time_size={time_size}: must be 1 or more")
        self.size, self.groups, self.time_size, self.time_groups = size, groups, time_size, time_groups
        self.conv1 = conv_bn_relu(channels, groups)
        self.conv_p = FrameConv3d(groups, size * size * groups, (1, size, 1))
        self.conv_q = FrameConv3d(groups, size * size * groups, (1, 1, size))
        if time_groups:
            check_groups(channels, time_groups)
            self.conv_t = FrameConv3d(groups, time_size * time_size * time_groups, (time_size, 1, 1))
        self.conv2 = conv_bn_relu(channels, channels)
        reset_parameters(self)

    def matrices(self, o: Tensor) -> tuple[Tensor, Tensor]:
        """``conv1``'s maps (N, k, T, H, W) → P and Q of every frame, (N·T, k, m, m), of H and of W.

        The rows of P, and the columns of Q, are positive and sum to 1.
        """
        high, wide = (matrix_side(side, self.size) for side in o.shape[3:])
        rows = o.unflatten(3, (high, -1)).amax((4, 5))
        columns = o.unflatten(4, (wide, -1)).amax((3, 5))
        p = self._overlaid(self.conv_p(rows.unsqueeze(4)))
        q = self._overlaid(self.conv_q(columns.unsqueeze(3)))
        return p.softmax(3), q.softmax(2)

    def _overlaid(self, windows: Tensor) -> Tensor:
        return overlay(frames(windows).flatten(2).unflatten(1, (self.groups, self.size, self.size)))

    def time_matrices(self, o: Tensor) -> Tensor:
        """``conv1``'s maps (N, k, T, H, W) → M, (N, time_groups, s, s), whose rows are positive and sum to 1."""
        cells = o.unflatten(2, (self.time_size, -1)).mean((3, 4, 5))
        m = self.conv_t(cells[..., None, None]).flatten(1)
        return m.unflatten(1, (self.time_groups, self.time_size, self.time_size)).softmax(3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, C, T, H, W)."""
        # A length of a range is a plain number: torch.compile makes a graph for each size. With sizes as symbols,
        # which the number of windows does not allow anyway, it takes minutes for one block (torch 2.14).
        given = [len(range(side)) for side in x.shape[2:]]
        x = self.fitted(x, *given)
        o = self.conv1(x)
        y = clips(bilinear_transform(frames(x), *self.matrices(o)), x.shape[2])
        if self.time_groups:
            y = temporal_transform(y, self.time_matrices(o))
        return self.conv2(resample(y, given))

    def fitted(self, x: Tensor, length: int, height: int, width: int) -> Tensor:
        """``x``, of these sides, resampled where it must be to sides that the matrices fit."""
        if self.time_groups:
            length = next_multiple(length, self.time_size)
        return resample(x, [length, fitting_side(height, self.size), fitting_side(width, self.size)])

    def extra_repr(self) -> str:
        return (
            f"size={self.size}, groups={self.groups}, "
            f"time_size={self.time_size}, time_groups={self.time_groups}"
        )


class BATBlock3d(nn.Module):
    """A residual block around the transform: ``x + dropout(expand(transform(reduce(x))))``.

    Args:
        channels: C, of input and output.
        reduction: the transform works on C / ``reduction`` channels.
        size, groups, time_size, time_groups: see :class:`BilinearTransform3d`.
        dropout: probability of dropping a whole channel of the residual branch.

    Raises:
        ValueError: ``reduction`` does not divide ``channels``, or the groups do not divide the result.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 2,
        size: int = 7,
        groups: int = 8,
        time_size: int = 4,
        time_groups: int = 0,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        inner = reduced(channels, reduction)
        self.conv1 = conv_bn_relu(channels, inner)
        self.batransform = BilinearTransform3d(inner, size, groups, time_size, time_groups)
        self.conv2 = conv_bn_relu(inner, channels)
        self.dropout = nn.Dropout3d(dropout)
        reset_parameters(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, C, T, H, W)."""
        return x + self.dropout(self.conv2(self.batransform(self.conv1(x))))


def reset_parameters(block: nn.Module) -> None:
    """Kaiming-normal weights, fan-out, ReLU, and zero biases in every convolution; batch norms are left alone."""
    for layer in block.modules():
        if isinstance(layer, nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
