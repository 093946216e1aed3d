"""Several clips of one video as one sample of a network for clips."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def average_segments(model: M, segments: int) -> M:
    """Make ``model`` take (N, segments, 3, T, H, W), and give the mean of the segments' logits (N, K).

    By hooks, so that the network keeps its type, and its parameters their names.
    """

    def flatten(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].flatten(0, 1),)

    def average(_: nn.Module, __: tuple[Tensor], logits: Tensor) -> Tensor:
        return logits.unflatten(0, (-1, segments)).mean(1)

    model.register_forward_pre_hook(flatten)
    model.register_forward_hook(average)
    return model
