"""Vision transformers with a NOAH head: DeiT of timm, and PVT; and NOAH's narrow DeiT-Tiny networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

from timm.layers import trunc_normal_
from timm.models import VisionTransformer, build_model_with_cfg, deit, generate_default_cfgs, register_model
from torch import Tensor, nn

from image.models import pvt
from image.models.noah import build_noah, imagenet_cfg


class NarrowDeiT(VisionTransformer):
    """A DeiT narrower than 192: ``pre_logits``, a linear layer to 192 channels and tanh, precede the head.

    Args:
        pre_logits_features: channels that the head sees.
        kwargs: those of timm's ``VisionTransformer``.
    """

    def __init__(self, pre_logits_features: int = 192, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head_hidden_size = pre_logits_features
        self.pre_logits = nn.Sequential(
            OrderedDict(fc=_linear(self.embed_dim, pre_logits_features), act=nn.Tanh())
        )
        self.reset_classifier(self.num_classes)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (N, L, C) → logits (N, classes), or with ``pre_logits`` the 192 features before them."""
        x = self.head_drop(self.pre_logits(self.fc_norm(self.pool(x))))
        return x if pre_logits else self.head(x)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh linear head for ``num_classes`` classes, 0 for none; ``global_pool`` as in timm."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0:
            weight = self.norm.weight
            self.head = _linear(self.head_hidden_size, num_classes).to(weight.device, weight.dtype)


def _linear(in_features: int, out_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


_TINY_050 = partial(NarrowDeiT, patch_size=16, embed_dim=96, depth=12, num_heads=3)
_TINY_075 = partial(NarrowDeiT, patch_size=16, embed_dim=144, depth=12, num_heads=3)

# The final norm comes before the head and acts on every patch; timm's default would pool first.
_PATCHES: dict[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False}

_LAST_BLOCKS: dict[str, Any] = {"feature_cls": "getter", "out_indices": 3}

_CFG = imagenet_cfg(interpolation="bicubic", first_conv="patch_embed.proj", classifier="head")
_DEIT_CFG = {**_CFG, "fixed_input_size": True}
_DEITS = ("deit_tiny_050", "deit_tiny_075", "deit_tiny", "deit_small", "deit_base")

default_cfgs = generate_default_cfgs(
    {f"{name}_patch16_224": _DEIT_CFG for name in ("deit_tiny_050", "deit_tiny_075")}
    | {f"{name}_patch16_224_noah": _DEIT_CFG for name in _DEITS}
    | {"deit_base_patch16_384_noah": {**_DEIT_CFG, "input_size": (3, 384, 384)}}
    | {f"{name}_noah": {**_CFG, "first_conv": "stages.0.patch_embed.proj"} for name in pvt.CONFIGS}
)


def _narrow(name: str, backbone: Callable[..., nn.Module], pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(backbone, name, pretrained, feature_cfg=dict(_LAST_BLOCKS), **kwargs)


@register_model
def deit_tiny_050_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-Tiny at half the width, 1.65 M parameters, 51.36 % top-1 as NOAH's baseline."""
    return _narrow("deit_tiny_050_patch16_224", _TINY_050, pretrained, **kwargs)


@register_model
def deit_tiny_075_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-Tiny at three quarters of the width, 3.37 M, 62.55 %."""
    return _narrow("deit_tiny_075_patch16_224", _TINY_075, pretrained, **kwargs)


def _deit(name: str, backbone: Callable[..., nn.Module], pretrained: bool, **kwargs: Any) -> nn.Module:
    options = _PATCHES | {"feature_cfg": _LAST_BLOCKS} | kwargs
    return build_noah(f"{name}_noah", backbone, pretrained, **options)


def _pvt(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    backbone = partial(pvt.PVT, class_token=False, **pvt.CONFIGS[name])
    return build_noah(f"{name}_noah", backbone, pretrained, feature_cfg=pvt.ALL_STAGES, **kwargs)


@register_model
def deit_tiny_050_patch16_224_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-Tiny 0.5× with NOAH, 1.65 M, 56.66 % (51.36 without)."""
    return _deit("deit_tiny_050_patch16_224", _TINY_050, pretrained, **kwargs)


@register_model
def deit_tiny_075_patch16_224_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-Tiny 0.75× with NOAH, 3.38 M, 66.64 % (62.55)."""
    return _deit("deit_tiny_075_patch16_224", _TINY_075, pretrained, **kwargs)


@register_model
def deit_tiny_patch16_224_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-Tiny with NOAH, 5.72 M, 74.29 % (72.16)."""
    return _deit("deit_tiny_patch16_224", deit.deit_tiny_patch16_224, pretrained, **kwargs)


@register_model
def deit_small_patch16_224_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-Small with NOAH, 22.06 M, 80.56 % (79.78)."""
    return _deit("deit_small_patch16_224", deit.deit_small_patch16_224, pretrained, **kwargs)


@register_model
def deit_base_patch16_224_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-Base with NOAH, 86.57 M, 82.22 % (81.85)."""
    return _deit("deit_base_patch16_224", deit.deit_base_patch16_224, pretrained, **kwargs)


@register_model
def deit_base_patch16_384_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-Base with NOAH for 384×384 images."""
    return _deit("deit_base_patch16_384", deit.deit_base_patch16_384, pretrained, **kwargs)


@register_model
def pvt_tiny_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PVT-Tiny with NOAH, 13.24 M, 76.51 % (75.10 without)."""
    return _pvt("pvt_tiny", pretrained, **kwargs)


@register_model
def pvt_tiny_075_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PVT-Tiny 0.75× with NOAH, 7.62 M, 74.22 % (71.81)."""
    return _pvt("pvt_tiny_075", pretrained, **kwargs)


@register_model
def pvt_tiny_050_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PVT-Tiny 0.5× with NOAH, 3.55 M, 68.50 % (65.33)."""
    return _pvt("pvt_tiny_050", pretrained, **kwargs)


@register_model
def pvt_small_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PVT-Small with NOAH."""
    return _pvt("pvt_small", pretrained, **kwargs)


@register_model
def pvt_medium_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PVT-Medium with NOAH."""
    return _pvt("pvt_medium", pretrained, **kwargs)


@register_model
def pvt_large_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PVT-Large with NOAH."""
    return _pvt("pvt_large", pretrained, **kwargs)
