"""Learning-rate schedules: the factor on the learning rate as a pure function of the progress in epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ScheduleConfig:
    """How the learning rate moves."""

    name: Literal["cosine", "steps", "linear", "constant"] = "cosine"
    """Shape after the warm-up: half a cosine or a line to `final` over all epochs, or steps at `milestones`."""
    milestones: list[float] = field(default_factory=list)
    """Epochs after which `steps` multiplies by `gamma`."""
    gamma: float = 0.1
    """Factor of a step."""
    final: float = 0.0
    """Learning rate at the end of `cosine` and `linear`, as a share of optim.lr."""
    per: Literal["step", "epoch"] = "step"
    """Whether `cosine` and `linear` move at every step, or once an epoch."""
    warmup_epochs: float = 0.0
    """Length of the warm-up (FBN's slow start is one), which takes the place of the schedule's beginning."""
    warmup_from: float = 0.0
    """Learning rate at the start of the warm-up, as a share of optim.lr."""
    warmup_shape: Literal["linear", "constant"] = "linear"
    """Whether the warm-up rises, or stays at `warmup_from` until its end."""
    begin_epoch: float = 0.0
    """Epoch of the schedule at which this run begins, to train on from `weights` of that epoch; its end comes
    train.epochs later."""

    def __post_init__(self) -> None:
        if self.name == "steps" and not self.milestones:
            raise ValueError("milestones = []: expected at least one epoch for name = steps")
        if self.milestones != sorted(self.milestones):
            raise ValueError(f"milestones = {self.milestones}: expected epochs in rising order")
        for name in ("warmup_epochs", "warmup_from", "begin_epoch", "final", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 0 or more")


def factor(config: ScheduleConfig, epoch: float, epochs: float) -> float:
    """The factor on optim.lr.

    Args:
        epoch: progress, in epochs seen so far (fractional within an epoch).
        epochs: length of the whole training.
    """
    epoch, epochs = epoch + config.begin_epoch, epochs + config.begin_epoch
    if epoch < config.warmup_epochs:
        rise = epoch / config.warmup_epochs if config.warmup_shape == "linear" else 0.0
        return config.warmup_from + (1 - config.warmup_from) * rise
    if config.name == "constant":
        return 1.0
    if config.name == "steps":
        return config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    progress = (math.floor(epoch) if config.per == "epoch" else epoch) / epochs
    shape = (1 + math.cos(math.pi * progress)) / 2 if config.name == "cosine" else 1 - progress
    return config.final + (1 - config.final) * shape
