"""Pre-activation ResNets for 32² images, plain and with an FBN head."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from common.models.convnet import ConvNet, default_cfg, with_fbn
from common.models.mxnet import from_mxnet, head_layer
from common.models.preact import preact_resnet
from common.weights import StateDict, published_layout

CIFAR = {"num_classes": 10, "crop_pct": 1.0, "pool_size": (8, 8)}

default_cfgs = generate_default_cfgs(
    {
        name: default_cfg((3, 32, 32), "stem", name.endswith("_fbn"), **CIFAR)
        for name in ("resnet164", "resnet164_fbn", "resnet1001", "resnet1001_fbn")
    }
)


@published_layout("resnet164", "resnet164_fbn", "resnet1001", "resnet1001_fbn")
def from_published(state: StateDict) -> StateDict:
    """MXNet's names: ``convolution0``, ``batchnorm0`` and so on, numbered through as the network was put together."""
    units = sum("batchnorm" in key and key.endswith("_gamma") for key in state) // 9
    names = _numbered(units)
    return from_mxnet(state, lambda layer: names.get(layer) or head_layer(layer))


def _numbered(units: int) -> dict[str, str]:
    """MXNet's name → ours, of all layers but the head's named ones; ``units`` a stage."""
    convs, norms = ["stem"], []
    for stage, unit in ((stage, unit) for stage in range(3) for unit in range(units)):
        parts = (
            ("convs.0", "shortcut", "convs.1", "convs.2") if unit == 0 else ("convs.0", "convs.1", "convs.2")
        )
        convs += [f"stages.{stage}.{unit}.{part}" for part in parts]
        norms += [f"stages.{stage}.{unit}.norms.{i}" for i in range(3)]
    convs.append("head.fc")  # a convolution beside the bilinear layer only
    norms.append("norm.0")
    return {f"convolution{i}": own for i, own in enumerate(convs)} | {
        f"batchnorm{i}": own for i, own in enumerate(norms)
    }


def cifar_preact_resnet(
    depth: int,
    in_chans: int = 3,
    num_classes: int = 10,
    last_act: type[nn.Module] = nn.ReLU,
    **kwargs: Any,
) -> ConvNet:
    """A pre-activation bottleneck ResNet with three stages of n units, ``depth`` = 9 n + 2.

    Raises:
        ValueError: ``depth`` is not of this form.
    """
    units, rest = divmod(depth - 2, 9)
    if units < 1 or rest:
        nearest = 9 * max(1, units) + 2
        raise ValueError(f"depth={depth}: must be 9·n + 2, as {nearest} or {nearest + 9}")
    return preact_resnet(
        nn.Conv2d(in_chans, 16, 3, padding=1),
        [],
        in_channels=16,
        reduction=1,
        units=(units,) * 3,
        widths=(64, 128, 256),
        eps=1e-5,
        last_act=last_act,
        bottleneck=True,
        strided=0,
        bias=True,
        num_classes=num_classes,
        **kwargs,
    )


def build_cifar(name: str, pretrained: bool, build: Any, kwargs: dict[str, Any]) -> ConvNet:
    """``build(**kwargs)`` with timm's settings of ``name`` and its feature extraction."""
    feature_cfg = {"flatten_sequential": True, "out_indices": (0, 1, 2)}
    return build_model_with_cfg(build, name, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def resnet164(pretrained: bool = False, depth: int = 164, **kwargs: Any) -> ConvNet:
    """Pre-activation ResNet of ``depth`` layers."""
    return build_cifar("resnet164", pretrained, partial(cifar_preact_resnet, depth), kwargs)


@register_model
def resnet164_fbn(pretrained: bool = False, depth: int = 164, factors: int = 20, **kwargs: Any) -> ConvNet:
    """Pre-activation ResNet of ``depth`` layers with a factorized bilinear head, K = ``factors``."""
    build = partial(with_fbn, partial(cifar_preact_resnet, depth), factors)
    return build_cifar("resnet164_fbn", pretrained, build, kwargs)


@register_model
def resnet1001(pretrained: bool = False, depth: int = 1001, **kwargs: Any) -> ConvNet:
    """Pre-activation ResNet of ``depth`` layers."""
    return build_cifar("resnet1001", pretrained, partial(cifar_preact_resnet, depth), kwargs)


@register_model
def resnet1001_fbn(pretrained: bool = False, depth: int = 1001, factors: int = 20, **kwargs: Any) -> ConvNet:
    """Pre-activation ResNet of ``depth`` layers with a factorized bilinear head, K = ``factors``."""
    build = partial(with_fbn, partial(cifar_preact_resnet, depth), factors)
    return build_cifar("resnet1001_fbn", pretrained, build, kwargs)
