"""Inception-BN for ImageNet (Ioffe and Szegedy, arXiv 1502.03167), plain and with an FBN head."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from common.models.convnet import Branches, ConvNet, conv_norm_act, default_cfg, with_fbn
from common.models.mxnet import from_mxnet, head_layer
from common.weights import StateDict, published_layout

default_cfgs = generate_default_cfgs(
    {
        "inception_bn": default_cfg((3, 224, 224), "stem.conv1.conv", False, pool_size=(7, 7)),
        "inception_bn_fbn": default_cfg((3, 224, 224), "stem.conv1.conv", True, pool_size=(7, 7)),
    }
)


_BLOCKS = (("3a", "3b"), ("3c", "4a", "4b", "4c", "4d"), ("4e", "5a", "5b"))
_PARTS = {
    "1x1": "single",
    "3x3_reduce": "conv3.0",
    "3x3": "conv3.1",
    "double_3x3_reduce": "double3.0",
    "double_3x3_0": "double3.1",
    "double_3x3_1": "double3.2",
    "proj": "project.1",
}
_PUBLISHED = {"1": "stem.conv1", "2_red": "stem.reduce2", "2": "stem.conv2"} | {
    f"{block}_{part}": f"stages.{i}.{j}.{own}"
    for i, blocks in enumerate(_BLOCKS)
    for j, block in enumerate(blocks)
    for part, own in _PARTS.items()
}


@published_layout("inception_bn", "inception_bn_fbn")
def from_published(state: StateDict) -> StateDict:
    """MXNet's names: ``conv_3a_1x1``, ``bn_3a_1x1`` and the like."""
    return from_mxnet(state, _own_layer)


def _own_layer(layer: str) -> str | None:
    kind, _, name = layer.partition("_")
    if kind in ("conv", "bn") and name in _PUBLISHED:
        return f"{_PUBLISHED[name]}.{'conv' if kind == 'conv' else 'norm'}"
    return head_layer(layer)


def mix(
    in_channels: int,
    single: int,
    reduce3: int,
    conv3: int,
    reduce_double: int,
    double: int,
    pool: str,
    project: int,
    last_act: type[nn.Module] = nn.ReLU,
) -> Branches:
    """Block A: 1×1 | 1×1, 3×3 | 1×1, 3×3, 3×3 | 3×3 pool (``avg`` counts the padding), 1×1."""
    pooling = nn.AvgPool2d(3, 1, 1) if pool == "avg" else nn.MaxPool2d(3, 1, 1)
    last = partial(conv_norm_act, act=last_act)
    return Branches(
        {
            "single": last(in_channels, single, 1),
            "conv3": nn.Sequential(conv_norm_act(in_channels, reduce3, 1), last(reduce3, conv3, 3)),
            "double3": nn.Sequential(
                conv_norm_act(in_channels, reduce_double, 1),
                conv_norm_act(reduce_double, double, 3),
                last(double, double, 3),
            ),
            "project": nn.Sequential(pooling, last(in_channels, project, 1)),
        }
    )


def down(in_channels: int, reduce3: int, conv3: int, reduce_double: int, double: int) -> Branches:
    """Block B, at half the size: 1×1, 3×3 | 1×1, 3×3, 3×3 | 3×3 max pool."""
    return Branches(
        {
            "conv3": nn.Sequential(
                conv_norm_act(in_channels, reduce3, 1), conv_norm_act(reduce3, conv3, 3, stride=2)
            ),
            "double3": nn.Sequential(
                conv_norm_act(in_channels, reduce_double, 1),
                conv_norm_act(reduce_double, double, 3),
                conv_norm_act(double, double, 3, stride=2),
            ),
            "pool": nn.MaxPool2d(3, 2, 1),
        }
    )


def imagenet_inception_bn(in_chans: int = 3, last_act: type[nn.Module] = nn.ReLU, **kwargs: Any) -> ConvNet:
    """Inception-BN; ``last_act`` ends every branch of the last block, ``kwargs`` are :class:`ConvNet`'s."""
    stem = nn.Sequential(
        OrderedDict(
            conv1=conv_norm_act(in_chans, 64, 7, stride=2),
            pool1=nn.MaxPool2d(3, 2),
            reduce2=conv_norm_act(64, 64, 1),
            conv2=conv_norm_act(64, 192, 3),
            pool2=nn.MaxPool2d(3, 2),
        )
    )
    stages = [
        [mix(192, 64, 64, 64, 64, 96, "avg", 32), mix(256, 64, 64, 96, 64, 96, "avg", 64)],
        [
            down(320, 128, 160, 64, 96),
            mix(576, 224, 64, 96, 96, 128, "avg", 128),
            mix(576, 192, 96, 128, 96, 128, "avg", 128),
            mix(576, 160, 128, 160, 128, 160, "avg", 128),
            mix(608, 96, 128, 192, 160, 192, "avg", 128),
        ],
        [
            down(608, 128, 192, 192, 256),
            mix(1056, 352, 192, 320, 160, 224, "avg", 128),
            mix(1024, 352, 192, 320, 192, 224, "max", 128, last_act),
        ],
    ]
    info = [
        {"num_chs": 64, "reduction": 2, "module": "stem.conv1"},
        {"num_chs": 192, "reduction": 4, "module": "stem.conv2"},
        {"num_chs": 320, "reduction": 8, "module": "stages.0"},
        {"num_chs": 608, "reduction": 16, "module": "stages.1"},
        {"num_chs": 1024, "reduction": 32, "module": "stages.2"},
    ]
    return ConvNet(stem, stages, nn.Identity(), info, **kwargs)


@register_model
def inception_bn(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """Inception-BN."""
    feature_cfg = {"flatten_sequential": True}
    return build_model_with_cfg(
        imagenet_inception_bn, "inception_bn", pretrained, feature_cfg=feature_cfg, **kwargs
    )


@register_model
def inception_bn_fbn(pretrained: bool = False, factors: int = 20, **kwargs: Any) -> ConvNet:
    """Inception-BN with a factorized bilinear head, K = ``factors``."""
    build = partial(with_fbn, imagenet_inception_bn, factors)
    feature_cfg = {"flatten_sequential": True}
    return build_model_with_cfg(build, "inception_bn_fbn", pretrained, feature_cfg=feature_cfg, **kwargs)
