"""A model from its name in timm's registry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
from torch import nn

from common.attention.attach import attach
from common.config import nearest
from common.errors import ConfigError


@dataclass
class ModelConfig:
    """Which network."""

    name: str = "resnet50_bat"
    """Name in timm's registry, this project's models included."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model's constructor, such as drop_rate, or layers and channels for a small version."""
    attach: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Mechanisms to attach to the network: noah, bat, nl or fbn, each with its arguments."""


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Build the network with ``num_classes`` outputs. Import the task's models first.

    Raises:
        ConfigError: no model of that name, or arguments that it does not take.
    """
    if not timm.is_model(config.name):
        raise ConfigError(
            f"model.name = {config.name!r}: no such model; {nearest(config.name, timm.list_models())}"
        )
    try:
        model = timm.create_model(config.name, num_classes=num_classes, **config.args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.args of {config.name}: {error}") from None
    for mechanism, arguments in config.attach.items():
        try:
            model = attach(model, mechanism, **arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.attach.{mechanism} on {config.name}: {error}") from None
    return model
