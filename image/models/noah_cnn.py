"""Convolutional networks with a NOAH head: ResNet, MobileNetV2, NOAH's MobileNetV3-Small, ShuffleNetV2."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from timm.models import efficientnet, generate_default_cfgs, register_model, resnet
from torch import nn

from common.weights import StateDict, published_layout
from image.models import mobilenetv3, shufflenetv2
from image.models.noah import build_noah, imagenet_cfg

_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_MOBILENETS = ("mobilenetv2_100", "mobilenetv2_075", "mobilenetv2_050", "mobilenetv2_035")

# The published residual blocks do not start as the identity; timm's do.
_RESNET = {"zero_init_last": False}
_DEEP_RESNET = {**_RESNET, "noah_key_ratio": 0.125}
_MOBILE = {"noah_heads": 8, "noah_key_ratio": 0.25, "noah_dropout": 0.2}
_SHUFFLENET = {"noah_heads": 8, "noah_key_ratio": 0.25, "noah_dropout": 0.0}


@published_layout(*_RESNETS, *(f"{name}_noah" for name in _RESNETS))
def resnet_from_published(state: StateDict) -> StateDict:
    """``head.2`` (after pooling and flattening), or NOAH's ``head``, is timm's ``fc``."""
    return {re.sub(r"^head\.(?:2\.)?", "fc.", key): value for key, value in state.items()}


@published_layout(*_MOBILENETS, *(f"{name}_noah" for name in _MOBILENETS))
def mobilenetv2_from_published(state: StateDict) -> StateDict:
    """The published blocks stand in one row, ``features``; timm's in stages, with their layers named."""
    layers = _mobilenetv2_layers()

    def rename(key: str) -> str:
        layer, _, tensor = key.rpartition(".")
        if layer in layers:
            return f"{layers[layer]}.{tensor}"
        return re.sub(r"^head\.(?:2\.)?", "classifier.", key)

    return {rename(key): value for key, value in state.items()}


def _mobilenetv2_layers() -> dict[str, str]:
    """Published name → timm's, of every layer but the head."""
    stem_and_last = {"0.0": "conv_stem", "0.1": "bn1", "18.0": "conv_head", "18.1": "bn2"}
    separable = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
    inverted = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}
    layers = {f"features.{published}": own for published, own in stem_and_last.items()}
    blocks = [(stage, block) for stage, depth in enumerate((1, 2, 3, 4, 3, 3, 1)) for block in range(depth)]
    for i, (stage, block) in enumerate(blocks, start=1):
        for published, own in (inverted if stage else separable).items():
            layers[f"features.{i}.conv.{published}"] = f"blocks.{stage}.{block}.{own}"
    return layers


_RESNET_CFG = imagenet_cfg(interpolation="bilinear", pool_size=(7, 7), first_conv="conv1", classifier="fc")
_MOBILENET_CFG = {**_RESNET_CFG, "first_conv": "conv_stem", "classifier": "classifier"}

default_cfgs = generate_default_cfgs(
    {f"{name}_noah": _RESNET_CFG for name in _RESNETS}
    | {f"{name}_noah": _MOBILENET_CFG for name in _MOBILENETS}
    | {f"{name}_noah": {**_RESNET_CFG, "first_conv": "conv1.0"} for name in shufflenetv2.WIDTHS}
    | {"mobilenetv3_small_noah": {**_MOBILENET_CFG, "first_conv": "features.0.0"}}
)


def _shufflenetv2(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    backbone = partial(shufflenetv2.ShuffleNetV2, widths=shufflenetv2.WIDTHS[name])
    features = {"feature_cls": "list"}
    return build_noah(f"{name}_noah", backbone, pretrained, feature_cfg=features, **(_SHUFFLENET | kwargs))


@register_model
def resnet18_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 with NOAH, 11.70 M parameters, 71.81 % top-1 (70.25 without)."""
    return build_noah("resnet18_noah", resnet.resnet18, pretrained, **(_RESNET | kwargs))


@register_model
def resnet34_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34 with NOAH, 21.80 M; not in the paper's tables."""
    return build_noah("resnet34_noah", resnet.resnet34, pretrained, **(_DEEP_RESNET | kwargs))


@register_model
def resnet50_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 with NOAH, 25.56 M, 77.25 % (76.23)."""
    return build_noah("resnet50_noah", resnet.resnet50, pretrained, **(_DEEP_RESNET | kwargs))


@register_model
def resnet101_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-101 with NOAH, 44.56 M, 78.22 % (77.41)."""
    return build_noah("resnet101_noah", resnet.resnet101, pretrained, **(_DEEP_RESNET | kwargs))


@register_model
def resnet152_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-152 with NOAH, 60.20 M, 78.57 % (78.16)."""
    return build_noah("resnet152_noah", resnet.resnet152, pretrained, **(_DEEP_RESNET | kwargs))


@register_model
def mobilenetv2_100_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2 1× with NOAH, 3.52 M, 73.35 % (72.02)."""
    return build_noah("mobilenetv2_100_noah", efficientnet.mobilenetv2_100, pretrained, **(_MOBILE | kwargs))


@register_model
def mobilenetv2_075_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2 0.75× with NOAH, 2.65 M, 71.44 % (69.65)."""
    return build_noah("mobilenetv2_075_noah", efficientnet.mobilenetv2_075, pretrained, **(_MOBILE | kwargs))


@register_model
def mobilenetv2_050_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2 0.5× with NOAH, 1.98 M, 67.44 % (64.30)."""
    return build_noah("mobilenetv2_050_noah", efficientnet.mobilenetv2_050, pretrained, **(_MOBILE | kwargs))


@register_model
def mobilenetv2_035_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2 0.35× with NOAH, 1.69 M, 63.40 % (59.62)."""
    return build_noah("mobilenetv2_035_noah", efficientnet.mobilenetv2_035, pretrained, **(_MOBILE | kwargs))


@register_model
def mobilenetv3_small_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV3-Small of :mod:`image.models.mobilenetv3` with NOAH, 2.95 M, 68.92 % (67.11)."""
    backbone, features = mobilenetv3.MobileNetV3Small, {"flatten_sequential": True}
    return build_noah(
        "mobilenetv3_small_noah", backbone, pretrained, feature_cfg=features, **(_MOBILE | kwargs)
    )


@register_model
def shufflenetv2_050_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNetV2 0.5× with NOAH, 1.38 M."""
    return _shufflenetv2("shufflenetv2_050", pretrained, **kwargs)


@register_model
def shufflenetv2_100_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNetV2 1× with NOAH, 2.29 M, 70.72 % (69.43)."""
    return _shufflenetv2("shufflenetv2_100", pretrained, **kwargs)


@register_model
def shufflenetv2_150_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNetV2 1.5× with NOAH, 3.52 M."""
    return _shufflenetv2("shufflenetv2_150", pretrained, **kwargs)


@register_model
def shufflenetv2_200_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNetV2 2× with NOAH, 7.4 M."""
    return _shufflenetv2("shufflenetv2_200", pretrained, **kwargs)
