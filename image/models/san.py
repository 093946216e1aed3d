"""SAN: image networks whose only spatial operation is self-attention, and the ResNets they are compared with.

Zhao, Jia, Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._manipulate import MATCH_PREV_GROUP
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from common.attention.norms import normed
from common.attention.san import PairwiseAttention, PatchwiseAttention, SelfAttention
from common.models.recompute import recomputed

ATTENTION: dict[str, type[SelfAttention]] = {"pairwise": PairwiseAttention, "patchwise": PatchwiseAttention}


class Block(nn.Module):
    """Residual block around a self-attention module, norms first; (N, channels, H, W) in and out."""

    def __init__(self, channels: int, kernel_size: int, attention: type[SelfAttention]) -> None:
        super().__init__()
        middle = channels // 4
        self.bn1 = nn.BatchNorm2d(channels)
        self.sam = attention(channels, channels // 16, middle, share=8, kernel_size=kernel_size)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv = nn.Conv2d(middle, channels, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.sam(normed(x, self.bn1, self.relu))
        return x + self.conv(normed(y, self.bn2, self.relu))


class SAN(nn.Module):
    """A self-attention network.

    A 1×1 convolution, then stages of: pooling by two, a 1×1 convolution to the stage's width, blocks, norm.

    Args:
        attention: ``pairwise`` or ``patchwise``.
        layers: blocks per stage.
        widths: channels per stage, multiples of 32.
        kernels: side of the footprint per stage, odd.
        num_classes: 0 for features without a classifier.
        in_chans: channels of the images.
        global_pool: ``avg``, another of timm's pooling types, or empty for none.
        drop_rate: dropout before the classifier.

    Raises:
        ValueError: sizes that make no sense or differ in number.
    """

    def __init__(
        self,
        attention: str,
        layers: Sequence[int],
        widths: Sequence[int] = (64, 256, 512, 1024, 2048),
        kernels: Sequence[int] = (3, 7, 7, 7, 7),
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(attention, layers, widths, kernels)
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.num_features = self.head_hidden_size = widths[-1]
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = []

        # In the order of execution, down to the activations: timm's feature extraction runs the children so.
        self.conv_in = nn.Conv2d(in_chans, widths[0], 1, bias=False)
        self.bn_in = nn.BatchNorm2d(widths[0])
        self.act_in = nn.ReLU(inplace=True)
        before = widths[0]
        for stage, (depth, width, kernel_size) in enumerate(zip(layers, widths, kernels)):
            blocks = (Block(width, kernel_size, ATTENTION[attention]) for _ in range(depth))
            self.add_module(f"pool{stage}", nn.MaxPool2d(2))
            self.add_module(f"conv{stage}", nn.Conv2d(before, width, 1, bias=False))
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            self.add_module(f"bn{stage}", nn.BatchNorm2d(width))
            self.add_module(f"act{stage}", nn.ReLU(inplace=True))
            self.feature_info.append(
                {"num_chs": width, "reduction": 2 ** (stage + 1), "module": f"act{stage}"}
            )
            before = width
        self.stages = len(layers)
        self.global_pool, self.fc = create_classifier(widths[-1], num_classes, pool_type=global_pool)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) → logits (N, num_classes).

        Raises:
            ValueError: a side is shorter than 2 ** stages pixels (32 for the published networks).
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) → (N, num_features, H // 2 ** stages, W // 2 ** stages)."""
        if min(x.shape[2:]) < 2**self.stages:
            raise ValueError(
                f"images have shape {tuple(x.shape)}, expected sides of at least {2**self.stages} pixels"
            )
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        x, norm, act = self.conv_in(x), self.bn_in, self.act_in
        for stage in range(self.stages):
            pool, conv, blocks = (getattr(self, f"{name}{stage}") for name in ("pool", "conv", "layer"))
            x = conv(normed(x, norm, act, pool))
            for block in blocks:
                x = recomputed((block,), x) if recompute else block(x)
            norm, act = (getattr(self, f"{name}{stage}") for name in ("bn", "act"))
        return normed(x, norm, act)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (N, num_features, h, w) → logits, or what the classifier sees if ``pre_logits``."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """A new classifier for ``num_classes`` classes, or none for 0."""
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for timm's layer-wise learning rates."""
        fine = [(r"^conv(\d+)", None), (r"^layer(\d+)\.(\d+)", None), (r"^bn(\d+)", MATCH_PREV_GROUP)]
        return {"stem": r"^(?:conv|bn)_in", "blocks": r"^(?:conv|layer|bn)(\d+)" if coarse else fine}


