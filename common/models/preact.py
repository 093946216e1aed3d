"""Pre-activation residual units and networks (He, Zhang, Ren and Sun, "Identity Mappings in Deep Residual
Networks", ECCV 2016, arXiv 1603.05027)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from common.models.convnet import ConvNet


class PreActUnit(nn.Module):
    """``shortcut + conv(act(norm(…)))``, twice 3×3, or 1×1, 3×3, 1×1 at a quarter of the width.

    Args:
        in_channels, channels: of input and output.
        stride: of the whole unit.
        project: the shortcut is a 1×1 convolution of the first activation; else the input itself.
        bottleneck: three convolutions, not two.
        strided: index of the convolution that has the stride.
        bias: of all convolutions.
        eps: of the batch norms.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        project: bool,
        bottleneck: bool,
        strided: int,
        bias: bool,
        eps: float,
    ) -> None:
        super().__init__()
        inner = channels // 4
        widths = (in_channels, inner, inner, channels) if bottleneck else (in_channels, channels, channels)
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, eps=eps) for width in widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], k, stride if i == strided else 1, k // 2, bias=bias)
            for i, k in enumerate(kernels)
        )
        self.act = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=bias) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) → (N, channels, H / stride, W / stride)."""
        y = self.act(self.norms[0](x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.convs[0](y)
        for norm, conv in zip(self.norms[1:], self.convs[1:]):
            y = conv(self.act(norm(y)))
        return y + shortcut


def preact_resnet(
    stem: nn.Module,
    stem_info: list[dict[str, Any]],
    in_channels: int,
    reduction: int,
    units: Sequence[int],
    widths: Sequence[int],
    eps: float,
    last_act: type[nn.Module],
    **kwargs: Any,
) -> ConvNet:
    """Stages of :class:`PreActUnit` on a stem, a last batch norm and activation, and a head.

    Every stage but the first halves the size; the first unit of every stage projects its shortcut.

    Args:
        stem, in_channels, reduction: the stem, its output's channels and stride.
        stem_info: timm's feature information of the stem.
        units, widths: per stage.
        eps: of the batch norms.
        last_act: what follows the last batch norm: ReLU, or tanh in an FBN network.
        kwargs: ``bottleneck``, ``strided`` and ``bias`` of the units; the others are :class:`ConvNet`'s.
    """
    of_units = {name: kwargs.pop(name) for name in ("bottleneck", "strided", "bias")}
    stages, info = [], list(stem_info)
    for i, (count, width) in enumerate(zip(units, widths)):
        stride = 1 if i == 0 else 2
        first = PreActUnit(in_channels, width, stride, project=True, eps=eps, **of_units)
        others = (PreActUnit(width, width, 1, project=False, eps=eps, **of_units) for _ in range(count - 1))
        stages.append([first, *others])
        in_channels, reduction = width, reduction * stride
        info.append({"num_chs": width, "reduction": reduction, "module": f"stages.{i}"})
    norm = nn.Sequential(nn.BatchNorm2d(in_channels, eps=eps), last_act())
    info[-1]["module"] = "norm.1"
    return ConvNet(stem, stages, norm, info, **kwargs)
