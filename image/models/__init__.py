"""Image models, registered in timm: after ``import image.models`` use ``timm.create_model(name)``."""

from image.models import (
    bat,
    inception_bn,
    mobilenetv3,
    noah_cnn,
    noah_mlp,
    noah_vit,
    preact_resnet,
    pvt,
    san,
    shufflenetv2,
)

__all__ = [
    "bat",
    "inception_bn",
    "mobilenetv3",
    "noah_cnn",
    "noah_mlp",
    "noah_vit",
    "preact_resnet",
    "pvt",
    "san",
    "shufflenetv2",
]