def check_sizes(attention: str, layers: Sequence[int], widths: Sequence[int], kernels: Sequence[int]) -> None:
    """Raise ValueError naming the argument of :class:`SAN` that makes no sense."""
    if attention not in ATTENTION:
        raise ValueError(f"attention is {attention!r}, expected one of {tuple(ATTENTION)}")
    for name, sizes in (("layers", layers), ("widths", widths), ("kernels", kernels)):
        if len(sizes) != len(layers) or not sizes:
            raise ValueError(
                f"{name} is {tuple(sizes)}, expected one entry a stage as in layers {tuple(layers)}"
            )
        if min(sizes) < 1:
            raise ValueError(f"{name} is {tuple(sizes)}, expected at least 1 everywhere")
    if any(width % 32 for width in widths):
        raise ValueError(f"widths is {tuple(widths)}, expected multiples of 32")


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "fc",
        "origin_url": "https://arxiv.org/abs/2004.13621",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        **{f"san{depth}_{kind}": _cfg(first_conv="conv_in") for depth in (10, 15, 19) for kind in ATTENTION},
        "resnet26_1241": _cfg(first_conv="conv1"),
        "resnet38_2352": _cfg(first_conv="conv1"),
    }
)


def _san(name: str, layers: Sequence[int], pretrained: bool, kwargs: dict[str, Any]) -> SAN:
    arguments = {"layers": layers, "attention": name.split("_")[1], **kwargs}
    stages = tuple(range(len(arguments["layers"])))
    return build_model_with_cfg(SAN, name, pretrained, feature_cfg={"out_indices": stages}, **arguments)


def _resnet(name: str, layers: Sequence[int], pretrained: bool, kwargs: dict[str, Any]) -> ResNet:
    # The published residual blocks do not start as the identity; timm's do.
    arguments = {"block": Bottleneck, "layers": layers, "zero_init_last": False, **kwargs}
    return build_model_with_cfg(ResNet, name, pretrained, **arguments)


@register_model
def san10_pairwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN10 with pairwise attention: 10.5M parameters, 2.2 GFLOPs, ImageNet top-1 74.9."""
    return _san("san10_pairwise", (2, 1, 2, 4, 1), pretrained, kwargs)


@register_model
def san10_patchwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN10 with patchwise attention: 11.8M parameters, 1.9 GFLOPs, ImageNet top-1 77.1."""
    return _san("san10_patchwise", (2, 1, 2, 4, 1), pretrained, kwargs)


@register_model
def san15_pairwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN15 with pairwise attention: 14.1M parameters, 3.0 GFLOPs, ImageNet top-1 76.6."""
    return _san("san15_pairwise", (3, 2, 3, 5, 2), pretrained, kwargs)


@register_model
def san15_patchwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN15 with patchwise attention: 16.2M parameters, 2.6 GFLOPs, ImageNet top-1 78.0."""
    return _san("san15_patchwise", (3, 2, 3, 5, 2), pretrained, kwargs)


@register_model
def san19_pairwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN19 with pairwise attention: 17.6M parameters, 3.8 GFLOPs, ImageNet top-1 76.9."""
    return _san("san19_pairwise", (3, 3, 4, 6, 3), pretrained, kwargs)


@register_model
def san19_patchwise(pretrained: bool = False, **kwargs: Any) -> SAN:
    """SAN19 with patchwise attention: 20.5M parameters, 3.3 GFLOPs, ImageNet top-1 78.2."""
    return _san("san19_patchwise", (3, 3, 4, 6, 3), pretrained, kwargs)


@register_model
def resnet26_1241(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """The paper's "ResNet26", bottleneck blocks 1 2 4 1: 13.7M parameters, ImageNet top-1 73.6."""
    return _resnet("resnet26_1241", (1, 2, 4, 1), pretrained, kwargs)


@register_model
def resnet38_2352(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """The paper's "ResNet38", bottleneck blocks 2 3 5 2: 19.6M parameters, ImageNet top-1 76.0."""
    return _resnet("resnet38_2352", (2, 3, 5, 2), pretrained, kwargs)
