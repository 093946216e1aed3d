"""What all networks with a NOAH head share: how one is built, and its settings as data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import nn

from common.attention.attach import attach


def build_noah(
    variant: str,
    backbone: Callable[..., nn.Module],
    pretrained: bool = False,
    noah_heads: int = 4,
    noah_key_ratio: float = 0.5,
    noah_dropout: float = 0.1,
    feature_cfg: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The model ``variant``: ``backbone(**kwargs)`` with a NOAH head in place of its pooling and classifier.

    Args:
        variant: name in timm's registry.
        backbone: makes the plain network, with timm's API; its own pretrained weights are not loaded.
        noah_heads, noah_key_ratio, noah_dropout: see :class:`common.attention.noah.NOAH`.
        feature_cfg: how ``features_only`` gets features; from ``forward_intermediates`` by default.
        kwargs: ``pretrained_cfg``, ``pretrained_cfg_overlay``, ``cache_dir``, ``features_only`` and
            ``out_indices`` as in every timm model; the others are the backbone's.
    """

    def with_noah(**kwargs: Any) -> nn.Module:
        model = backbone(**kwargs)
        return attach(model, "noah", heads=noah_heads, key_ratio=noah_key_ratio, dropout=noah_dropout)

    features = dict(feature_cfg or {"feature_cls": "getter"})
    return build_model_with_cfg(with_noah, variant, pretrained, feature_cfg=features, **kwargs)


def imagenet_cfg(**settings: Any) -> dict[str, Any]:
    """timm's settings of a network for ImageNet's 224×224 images; ``settings`` add to them or override."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        **settings,
    }
