"""A model from its name in timm's registry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

from common.attention.attach import attach, evaluating
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


def misfit(model: nn.Module, size: tuple[int, ...]) -> str | None:
    """Why ``model`` takes no inputs of ``size``, (C, H, W) or (C, T, H, W); None if it does."""
    own = next(model.parameters())
    try:
        with evaluating(model):
            model(torch.zeros(1, *size, device=own.device, dtype=own.dtype))
    except (AssertionError, RuntimeError, ValueError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return None


def refuse_misfit(model: nn.Module, size: int, key: str) -> None:
    """Raise a :class:`ConfigError` where ``model``, made for one size, takes no images of ``size`` × ``size``.

    Args:
        key: the setting that says ``size``.
    """
    made_for = getattr(model, "pretrained_cfg", {}).get("input_size", (3,))[-1]
    if size == made_for or not any(hasattr(module, "img_size") for module in model.modules()):
        return
    if why := misfit(model, (3, size, size)):
        raise ConfigError(
            f"{key} = {size}: the network takes no such images ({why}); "
            f"try --{key} {made_for}, or --model.args.img_size {size}"
        )


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
