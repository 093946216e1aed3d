"""The video networks by name.

Options, as keyword arguments of ``timm.create_model`` beside those of :class:`video.models.resnet.VideoResNet`:

- ``_bat2d``, ``_bat3d``: ``bat_size``, ``bat_groups``, ``bat_reduction``, ``bat_dropout``, ``bat_time_size``,
  ``bat_time_groups`` of :class:`common.attention.bat_video.BATBlock3d`. ``_bat3d`` has 4 time groups, ``_bat2d`` 0.
- ``_nl``: ``nl_reduction``, ``nl_sub_sample``, ``nl_heads``, ``nl_per_frame`` (the published ``nl2d``) of
  :class:`common.attention.non_local.NonLocal3d`.
- ``layers`` and ``channels`` make smaller versions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from common.attention.bat_video import BATBlock3d
from common.attention.non_local import NonLocal3d
from common.models.convnet import MEAN, STD
from video.models.resnet import Basic, Bottleneck, VideoResNet

_C2D: dict[str, Any] = {"temporal": ((0,),) * 4, "stem_time": 1}
_I3D: dict[str, Any] = {"temporal": ((1,), (1, 0), (1, 0), (0, 1)), "stem_time": 5}
_BACKBONES: dict[str, dict[str, Any]] = {
    "c2d_resnet18": {"block": Basic, "layers": (2, 2, 2, 2)} | _C2D,
    "c2d_resnet34": {"block": Basic, "layers": (3, 4, 6, 3)} | _C2D,
    "c2d_resnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3)} | _C2D,
    "c2d_resnet101": {"block": Bottleneck, "layers": (3, 4, 23, 3)} | _C2D,
    "i3d_resnet18": {"block": Basic, "layers": (2, 2, 2, 2)} | _I3D | {"temporal": ((1,),) * 4},
    "i3d_resnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3)} | _I3D,
    "i3d_resnet101": {"block": Bottleneck, "layers": (3, 4, 23, 3)} | _I3D,
}


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 400,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": MEAN,
        "std": STD,
        "first_conv": "conv1",
        "classifier": "fc",
    }


_WITH_BLOCKS = [
    f"{net}_resnet{depth}_{kind}"
    for net in ("c2d", "i3d")
    for depth in (50, 101)
    for kind in ("nl", "bat2d", "bat3d")
]
default_cfgs = generate_default_cfgs({name: _cfg() for name in (*_BACKBONES, *_WITH_BLOCKS)})


def _plain(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    backbone = "_".join(name.split("_")[:2])
    return build_model_with_cfg(VideoResNet, name, pretrained, **(_BACKBONES[backbone] | kwargs))


def _bat(
    name: str,
    pretrained: bool,
    bat_time_groups: int,
    bat_size: int = 7,
    bat_groups: int = 8,
    bat_reduction: int = 2,
    bat_dropout: float = 0.2,
    bat_time_size: int = 4,
    **kwargs: Any,
) -> nn.Module:
    make_block = partial(
        BATBlock3d,
        reduction=bat_reduction,
        size=bat_size,
        groups=bat_groups,
        time_size=bat_time_size,
        time_groups=bat_time_groups,
        dropout=bat_dropout,
    )
    return _plain(name, pretrained, make_block=make_block, **kwargs)


def _non_local(
    name: str,
    pretrained: bool,
    nl_reduction: int = 2,
    nl_sub_sample: bool = True,
    nl_heads: int = 1,
    nl_per_frame: bool = False,
    **kwargs: Any,
) -> nn.Module:
    make_block = partial(
        NonLocal3d,
        reduction=nl_reduction,
        sub_sample=nl_sub_sample,
        heads=nl_heads,
        per_frame=nl_per_frame,
    )
    return _plain(name, pretrained, make_block=make_block, **kwargs)


@register_model
def c2d_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """C2D ResNet-18."""
    return _plain("c2d_resnet18", pretrained, **kwargs)


@register_model
def c2d_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """C2D ResNet-34."""
    return _plain("c2d_resnet34", pretrained, **kwargs)


@register_model
def c2d_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """C2D ResNet-50."""
    return _plain("c2d_resnet50", pretrained, **kwargs)


@register_model
def c2d_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """C2D ResNet-101."""
    return _plain("c2d_resnet101", pretrained, **kwargs)


@register_model
def c2d_resnet50_nl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """C2D ResNet-50 with non-local blocks."""
    return _non_local("c2d_resnet50_nl", pretrained, **kwargs)


@register_model
def c2d_resnet50_bat2d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """C2D ResNet-50 with BAT in every frame's plane."""
    return _bat("c2d_resnet50_bat2d", pretrained, **({"bat_time_groups": 0} | kwargs))


@register_model
def c2d_resnet50_bat3d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """C2D ResNet-50 with BAT in every frame's plane and along time."""
    return _bat("c2d_resnet50_bat3d", pretrained, **({"bat_time_groups": 4} | kwargs))


@register_model
def c2d_resnet101_nl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """C2D ResNet-101 with non-local blocks."""
    return _non_local("c2d_resnet101_nl", pretrained, **kwargs)


@register_model
def c2d_resnet101_bat2d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """C2D ResNet-101 with BAT in every frame's plane."""
    return _bat("c2d_resnet101_bat2d", pretrained, **({"bat_time_groups": 0} | kwargs))


@register_model
def c2d_resnet101_bat3d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """C2D ResNet-101 with BAT in every frame's plane and along time."""
    return _bat("c2d_resnet101_bat3d", pretrained, **({"bat_time_groups": 4} | kwargs))


@register_model
def i3d_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """I3D ResNet-18."""
    return _plain("i3d_resnet18", pretrained, **kwargs)


@register_model
def i3d_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """I3D ResNet-50."""
    return _plain("i3d_resnet50", pretrained, **kwargs)


@register_model
def i3d_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """I3D ResNet-101."""
    return _plain("i3d_resnet101", pretrained, **kwargs)


@register_model
def i3d_resnet50_nl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """I3D ResNet-50 with non-local blocks."""
    return _non_local("i3d_resnet50_nl", pretrained, **kwargs)


@register_model
def i3d_resnet50_bat2d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """I3D ResNet-50 with BAT in every frame's plane."""
    return _bat("i3d_resnet50_bat2d", pretrained, **({"bat_time_groups": 0} | kwargs))


@register_model
def i3d_resnet50_bat3d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """I3D ResNet-50 with BAT in every frame's plane and along time."""
    return _bat("i3d_resnet50_bat3d", pretrained, **({"bat_time_groups": 4} | kwargs))


@register_model
def i3d_resnet101_nl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """I3D ResNet-101 with non-local blocks."""
    return _non_local("i3d_resnet101_nl", pretrained, **kwargs)


@register_model
def i3d_resnet101_bat2d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """I3D ResNet-101 with BAT in every frame's plane."""
    return _bat("i3d_resnet101_bat2d", pretrained, **({"bat_time_groups": 0} | kwargs))


@register_model
def i3d_resnet101_bat3d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """I3D ResNet-101 with BAT in every frame's plane and along time."""
    return _bat("i3d_resnet101_bat3d", pretrained, **({"bat_time_groups": 4} | kwargs))
