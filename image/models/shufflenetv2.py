"""ShuffleNetV2 with timm's API: torchvision's network, which timm lacks.

Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design".
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.shufflenetv2 import ShuffleNetV2 as TorchvisionShuffleNetV2

from common.weights import StateDict, published_layout
from image.models.noah import imagenet_cfg


class ShuffleNetV2(TorchvisionShuffleNetV2):
    """torchvision's ShuffleNetV2 with timm's API; parameter names stay torchvision's.

    Args:
        widths: output channels of the stem, the three stages and the last convolution.
        in_chans: channels of the images.
        num_classes: logits per image; 0 for none.
        global_pool: ``"avg"`` over the positions before the classifier, or ``""`` for none.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (24, 116, 232, 464, 1024),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__([4, 8, 4], list(widths))
        if in_chans != 3:
            self.conv1[0] = nn.Conv2d(in_chans, widths[0], 3, 2, 1, bias=False)
        self.in_chans, self.drop_rate, self.grad_checkpointing = in_chans, drop_rate, False
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info = [
            {"module": module, "num_chs": width, "reduction": 2 << i}
            for i, (module, width) in enumerate(
                zip(("conv1", "maxpool", "stage2", "stage3", "stage4"), (widths[0], *widths))
            )
        ]
        self.reset_classifier(num_classes, global_pool)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) → logits (N, classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) → maps (N, C, H/32, W/32)."""
        x = self.maxpool(self.conv1(x))
        for stage in (self.stage2, self.stage3, self.stage4):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
        return self.conv5(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps (N, C, H, W) → logits (N, classes), or with ``pre_logits`` the features (N, C) before them."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer for ``num_classes`` classes, 0 for none; ``global_pool`` as above.

        Raises:
            ValueError: ``global_pool`` is unknown.
        """
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise ValueError(f"global_pool={global_pool!r}: expected 'avg' or ''")
            self.global_pool = global_pool
        weight = self.conv5[0].weight
        fc = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.fc = fc.to(weight.device, weight.dtype)
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, then stages (``coarse``) or blocks, then the last convolution."""
        blocks = r"^stage(\d+)" if coarse else r"^stage(\d+)\.(\d+)"
        return {"stem": r"^conv1", "blocks": [(blocks, None), (r"^conv5", (99999,))]}


WIDTHS = {
    "shufflenetv2_050": (24, 48, 96, 192, 1024),
    "shufflenetv2_100": (24, 116, 232, 464, 1024),
    "shufflenetv2_150": (24, 176, 352, 704, 1024),
    "shufflenetv2_200": (24, 244, 488, 976, 2048),
}


@published_layout(*(f"{name}_{head}" for name in WIDTHS for head in ("base", "noah")))
def from_published(state: StateDict) -> StateDict:
    """The published programs have ``head.2`` (pooling, flattening, Linear) or NOAH's ``head`` for ``fc``."""
    return {key.replace("head.2.", "fc.").replace("head.", "fc."): value for key, value in state.items()}


_CFG = imagenet_cfg(interpolation="bilinear", pool_size=(7, 7), first_conv="conv1.0", classifier="fc")
default_cfgs = generate_default_cfgs({f"{name}_base": _CFG for name in WIDTHS})


def _shufflenetv2(name: str, pretrained: bool, **kwargs: Any) -> ShuffleNetV2:
    kwargs.setdefault("widths", WIDTHS[name])
    return build_model_with_cfg(ShuffleNetV2, f"{name}_base", pretrained, **kwargs)


@register_model
def shufflenetv2_050_base(pretrained: bool = False, **kwargs: Any) -> ShuffleNetV2:
    """ShuffleNetV2 0.5×, 1.37 M parameters."""
    return _shufflenetv2("shufflenetv2_050", pretrained, **kwargs)


@register_model
def shufflenetv2_100_base(pretrained: bool = False, **kwargs: Any) -> ShuffleNetV2:
    """ShuffleNetV2 1.0×, 2.28 M parameters, 69.43 % top-1 as NOAH's baseline."""
    return _shufflenetv2("shufflenetv2_100", pretrained, **kwargs)


@register_model
def shufflenetv2_150_base(pretrained: bool = False, **kwargs: Any) -> ShuffleNetV2:
    """ShuffleNetV2 1.5×, 3.50 M parameters."""
    return _shufflenetv2("shufflenetv2_150", pretrained, **kwargs)


@register_model
def shufflenetv2_200_base(pretrained: bool = False, **kwargs: Any) -> ShuffleNetV2:
    """ShuffleNetV2 2.0×, 7.39 M parameters."""
    return _shufflenetv2("shufflenetv2_200", pretrained, **kwargs)
