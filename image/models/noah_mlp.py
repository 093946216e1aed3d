"""MLP networks with a NOAH head: Mixer and gMLP of timm; and NOAH's narrower versions of both."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, mlp_mixer, register_model
from torch import nn

from image.models.noah import build_noah, imagenet_cfg

_MIXER = partial(mlp_mixer.MlpMixer, patch_size=16, num_blocks=8)
_GMLP = partial(
    mlp_mixer.MlpMixer,
    patch_size=16,
    num_blocks=30,
    mlp_ratio=6,
    block_layer=mlp_mixer.SpatialGatingBlock,
    mlp_layer=mlp_mixer.GatedMlp,
)
_BACKBONES = {
    "mixer_s16_050_224": partial(_MIXER, embed_dim=256),
    "mixer_s16_075_224": partial(_MIXER, embed_dim=384),
    "mixer_s16_224": partial(_MIXER, embed_dim=512),
    "mixer_b16_224": partial(_MIXER, embed_dim=768, num_blocks=12),
    "gmlp_ti16_050_224": partial(_GMLP, embed_dim=64),
    "gmlp_ti16_075_224": partial(_GMLP, embed_dim=96),
    "gmlp_ti16_224": partial(_GMLP, embed_dim=128),
    "gmlp_s16_224": partial(_GMLP, embed_dim=256),
}
_LAST_BLOCKS: dict[str, Any] = {"feature_cls": "getter", "out_indices": 3}

# As timm's own Mixer and gMLP: images scaled to [-1, 1], and weights that fix the number of positions.
_CFG = imagenet_cfg(
    interpolation="bicubic",
    crop_pct=0.9,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    fixed_input_size=True,
    first_conv="stem.proj",
    classifier="head",
)

default_cfgs = generate_default_cfgs(
    {name: _CFG for name in _BACKBONES if "_050_" in name or "_075_" in name}
    | {f"{name}_noah": _CFG for name in _BACKBONES}
)


def _baseline(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(_BACKBONES[name], name, pretrained, feature_cfg=dict(_LAST_BLOCKS), **kwargs)


def _noah(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_noah(f"{name}_noah", _BACKBONES[name], pretrained, feature_cfg=_LAST_BLOCKS, **kwargs)


@register_model
def mixer_s16_050_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mixer-S/16 at half the width, 5.07 M parameters, 65.22 % top-1 as NOAH's baseline."""
    return _baseline("mixer_s16_050_224", pretrained, **kwargs)


@register_model
def mixer_s16_075_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mixer-S/16 at three quarters of the width, 10.75 M, 71.13 %."""
    return _baseline("mixer_s16_075_224", pretrained, **kwargs)


@register_model
def gmlp_ti16_050_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """gMLP-Ti/16 at half the width, 2.41 M, 54.99 %."""
    return _baseline("gmlp_ti16_050_224", pretrained, **kwargs)


@register_model
def gmlp_ti16_075_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """gMLP-Ti/16 at three quarters of the width, 3.86 M, 65.95 %."""
    return _baseline("gmlp_ti16_075_224", pretrained, **kwargs)


@register_model
def mixer_s16_050_224_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mixer-S/16 0.5× with NOAH, 5.08 M, 66.81 % (65.22 without)."""
    return _noah("mixer_s16_050_224", pretrained, **kwargs)


@register_model
def mixer_s16_075_224_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mixer-S/16 0.75× with NOAH, 10.76 M, 72.32 % (71.13)."""
    return _noah("mixer_s16_075_224", pretrained, **kwargs)


@register_model
def mixer_s16_224_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mixer-S/16 with NOAH, 18.54 M, 75.09 % (74.18)."""
    return _noah("mixer_s16_224", pretrained, **kwargs)


@register_model
def mixer_b16_224_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mixer-B/16 with NOAH, 59.89 M, 77.49 % (77.14)."""
    return _noah("mixer_b16_224", pretrained, **kwargs)


@register_model
def gmlp_ti16_050_224_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """gMLP-Ti/16 0.5× with NOAH, 2.41 M, 56.89 % (54.99)."""
    return _noah("gmlp_ti16_050_224", pretrained, **kwargs)


@register_model
def gmlp_ti16_075_224_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """gMLP-Ti/16 0.75× with NOAH, 3.87 M, 67.71 % (65.95)."""
    return _noah("gmlp_ti16_075_224", pretrained, **kwargs)


@register_model
def gmlp_ti16_224_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """gMLP-Ti/16 with NOAH, 5.87 M, 73.39 % (72.05)."""
    return _noah("gmlp_ti16_224", pretrained, **kwargs)


@register_model
def gmlp_s16_224_noah(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """gMLP-S/16 with NOAH, 19.43 M, 79.95 % (79.65)."""
    return _noah("gmlp_s16_224", pretrained, **kwargs)
