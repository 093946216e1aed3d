"""Cross entropy with the field's two kinds of label smoothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass
class LossConfig:
    """What training minimises."""

    smoothing: float = 0.0
    """Label smoothing ε."""
    smoothing_over: Literal["all", "others"] = "all"
    """Whether ε is spread over all K classes (the standard), or over the K − 1 others (SAN)."""

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing = {self.smoothing}: expected 0 or more, below 1")


def loss_sum(config: LossConfig, logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy summed over the samples.

    Args:
        logits: (n, K).
        targets: (n,) class indices, or (n, K) probabilities.
    """
    epsilon, classes = config.smoothing, logits.shape[1]
    if config.smoothing_over == "others":
        # ε over the others leaves 1 − ε for the target: the same as ε·K/(K−1) spread over all.
        epsilon *= classes / (classes - 1)
    return cross_entropy(logits, targets, label_smoothing=epsilon, reduction="sum")
