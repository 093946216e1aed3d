"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of neighbouring samples.

timm's rules for a batch: one λ and one choice of the two for all its images. Unlike timm's, the partner of
sample i is its neighbour i XOR 1 in the *global* batch, and λ is a function of (seed, step): neither changes with the
number of processes or of micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from timm.data.mixup import cutmix_bbox_and_lam
from torch import Tensor
from torch.nn.functional import one_hot


@dataclass
class MixupConfig:
    """Mixing of images and their labels."""

    mixup: float = 0.0
    """α of mixup's Beta(α, α); 0 is off."""
    cutmix: float = 0.0
    """α of CutMix's Beta(α, α); 0 is off."""
    prob: float = 1.0
    """Probability that a batch is mixed at all."""
    switch_prob: float = 0.5
    """Probability of CutMix where both are on."""

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: expected a positive α, or 0 for off")
        for name in ("prob", "switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected a probability, 0 to 1")

    @property
    def on(self) -> bool:
        """Whether anything is ever mixed."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)


def mix(
    config: MixupConfig, inputs: Tensor, targets: Tensor, num_classes: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Mix a micro-batch.

    Args:
        inputs: (n, C, H, W).
        targets: (n,) class indices.

    Returns:
        Mixed inputs and soft targets (n, num_classes).
    """
    rng = np.random.default_rng([seed, step])
    mixed, use_cutmix = rng.random() < config.prob, _choose_cutmix(config, rng)
    soft = one_hot(targets, num_classes).to(inputs.dtype)
    if not mixed:
        return inputs, soft
    alpha = config.cutmix if use_cutmix else config.mixup
    lam = float(rng.beta(alpha, alpha))
    partner = torch.arange(len(inputs), device=inputs.device) ^ 1
    partner = partner.clamp_max(len(inputs) - 1)  # the last of an odd number keeps to itself
    if use_cutmix:
        (top, bottom, left, right), lam = _box(inputs.shape, lam, rng)
        inputs = inputs.clone()
        inputs[..., top:bottom, left:right] = inputs[partner][..., top:bottom, left:right]
    else:
        inputs = lam * inputs + (1 - lam) * inputs[partner]
    return inputs, lam * soft + (1 - lam) * soft[partner]


def _choose_cutmix(config: MixupConfig, rng: np.random.Generator) -> bool:
    if config.mixup > 0 and config.cutmix > 0:
        return bool(rng.random() < config.switch_prob)
    return config.cutmix > 0


def _box(shape: torch.Size, lam: float, rng: np.random.Generator) -> tuple[tuple[int, int, int, int], float]:
    """timm's box of area 1 − λ; it draws from NumPy's global generator, which is lent this one's seed."""
    before = np.random.get_state()
    np.random.seed(int(rng.integers(2**32)))
    try:
        box, lam = cutmix_bbox_and_lam(shape, lam, correct_lam=True)
    finally:
        np.random.set_state(before)
    return tuple(int(edge) for edge in box), float(lam)  # type: ignore[return-value]
