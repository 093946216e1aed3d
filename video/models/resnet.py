"""C2D and I3D: ResNets on clips, plain, with non-local blocks, or with bilinear attentional transforms.

C2D's kernels have no extent in time: only its one pooling over time, the average at the end, and the blocks put
into it mix frames. I3D has kernels 5 or 3 long in some places. (Wang et al., "Non-local Neural Networks",
CVPR 2018; Carreira and Zisserman, CVPR 2017; the options are those of the BAT programs, Chi et al., CVPR 2020.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.frames import FrameConv3d, FrameMaxPool, FrameNorm, TimeMaxPool, clips, frames
from common.models.recompute import recomputed

MakeBlock = Callable[[int], nn.Module]


class Residual(nn.Module):
    """``relu(shortcut + branch)``, the branch of 1×1×1, 1×3×3, 1×1×1 (``Bottleneck``) or two 1×3×3 (``Basic``).

    Args:
        in_channels: of the input.
        channels: inside; the output has ``expansion`` times as many.
        stride: in space, of the first 1×3×3.
        temporal: the first convolution is 3 long in time.
    """

    expansion: int

    def __init__(self, in_channels: int, channels: int, stride: int, temporal: bool) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self._make_branch(in_channels, channels, stride, 3 if temporal else 1)
        self.relu = nn.ReLU()
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                conv(in_channels, out_channels, 1, 1, stride), FrameNorm(out_channels)
            )

    def _make_branch(self, in_channels: int, channels: int, stride: int, time: int) -> None:
        raise NotImplementedError

    def branch(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, C', T, H', W'), to be added to the shortcut."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, C', T, H', W')."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(shortcut + self.branch(x))


class Basic(Residual):
    """Two convolutions, as in ResNet-18 and -34."""

    expansion = 1

    def _make_branch(self, in_channels: int, channels: int, stride: int, time: int) -> None:
        self.conv1, self.bn1 = conv(in_channels, channels, time, 3, stride), FrameNorm(channels)
        self.conv2, self.bn2 = conv(channels, channels, 1, 3), FrameNorm(channels)

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class Bottleneck(Residual):
    """Three convolutions, as in ResNet-50 and deeper."""

    expansion = 4

    def _make_branch(self, in_channels: int, channels: int, stride: int, time: int) -> None:
        self.conv1, self.bn1 = conv(in_channels, channels, time, 1), FrameNorm(channels)
        self.conv2, self.bn2 = conv(channels, channels, 1, 3, stride), FrameNorm(channels)
        self.conv3, self.bn3 = conv(channels, 4 * channels, 1, 1), FrameNorm(4 * channels)

    def branch(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))


class VideoResNet(nn.Module):
    """A ResNet on clips (N, in_chans, T, H, W), of any length, size and aspect.

    Args:
        block: :class:`Basic` or :class:`Bottleneck`.
        layers: residual blocks of ``layer1`` … ``layer4``.
        channels: of each layer's blocks, before their expansion.
        temporal: whether the residual blocks of a layer have a kernel along time: a pattern for each layer,
            repeated as often as the layer needs.
        stem_time: length in time of the first convolution, odd.
        make_block: ``make_block(channels)`` gives the blocks that ``nonlocal_mod`` tells the places of; None: none.
        nonlocal_mod: m, or one m for ``layer2`` and one for ``layer3``. A block stands after residual block i
            when ``i % m == m - 1``, and is named ``layerL.nl{i}``.
        num_classes: logits of a clip; 0: pooled features.
        in_chans: channels of a frame.
        drop_rate: dropout before the classifier.
        global_pool: "avg", or "" for features and logits of every position, (N, …, T', H', W').

    Raises:
        ValueError: an unfit ``nonlocal_mod`` or ``global_pool``.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        block: type[Residual],
        layers: Sequence[int],
        channels: Sequence[int] = (64, 128, 256, 512),
        temporal: Sequence[Sequence[bool]] = ((False,),) * 4,
        stem_time: int = 1,
        make_block: MakeBlock | None = None,
        nonlocal_mod: int | Sequence[int] = 2,
        num_classes: int = 400,
        in_chans: int = 3,
        drop_rate: float = 0.5,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        places = _places(nonlocal_mod)
        self.conv1 = conv(in_chans, channels[0], stem_time, 7, 2)
        self.bn1 = FrameNorm(channels[0])
        self.relu = nn.ReLU()
        self.maxpool = FrameMaxPool(3, 2)
        self.feature_info = [{"num_chs": channels[0], "reduction": 2, "module": "relu"}]
        width = channels[0]
        for i, (count, inner) in enumerate(zip(layers, channels)):
            layer: OrderedDict[str, nn.Module] = OrderedDict()
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                layer[str(j)] = block(width, inner, stride, bool(temporal[i][j % len(temporal[i])]))
                width = inner * block.expansion
                if make_block is not None and i in places and j % places[i] == places[i] - 1:
                    layer[f"nl{j}"] = make_block(width)
            setattr(self, f"layer{i + 1}", nn.Sequential(layer))
            self.feature_info.append({"num_chs": width, "reduction": 4 << i, "module": f"layer{i + 1}"})
            if i == 0:
                self.timepool = TimeMaxPool()
        self.num_features = self.head_hidden_size = width
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self._init_weights()
        self.reset_classifier(num_classes, global_pool)

    def _init_weights(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, FrameConv3d) and ".nl" not in name:  # those blocks have done it themselves
                init_conv(module)

    def forward_features(self, x: Tensor) -> Tensor:
        """Clips (N, in_chans, T, H, W) → features (N, num_features, max(1, T // 2), H / 32, W / 32)."""
        if x.ndim != 5:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: clips must be (N, {self.conv1.in_channels}, T, H, W)"
            )
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.timepool(self._layer(self.layer1, x))
        for layer in (self.layer2, self.layer3, self.layer4):
            x = self._layer(layer, x)
        return x

    def _layer(self, layer: nn.Sequential, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return layer(x)
        for block in layer:
            x = recomputed((block,), x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits (N, num_classes); ``pre_logits``: to pooled features (N, num_features).

        Averages are taken over 7×7 windows (the whole map where it is smaller) and all the time; the classifier
        sees each, and the logits are averaged: larger maps than in training are many views in one.
        """
        if self.global_pool:
            window = [min(7, side) for side in x.shape[3:]]
            x = clips(F.avg_pool2d(frames(x.mean(2, keepdim=True)), window, 1), 1)
        x = F.dropout(x, self.drop_rate, self.training)
        x = x if pre_logits else self.fc(x)
        return x.mean((2, 3, 4)) if self.global_pool else x

    def forward(self, x: Tensor) -> Tensor:
        """Clips (N, in_chans, T, H, W) → logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The classifier, a 1×1×1 convolution."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; 0 classes: none."""
        if global_pool not in (None, "avg", ""):
            raise ValueError(f"global_pool={global_pool!r}: must be 'avg' or ''")
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            like = self.conv1.weight
            fc = FrameConv3d(self.num_features, num_classes, 1, device=like.device, dtype=like.dtype)
            self.fc = init_conv(fc)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only every block's input for the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's parameter groups; a non-local or BAT block belongs to the residual block before it."""
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(?:nl)?(\d+)"
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": blocks}


def conv(in_channels: int, out_channels: int, time: int, space: int, stride: int = 1) -> FrameConv3d:
    """time×space×space convolution without bias, padded to keep the size, with a stride in space."""
    return FrameConv3d(
        in_channels,
        out_channels,
        (time, space, space),
        (1, stride, stride),
        (time // 2, space // 2, space // 2),
        bias=False,
    )


def init_conv(module: FrameConv3d) -> FrameConv3d:
    """Normal weights of variance 2 / (kt · kh · out_channels): the width of the kernel is not counted."""
    time, height, _ = module.kernel_size
    nn.init.normal_(module.weight, std=sqrt(2 / (time * height * module.out_channels)))
    return module


def _places(nonlocal_mod: int | Sequence[int]) -> dict[int, int]:
    """Index of a layer → after every how many of its residual blocks a block goes."""
    mods = [nonlocal_mod] if isinstance(nonlocal_mod, int) else list(nonlocal_mod)
    if len(mods) not in (1, 2) or any(m < 1 for m in mods):
        raise ValueError(
            f"nonlocal_mod={nonlocal_mod!r}: must be one number of 1 or more, or two for layer2, layer3"
        )
    return {1: mods[0], 2: mods[-1]}
