"""NOAH's own MobileNetV3-Small; timm's differs in widths, strides, squeeze-excitation and last layers.

Howard et al., "Searching for MobileNetV3", in the variant whose results the NOAH paper gives.
"""

from __future__ import annotations

import re
from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from common.weights import StateDict, published_layout
from image.models.noah import imagenet_cfg

# kernel, expanded channels, output channels, squeeze-excitation, hard swish (else ReLU), stride
_BLOCKS = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)


class SqueezeExcite(nn.Module):
    """Channel gates from the mean of each channel: x · hard_sigmoid(W₂ relu(W₁ mean(x))), without biases."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 4
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise convolution with squeeze-excitation, 1×1 projection; (N, C, H, W) → maps."""

    def __init__(
        self,
        in_chans: int,
        kernel: int,
        expanded: int,
        out_chans: int,
        excite: bool,
        swish: bool,
        stride: int,
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and in_chans == out_chans
        act = nn.Hardswish if swish else nn.ReLU
        # The indices are the published names: they stay the same without squeeze-excitation.
        self.conv = nn.Sequential(
            nn.Conv2d(in_chans, expanded, 1, bias=False),
            nn.BatchNorm2d(expanded),
            act(inplace=True),
            nn.Conv2d(expanded, expanded, kernel, stride, kernel // 2, groups=expanded, bias=False),
            nn.BatchNorm2d(expanded),
            SqueezeExcite(expanded) if excite else nn.Identity(),
            act(inplace=True),
            nn.Conv2d(expanded, out_chans, 1, bias=False),
            nn.BatchNorm2d(out_chans),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV3Small(nn.Module):
    """NOAH's MobileNetV3-Small with timm's API.

    Args:
        in_chans: channels of the images.
        num_classes: logits per image; 0 for none.
        global_pool: ``"avg"`` over the positions before the last convolution, or ``""`` for none.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg", drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.in_chans, self.drop_rate, self.grad_checkpointing = in_chans, drop_rate, False
        layers: list[nn.Module] = [_conv_bn_swish(in_chans, 16, 3, 2)]
        channels = 16
        for kernel, expanded, out_chans, excite, swish, stride in _BLOCKS:
            layers.append(InvertedResidual(channels, kernel, expanded, out_chans, excite, swish, stride))
            channels = out_chans
        layers.append(_conv_bn_swish(channels, 576, 1, 1))
        self.features = nn.Sequential(*layers)
        self.num_features, self.head_hidden_size = 576, 1280
        self.conv_head = nn.Conv2d(576, 1280, 1)
        self.feature_info = [
            {"module": f"features.{i}", "num_chs": channels, "reduction": reduction}
            for i, channels, reduction in ((0, 16, 2), (1, 16, 4), (3, 24, 8), (8, 48, 16), (12, 576, 32))
        ]
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) → logits (N, classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) → maps (N, 576, H/32, W/32)."""
        return checkpoint_seq(self.features, x) if self.grad_checkpointing else self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps (N, 576, H, W) → logits (N, classes), or with ``pre_logits`` the features (N, 1280).

        With ``global_pool=""`` these features keep their positions: (N, 1280, H, W).
        """
        if self.global_pool == "avg":
            x = x.mean((2, 3), keepdim=True)
        x = F.hardswish(self.conv_head(x))
        if self.global_pool == "avg":
            x = x.flatten(1)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.classifier(x)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer for ``num_classes`` classes, 0 for none; ``global_pool`` as above.

        Raises:
            ValueError: ``global_pool`` is unknown.
        """
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise ValueError(f"global_pool={global_pool!r}: expected 'avg' or ''")
            self.global_pool = global_pool
        classifier = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()
        self.classifier = classifier.to(self.conv_head.weight.device, self.conv_head.weight.dtype)
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, then the blocks one by one; there are no stages to be coarse by."""
        return {"stem": r"^features\.0\.", "blocks": [(r"^features\.(\d+)", None), (r"^conv_head", (99999,))]}


def _conv_bn_swish(in_chans: int, out_chans: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_chans, out_chans, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out_chans),
        nn.Hardswish(inplace=True),
    )


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@published_layout("mobilenetv3_small_base", "mobilenetv3_small_noah")
def from_published(state: StateDict) -> StateDict:
    """The published last convolution is in ``features``, after the pooling where there is one."""
    own = {r"^features\.1[34]\.": "conv_head.", r"^classifier\.1\.": "classifier."}
    for published, name in own.items():
        state = {re.sub(published, name, key): value for key, value in state.items()}
    return state


_CFG = imagenet_cfg(
    interpolation="bilinear", pool_size=(7, 7), first_conv="features.0.0", classifier="classifier"
)
default_cfgs = generate_default_cfgs({"mobilenetv3_small_base": _CFG})


@register_model
def mobilenetv3_small_base(pretrained: bool = False, **kwargs: Any) -> MobileNetV3Small:
    """NOAH's MobileNetV3-Small with average pooling, 2.94 M parameters, 67.11 % top-1."""
    taps = {"flatten_sequential": True}
    return build_model_with_cfg(
        MobileNetV3Small, "mobilenetv3_small_base", pretrained, feature_cfg=taps, **kwargs
    )
