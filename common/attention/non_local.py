"""Non-local blocks: every position of a feature map attends to every other.

Wang et al., "Non-local Neural Networks", CVPR 2018 (embedded Gaussian), as the BAT programs have it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attention.bat import divisors, reduced
from common.frames import FrameConv3d, FrameMaxPool, FrameNorm, clips, frames


class NonLocal(nn.Module):
    """``x + bn(z(g(x) · softmax(θ(x)ᵀ φ(x) / √c)ᵀ))`` over all H·W positions, with c = C / ``reduction``.

    θ, φ, g and z are 1×1 convolutions with bias, named ``t``, ``p``, ``g`` and ``z``. The batch norm's weight
    starts at zero, so that a new block is the identity.

    Args:
        channels: C, of input and output.
        reduction: C / c.

    Raises:
        ValueError: ``reduction`` does not divide ``channels``.
    """

    def __init__(self, channels: int, reduction: int = 2) -> None:
        super().__init__()
        inner = reduced(channels, reduction)
        self.t = nn.Conv2d(channels, inner, 1)
        self.p = nn.Conv2d(channels, inner, 1)
        self.g = nn.Conv2d(channels, inner, 1)
        self.z = nn.Conv2d(inner, channels, 1)
        self.bn = nn.BatchNorm2d(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal weights, fan-out, and zero biases; zero in the batch norm."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)

    def attention(self, x: Tensor) -> Tensor:
        """What each position (row) takes from each (column): (N, C, H, W) → (N, H·W, H·W), rows of sum 1."""
        return attention_weights(self.t(x).flatten(2).mT, self.p(x).flatten(2).mT)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        query, key, value = (conv(x).flatten(2).mT.unsqueeze(1) for conv in (self.t, self.p, self.g))
        y = F.scaled_dot_product_attention(query, key, value)  # (N, 1, H·W, c)
        y = y.squeeze(1).mT.unflatten(2, x.shape[2:])  # channels last in memory
        # With sides that vary, inductor (torch 2.14) cannot keep a view for a convolution's backward.
        y = y.contiguous() if torch.compiler.is_compiling() else y
        return x + self.bn(self.z(y))


class NonLocal3d(nn.Module):
    """``x + W(softmax(θ(x)ᵀ φ(x) / √c) g(x))`` over all T·H·W positions of a clip, with c = C / ``reduction``.

    θ, φ and g are 1×1×1 convolutions with bias, W such a convolution and a batch norm whose weight and bias
    start at zero, so that a new block is the identity. The names in the state dict are the published ones:
    ``theta``, ``phi``, ``g``, ``W``; ``phi.1`` and ``g.1`` with ``sub_sample``.

    Args:
        channels: C, of input and output.
        reduction: C / c.
        sub_sample: φ and g see the maps max-pooled by 2×2, a quarter of the positions.
        heads: attentions side by side, each over c / ``heads`` consecutive channels, scaled by their number.
        per_frame: every position attends to those of its own frame only (``nl2d``).

    Raises:
        ValueError: ``reduction`` does not divide ``channels``, or ``heads`` does not divide the result.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 2,
        sub_sample: bool = True,
        heads: int = 1,
        per_frame: bool = False,
    ) -> None:
        super().__init__()
        inner = reduced(channels, reduction)
        if heads < 1 or inner % heads:
            raise ValueError(f"heads={heads} does not divide {inner} channels: use one of {divisors(inner)}")
        self.heads, self.per_frame = heads, per_frame
        self.theta = FrameConv3d(channels, inner, 1)
        self.phi = _maybe_pooled(FrameConv3d(channels, inner, 1), sub_sample)
        self.g = _maybe_pooled(FrameConv3d(channels, inner, 1), sub_sample)
        self.W = nn.Sequential(FrameConv3d(inner, channels, 1), FrameNorm(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal weights, fan-out, of θ, φ and g, normal ones of std 0.01 of W; all others zero."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)
        nn.init.normal_(self.W.get_parameter("0.weight"), std=0.01)

    def attention(self, x: Tensor) -> Tensor:
        """What each position (row) takes from each (column), rows of sum 1.

        (N, C, T, H, W) → (N, heads, T·H·W, L) with L = T·H·W, or a quarter with ``sub_sample``; of each frame alone,
        (N·T, heads, H·W, L), with ``per_frame``.
        """
        return attention_weights(self._positions(self.theta(x)), self._positions(self.phi(x)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, C, T, H, W)."""
        query, key, value = (self._positions(conv(x)) for conv in (self.theta, self.phi, self.g))
        y = F.scaled_dot_product_attention(query, key, value).mT.flatten(1, 2)
        size = x.shape[2:]
        y = y.unflatten(2, size[1:]) if self.per_frame else frames(y.unflatten(2, size))
        # Channels last in memory; the convolution and norm give what the sum with x wants: its own format.
        y = y.contiguous() if frames(x).is_contiguous() else y
        return x + self.W(clips(y, size[0]))

    def _positions(self, x: Tensor) -> Tensor:
        """(N, c, T, H, W) → (N, heads, T·H·W, c / heads), or (N·T, heads, H·W, c / heads)."""
        x = frames(x) if self.per_frame else x
        return x.flatten(2).unflatten(1, (self.heads, -1)).mT


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """``softmax(query · keyᵀ / √c)``: (…, L, c) and (…, M, c) → (…, L, M)."""
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)


def _maybe_pooled(conv: nn.Module, pooled: bool) -> nn.Module:
    return nn.Sequential(FrameMaxPool(2, 2), conv) if pooled else conv
