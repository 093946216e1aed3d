"""Inception-BN-small for 32² images: plain, with an FBN head, and with a full bilinear head (a baseline)."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from cifar.models.preact_resnet import CIFAR, build_cifar
from common.models.convnet import Branches, ConvNet, conv_norm_act, default_cfg, init_weights, with_fbn
from common.models.mxnet import from_mxnet, head_layer
from common.weights import StateDict, published_layout

default_cfgs = generate_default_cfgs(
    {
        name: default_cfg((3, 32, 32), "stem.conv", name.endswith("_fbn"), **CIFAR)
        for name in ("inception_bn_small", "inception_bn_small_fbn", "inception_bn_small_bilinear")
    }
)


# The blocks of each stage; the first of the second and third stage has no 1×1.
_UNITS = ["stem"] + [
    f"stages.{stage}.{block}.{branch}"
    for stage, blocks in enumerate((2, 5, 3))
    for block in range(blocks)
    for branch in (("conv3",) if stage and block == 0 else ("single", "conv3"))
]


@published_layout("inception_bn_small", "inception_bn_small_fbn", "inception_bn_small_bilinear")
def from_published(state: StateDict) -> StateDict:
    """MXNet's names: ``convolution0``, ``batchnorm0`` and so on, numbered through."""
    names = {f"convolution{i}": f"{own}.conv" for i, own in enumerate(_UNITS)}
    names |= {f"batchnorm{i}": f"{own}.norm" for i, own in enumerate(_UNITS)}
    return from_mxnet(state, lambda layer: names.get(layer) or head_layer(layer))


class BilinearHead(nn.Module):
    """A linear classifier of all pairwise products of channels, summed over positions.

    ``z = X Xᵀ`` of the features (C, positions), signed square root, L2 normalisation (Lin, RoyChowdhury and
    Maji, "Bilinear CNN Models for Fine-grained Visual Recognition", ICCV 2015).
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_features**2, num_classes)
        init_weights(self)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) → logits (N, classes)."""
        x = features.flatten(2)
        z = (x @ x.mT).flatten(1)
        # 1e-5 keeps the root's slope finite at zero.
        root = z.sign() * (z + 1e-5).abs().sqrt()
        return self.fc(F.normalize(root))


def simple(in_channels: int, single: int, conv3: int, act: type[nn.Module] = nn.ReLU) -> Branches:
    """1×1 | 3×3."""
    return Branches(
        {
            "single": conv_norm_act(in_channels, single, 1, act=act),
            "conv3": conv_norm_act(in_channels, conv3, 3, act=act),
        }
    )


def down(in_channels: int, conv3: int) -> Branches:
    """At half the size: 3×3 | 3×3 max pool."""
    return Branches({"conv3": conv_norm_act(in_channels, conv3, 3, stride=2), "pool": nn.MaxPool2d(3, 2, 1)})


def small_inception_bn(
    in_chans: int = 3, num_classes: int = 10, last_act: type[nn.Module] = nn.ReLU, **kwargs: Any
) -> ConvNet:
    """``last_act`` ends both branches of the last block; ``kwargs`` are :class:`ConvNet`'s."""
    stages = [
        [simple(96, 32, 32), simple(64, 32, 48)],
        [down(80, 80), simple(160, 112, 48), simple(160, 96, 64), simple(160, 80, 80), simple(160, 48, 96)],
        [down(144, 96), simple(240, 176, 160), simple(336, 176, 160, last_act)],
    ]
    info = [
        {"num_chs": 80, "reduction": 1, "module": "stages.0"},
        {"num_chs": 144, "reduction": 2, "module": "stages.1"},
        {"num_chs": 336, "reduction": 4, "module": "stages.2"},
    ]
    stem = conv_norm_act(in_chans, 96, 3)
    return ConvNet(stem, stages, nn.Identity(), info, num_classes=num_classes, **kwargs)


@register_model
def inception_bn_small(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """Inception-BN-small."""
    return build_cifar("inception_bn_small", pretrained, small_inception_bn, kwargs)


@register_model
def inception_bn_small_fbn(pretrained: bool = False, factors: int = 20, **kwargs: Any) -> ConvNet:
    """Inception-BN-small with a factorized bilinear head, K = ``factors``."""
    return build_cifar(
        "inception_bn_small_fbn", pretrained, partial(with_fbn, small_inception_bn, factors), kwargs
    )


@register_model
def inception_bn_small_bilinear(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """Inception-BN-small with all pairwise products of channels before the classifier."""
    build = partial(small_inception_bn, head=BilinearHead)
    return build_cifar("inception_bn_small_bilinear", pretrained, build, kwargs)
