"""A convolutional classifier of stem, stages, norm and head, with timm's API, and parts to build one from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from math import isqrt
from typing import Any

import torch
from timm.layers import ClassifierHead
from torch import Tensor, nn

from common.attention.fbn import FBNHead
from common.models.recompute import recomputed

MakeHead = Callable[[int, int], nn.Module]

MEAN = (123.68 / 255, 116.779 / 255, 103.939 / 255)
STD = (1 / 255, 1 / 255, 1 / 255)


class ConvNet(nn.Module):
    """stem → stages → norm → head.

    Args:
        stem: (N, in_chans, H, W) to the first stage's input.
        stages: each a sequence of blocks.
        norm: what follows the last stage, its activation included.
        feature_info: timm's: ``num_chs``, ``reduction`` and ``module`` of every feature level; the last one's
            channels are the head's.
        head: ``head(num_features, num_classes)`` gives a module from unpooled features (N, C, H, W) to
            logits; None is global pooling and a linear classifier.
        num_classes: logits per image; 0 gives the pooled features.
        drop_rate: dropout before the classifier.
        global_pool: timm's name of the pooling, of a network without ``head`` or without classes.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Sequence[nn.Module]],
        norm: nn.Module,
        feature_info: list[dict[str, Any]],
        head: MakeHead | None = None,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*(nn.Sequential(*blocks) for blocks in stages))
        self.norm = norm
        self.feature_info = feature_info
        self.num_features = self.head_hidden_size = int(feature_info[-1]["num_chs"])
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self._make_head = head
        self._global_pool = global_pool
        init_weights(self)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) → unpooled features (N, num_features, H', W')."""
        x = self.stem(x)
        for stage in self.stages:
            x = _saving(stage, x) if self.grad_checkpointing and torch.is_grad_enabled() else stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits (N, num_classes); ``pre_logits``: to the pooled features (N, num_features)."""
        if isinstance(self.head, ClassifierHead):
            return self.head(x, pre_logits=pre_logits)
        x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x.mean((2, 3)) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The linear classifier, or the whole head where that sees unpooled features."""
        return self.head.fc if isinstance(self.head, ClassifierHead) else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head of the same kind; 0 classes: pooled features, unpooled if ``global_pool`` is ""."""
        self._global_pool = self._global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        if self._make_head is None or num_classes == 0:
            head = ClassifierHead(self.num_features, num_classes, self._global_pool, self.drop_rate)
            init_weights(head)
        else:
            head = self._make_head(self.num_features, num_classes)
        like = next(self.parameters())
        self.head = head.to(like.device, like.dtype).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of every √n-th of a stage's n blocks for the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups for layer-wise learning rates: stem, blocks (or stages), norm."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^norm", (99999,))]}


def with_fbn(
    build: Callable[..., ConvNet],
    factors: int,
    drop_factor: float = 0.5,
    eval_scale: str = "unbiased",
    keep_diagonal: bool = False,
    **kwargs: Any,
) -> ConvNet:
    """The FBN version of a network: its last ReLU is tanh, its head a :class:`FBNHead`.

    Args:
        build: takes ``last_act`` and ``head``, and ``kwargs``.
        factors, drop_factor, eval_scale, keep_diagonal: of the FB layer, ``drop_factor`` its ``drop``.
    """
    head = partial(
        FBNHead, factors=factors, drop=drop_factor, eval_scale=eval_scale, keep_diagonal=keep_diagonal
    )
    return build(last_act=nn.Tanh, head=head, **kwargs)


def default_cfg(
    input_size: tuple[int, int, int], first_conv: str, fbn: bool, **kwargs: Any
) -> dict[str, Any]:
    """timm's settings of a network of the FBN paper: the mean is subtracted from 0–255 values, unscaled."""
    cfg = {
        "url": "",
        "num_classes": 1000,
        "input_size": input_size,
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "crop_pct": 0.875,
        "first_conv": first_conv,
        "classifier": ("head.fc", "head.bilinear") if fbn else "head.fc",
    }
    return cfg | kwargs


def init_weights(module: nn.Module) -> None:
    """Kaiming normal by fan-in for convolutions and linear layers, zero biases."""
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def conv_norm_act(
    in_channels: int,
    channels: int,
    kernel_size: int,
    stride: int = 1,
    bias: bool = True,
    eps: float = 1e-5,
    act: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Convolution (padded to keep the size) → batch norm → activation."""
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride, kernel_size // 2, bias=bias)
    norm = nn.BatchNorm2d(channels, eps=eps)
    return nn.Sequential(OrderedDict(conv=conv, norm=norm, act=act()))


class Branches(nn.ModuleDict):
    """Branches of one input, concatenated along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, ΣC, H', W')."""
        return torch.cat([branch(x) for branch in self.values()], 1)


def _saving(stage: nn.Module, x: Tensor) -> Tensor:
    """``stage(x)``, of whose n blocks every √n-th keeps its input for the backward pass."""
    blocks = tuple(stage.children())
    every = isqrt(len(blocks))
    for start in range(0, len(blocks), every):
        x = recomputed(blocks[start : start + every], x)
    return x
