"""Optimizers from timm, over parameter groups with their own learning rate and weight decay."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim import Optimizer

from common.config import nearest
from common.engine.parallel import own
from common.engine.parts import Part, Stored
from common.errors import ConfigError

# timm's "sgd" is Nesterov's; the field's SGD is its "momentum".
_TIMM_NAMES = {"sgd": "momentum", "nag": "nesterov", "adamw": "adamw"}


@dataclass
class OptimConfig:
    """How weights move."""

    name: Literal["sgd", "nag", "adamw"] = "sgd"
    """SGD with momentum, Nesterov's accelerated gradient, or AdamW."""
    lr: float = 0.1
    """Learning rate for the total batch as it is given; it is not scaled by anything."""
    momentum: float = 0.9
    """Momentum of sgd and nag."""
    betas: tuple[float, float] = (0.9, 0.999)
    """β₁ and β₂ of adamw."""
    eps: float = 1e-8
    """ε of adamw."""
    weight_decay: float = 1e-4
    """Weight decay (decoupled for adamw)."""
    decay_norm: bool = False
    """Whether normalisation weights and biases decay too."""
    decay_bias: bool = False
    """Whether other biases, and what the model itself excludes (position embeddings), decay too."""
    bias_lr: float = 1.0
    """Factor on the learning rate of biases outside normalisation layers."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Factors on the learning rate, by regular expression on parameter names; the first that matches counts."""
    freeze: list[str] = field(default_factory=list)
    """Regular expressions on parameter names: what matches is not trained."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0 is off."""
    clip_value: float = 0.0
    """Largest magnitude of a gradient's element; 0 is off."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "clip_norm", "clip_value", "bias_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 0 or more")
        for pattern in [*self.lr_scale, *self.freeze]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer of ``model``; frozen parameters lose ``requires_grad``.

    Raises:
        ConfigError: a pattern of ``freeze`` or ``lr_scale`` matches no parameter.
    """
    options: dict[str, Any] = {"momentum": config.momentum}
    if config.name == "adamw":
        options |= {"betas": config.betas, "eps": config.eps}
    groups = parameter_groups(model, config)
    return create_optimizer_v2(groups, opt=_TIMM_NAMES[config.name], lr=config.lr, **options)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters by (``weight_decay``, ``lr_scale``), each group in the model's order."""
    names = [name for name, _ in model.named_parameters()]
    for key in ("freeze", "lr_scale"):
        for pattern in getattr(config, key):
            if not any(re.search(pattern, name) for name in names):
                hint = nearest(pattern, sorted({name.rsplit(".", 1)[0] for name in names}))
                raise ConfigError(f"optim.{key}: {pattern!r} matches no parameter; {hint}")
    excluded: set[str] = getattr(model, "no_weight_decay", set)()  # a method of timm's models
    norms = {id(p) for m in model.modules() if _is_norm(m) for p in m.parameters(recurse=False)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if any(re.search(pattern, name) for pattern in config.freeze):
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        norm = id(parameter) in norms
        bias = not norm and (name.endswith("bias") or name in excluded)
        decays = (not norm or config.decay_norm) and (not bias or config.decay_bias)
        scale = next((s for pattern, s in config.lr_scale.items() if re.search(pattern, name)), 1.0)
        if bias and name.endswith("bias"):
            scale *= config.bias_lr
        groups[config.weight_decay if decays else 0.0, scale].append(parameter)
    return [{"params": p, "weight_decay": decay, "lr_scale": scale} for (decay, scale), p in groups.items()]


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def named_state(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Tensor | Part]]:
    """The optimizer's state by parameter name: it outlives another grouping of the parameters.

    Of what is divided each rank has its part.
    """
    names = _names_in_order(model, optimizer)
    return {
        names[index]: {key: own(value) for key, value in entry.items()}
        for index, entry in optimizer.state_dict()["state"].items()
    }


def load_named_state(model: nn.Module, optimizer: Optimizer, stored: Stored) -> None:
    """Load the state of a checkpoint, from any mode; the groups' settings stay as they are."""
    names, parameters, keys = (
        _names_in_order(model, optimizer),
        dict(model.named_parameters()),
        state_keys(stored),
    )
    plain = optimizer.state_dict()
    plain["state"] = {
        index: {key: _like(parameters[name], stored, f"{name}.{key}") for key in keys[name]}
        for index, name in enumerate(names)
        if name in keys
    }
    optimizer.load_state_dict(plain)


def state_keys(stored: Stored) -> dict[str, list[str]]:
    """What a checkpoint's optimizer state has of each parameter."""
    keys = defaultdict(list)
    for name in stored:
        parameter, key = name.rsplit(".", 1)
        keys[parameter].append(sys.intern(key))  # pickle writes equal strings apart, and then files differ
    return keys


def _like(parameter: Tensor, stored: Stored, name: str) -> Tensor:
    if not stored.shape(name) or not isinstance(own(parameter), Part):
        return stored.whole(name)
    value = torch.empty_like(parameter, requires_grad=False)
    stored.fill(name, own(value))
    return value


def _names_in_order(model: nn.Module, optimizer: Optimizer) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _is_norm(module: nn.Module) -> bool:
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return isinstance(module, norms)
