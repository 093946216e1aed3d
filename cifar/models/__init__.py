"""CIFAR models, registered in timm: after ``import cifar.models`` use ``timm.create_model(name)``."""

from cifar.models import inception_bn_small, preact_resnet

__all__ = ["inception_bn_small", "preact_resnet"]
