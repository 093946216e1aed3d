"""BAT and non-local ResNets: timm's own ResNet with blocks put between its residual blocks.

Options, as keyword arguments of ``timm.create_model`` beside timm's own:

- ``nl_mod``: three numbers m for ``layer2``, ``layer3``, ``layer4``. A block stands after residual block i
  when ``i % m == m - 1``, and is named ``layerL.nl{i}``. 1000 means never.
- ``bat_size``, ``bat_groups``, ``bat_reduction``, ``bat_dropout`` of the ``_bat`` networks: see
  :class:`common.attention.bat.BATBlock`. ``nl_reduction`` of the ``_nl`` networks.
- ``zero_init_last``: off here, as published; timm's default, on, makes residual blocks start as the identity.

``use_se`` of the published program is ``block_args={"attn_layer": "se"}``, its dilation is ``output_stride``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from common.attention.bat import BATBlock
from common.attention.non_local import NonLocal
from common.weights import StateDict, published_layout

MakeBlock = Callable[[int], nn.Module]


class BlockResNet(ResNet):
    """timm's ResNet with ``make_block(channels)`` after the residual blocks that ``nl_mod`` tells (see above).

    Raises:
        ValueError: ``nl_mod`` is not three numbers of 1 or more.
    """

    def __init__(
        self, *args: Any, make_block: MakeBlock, nl_mod: Sequence[int] = (2, 2, 1000), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if len(nl_mod) != 3 or any(m < 1 for m in nl_mod):
            raise ValueError(
                f"nl_mod={nl_mod!r}: must be three numbers of 1 or more, for layer2, layer3, layer4"
            )
        for name, every in zip(("layer2", "layer3", "layer4"), nl_mod):
            channels = next(info["num_chs"] for info in self.feature_info if info["module"] == name)
            setattr(self, name, _with_blocks(getattr(self, name), every, partial(make_block, channels)))

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's parameter groups; a block belongs to the residual block before it."""
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(?:nl)?(\d+)"
        return super().group_matcher(coarse) | {"blocks": blocks}


def _with_blocks(layer: nn.Sequential, every: int, make: Callable[[], nn.Module]) -> nn.Sequential:
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for i, residual in enumerate(layer):
        modules[str(i)] = residual
        if i % every == every - 1:
            modules[f"nl{i}"] = make()
    return nn.Sequential(modules)


_NL_MOD = {"resnet101": (2, 7, 1000), "resnet152": (4, 12, 1000), "resnext101_32x8d": (2, 7, 1000)}
_BACKBONES: dict[str, dict[str, Any]] = {
    "resnet18": {"block": BasicBlock, "layers": (2, 2, 2, 2)},
    "resnet34": {"block": BasicBlock, "layers": (3, 4, 6, 3)},
    "resnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3)},
    "resnet101": {"block": Bottleneck, "layers": (3, 4, 23, 3)},
    "resnet152": {"block": Bottleneck, "layers": (3, 8, 36, 3)},
    "resnext50_32x4d": {"block": Bottleneck, "layers": (3, 4, 6, 3), "cardinality": 32, "base_width": 4},
    "resnext101_32x8d": {"block": Bottleneck, "layers": (3, 4, 23, 3), "cardinality": 32, "base_width": 8},
    "seresnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3), "block_args": {"attn_layer": "se"}},
}


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
    }


_BAT_BACKBONES = tuple(_BACKBONES)
_NL_BACKBONES = tuple(name for name in _BACKBONES if name.startswith("resnet"))
default_cfgs = generate_default_cfgs(
    {f"{name}_bat": _cfg() for name in _BAT_BACKBONES} | {f"{name}_nl": _cfg() for name in _NL_BACKBONES}
)


def _create(name: str, pretrained: bool, make_block: MakeBlock, kwargs: dict[str, Any]) -> nn.Module:
    backbone = name.rpartition("_")[0]
    defaults = {"zero_init_last": False, "nl_mod": _NL_MOD.get(backbone, (2, 2, 1000))}
    arguments = _BACKBONES[backbone] | defaults | kwargs
    return build_model_with_cfg(BlockResNet, name, pretrained, make_block=make_block, **arguments)


def _bat(
    name: str,
    pretrained: bool,
    bat_size: int = 7,
    bat_groups: int = 4,
    bat_reduction: int = 2,
    bat_dropout: float = 0.2,
    **kwargs: Any,
) -> nn.Module:
    make_block = partial(
        BATBlock, reduction=bat_reduction, size=bat_size, groups=bat_groups, dropout=bat_dropout
    )
    return _create(name, pretrained, make_block, kwargs)


def _non_local(name: str, pretrained: bool, nl_reduction: int = 2, **kwargs: Any) -> nn.Module:
    return _create(name, pretrained, partial(NonLocal, reduction=nl_reduction), kwargs)


@published_layout("seresnet50_bat")
def _squeeze_excitation(state: StateDict) -> StateDict:
    """The published squeeze-excitation has linear layers where timm has 1×1 convolutions."""
    out: StateDict = {}
    for key, value in state.items():
        own = key.replace("se_block.excitation.0", "se.fc1").replace("se_block.excitation.2", "se.fc2")
        out[own] = value[..., None, None] if own != key and value.ndim == 2 else value
    return out


@register_model
def resnet18_bat(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 with BAT blocks, by default without dropout."""
    return _bat("resnet18_bat", pretrained, **({"bat_dropout": 0.0} | kwargs))


@register_model
def resnet34_bat(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34 with BAT blocks, by default without dropout."""
    return _bat("resnet34_bat", pretrained, **({"bat_dropout": 0.0} | kwargs))


@register_model
def resnet50_bat(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 with BAT blocks."""
    return _bat("resnet50_bat", pretrained, **kwargs)


@register_model
def resnet101_bat(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-101 with BAT blocks."""
    return _bat("resnet101_bat", pretrained, **kwargs)


@register_model
def resnet152_bat(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-152 with BAT blocks."""
    return _bat("resnet152_bat", pretrained, **kwargs)


@register_model
def resnext50_32x4d_bat(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNeXt-50 32x4d with BAT blocks."""
    return _bat("resnext50_32x4d_bat", pretrained, **kwargs)


@register_model
def resnext101_32x8d_bat(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNeXt-101 32x8d with BAT blocks."""
    return _bat("resnext101_32x8d_bat", pretrained, **kwargs)


@register_model
def seresnet50_bat(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-ResNet-50 with BAT blocks."""
    return _bat("seresnet50_bat", pretrained, **kwargs)


@register_model
def resnet18_nl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 with non-local blocks."""
    return _non_local("resnet18_nl", pretrained, **kwargs)


@register_model
def resnet34_nl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34 with non-local blocks."""
    return _non_local("resnet34_nl", pretrained, **kwargs)


@register_model
def resnet50_nl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 with non-local blocks."""
    return _non_local("resnet50_nl", pretrained, **kwargs)


@register_model
def resnet101_nl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-101 with non-local blocks."""
    return _non_local("resnet101_nl", pretrained, **kwargs)


@register_model
def resnet152_nl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-152 with non-local blocks."""
    return _non_local("resnet152_nl", pretrained, **kwargs)
