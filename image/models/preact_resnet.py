"""Pre-activation ResNets for ImageNet, plain (``resnet50_preact``) and with an FBN head (``_fbn``)."""

from __future__ import annotations

import re
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from common.models.convnet import ConvNet, default_cfg, with_fbn
from common.models.mxnet import from_mxnet, head_layer
from common.models.preact import preact_resnet
from common.weights import StateDict, published_layout

UNITS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    269: (3, 30, 48, 8),
}
EPS = 2e-5

default_cfgs = generate_default_cfgs(
    {
        f"resnet{depth}_{kind}": default_cfg((3, 224, 224), "stem.conv", kind == "fbn", pool_size=(7, 7))
        for depth in UNITS
        for kind in ("preact", "fbn")
    }
)


@published_layout(*(f"resnet{depth}_{kind}" for depth in UNITS for kind in ("preact", "fbn")))
def from_published(state: StateDict) -> StateDict:
    """MXNet's names: ``stage1_unit1_conv1`` and the like; the gain of the input's norm, fixed at 1, is left out."""
    state = from_mxnet(state, _own_layer)
    state.pop("stem.input_norm.weight", None)
    return {re.sub(r"^(stem\.input_norm)\.running_", r"\1.norm.running_", k): v for k, v in state.items()}


def _own_layer(layer: str) -> str | None:
    ends = {"bn_data": "stem.input_norm", "conv0": "stem.conv", "bn0": "stem.norm", "bn1": "norm.0"}
    match = re.fullmatch(r"stage(\d)_unit(\d+)_(bn|conv|sc)(\d?)", layer)
    if match is None:
        return ends.get(layer) or head_layer(layer)
    unit = f"stages.{int(match[1]) - 1}.{int(match[2]) - 1}"
    if match[3] == "sc":
        return f"{unit}.shortcut"
    return f"{unit}.{match[3].replace('bn', 'norm')}s.{int(match[4]) - 1}"


class InputNorm(nn.Module):
    """Batch norm of the images whose gain is fixed at 1: only the offset is learnt."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=EPS, affine=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the same shape."""
        x = self.norm(x)
        return x + self.bias.to(x.dtype).view(-1, 1, 1)


def imagenet_preact_resnet(
    depth: int, in_chans: int = 3, last_act: type[nn.Module] = nn.ReLU, **kwargs: Any
) -> ConvNet:
    """A pre-activation ResNet; ``depth`` is a key of ``UNITS``, ``kwargs`` are :class:`ConvNet`'s."""
    stem = nn.Sequential(
        OrderedDict(
            input_norm=InputNorm(in_chans),
            conv=nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False),
            norm=nn.BatchNorm2d(64, eps=EPS),
            act=nn.ReLU(inplace=True),
            pool=nn.MaxPool2d(3, 2, 1),
        )
    )
    bottleneck = depth >= 50
    return preact_resnet(
        stem,
        [{"num_chs": 64, "reduction": 2, "module": "stem.act"}],
        in_channels=64,
        reduction=4,
        units=UNITS[depth],
        widths=(256, 512, 1024, 2048) if bottleneck else (64, 128, 256, 512),
        eps=EPS,
        last_act=last_act,
        bottleneck=bottleneck,
        strided=1 if bottleneck else 0,
        bias=False,
        **kwargs,
    )


def _plain(depth: int, pretrained: bool, **kwargs: Any) -> ConvNet:
    build = partial(imagenet_preact_resnet, depth)
    feature_cfg = {"flatten_sequential": True}
    return build_model_with_cfg(build, f"resnet{depth}_preact", pretrained, feature_cfg=feature_cfg, **kwargs)


def _fbn(depth: int, pretrained: bool, factors: int = 50, **kwargs: Any) -> ConvNet:
    build = partial(with_fbn, partial(imagenet_preact_resnet, depth), factors)
    feature_cfg = {"flatten_sequential": True}
    return build_model_with_cfg(build, f"resnet{depth}_fbn", pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def resnet18_preact(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """Pre-activation ResNet-18."""
    return _plain(18, pretrained, **kwargs)


@register_model
def resnet34_preact(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """Pre-activation ResNet-34."""
    return _plain(34, pretrained, **kwargs)


@register_model
def resnet50_preact(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """Pre-activation ResNet-50."""
    return _plain(50, pretrained, **kwargs)


@register_model
def resnet101_preact(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """Pre-activation ResNet-101."""
    return _plain(101, pretrained, **kwargs)


@register_model
def resnet152_preact(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """Pre-activation ResNet-152."""
    return _plain(152, pretrained, **kwargs)


@register_model
def resnet200_preact(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """Pre-activation ResNet-200."""
    return _plain(200, pretrained, **kwargs)


@register_model
def resnet269_preact(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """Pre-activation ResNet-269."""
    return _plain(269, pretrained, **kwargs)


@register_model
def resnet18_fbn(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """ResNet-18 with a factorized bilinear head, K = ``factors`` = 50."""
    return _fbn(18, pretrained, **kwargs)


@register_model
def resnet34_fbn(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """ResNet-34 with a factorized bilinear head, K = ``factors`` = 50."""
    return _fbn(34, pretrained, **kwargs)


@register_model
def resnet50_fbn(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """ResNet-50 with a factorized bilinear head, K = ``factors`` = 50."""
    return _fbn(50, pretrained, **kwargs)


@register_model
def resnet101_fbn(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """ResNet-101 with a factorized bilinear head, K = ``factors`` = 50."""
    return _fbn(101, pretrained, **kwargs)


@register_model
def resnet152_fbn(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """ResNet-152 with a factorized bilinear head, K = ``factors`` = 50."""
    return _fbn(152, pretrained, **kwargs)


@register_model
def resnet200_fbn(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """ResNet-200 with a factorized bilinear head, K = ``factors`` = 50."""
    return _fbn(200, pretrained, **kwargs)


@register_model
def resnet269_fbn(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """ResNet-269 with a factorized bilinear head, K = ``factors`` = 50."""
    return _fbn(269, pretrained, **kwargs)
