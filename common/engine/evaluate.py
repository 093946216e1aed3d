"""Evaluation: every sample exactly once, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from common.data.loader import Batch, Unreadable
from common.engine.metrics import EvalMeter
from common.engine.worst import Worst


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    num_classes: int,
    device: torch.device,
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    interrupted: Callable[[], bool] = lambda: False,
    on_unreadable: Callable[[list[Unreadable]], None] = lambda _: None,
    worst: Worst | None = None,
) -> dict[str, Any] | None:
    """Evaluate ``model``. All ranks call this, with equally many batches.

    Args:
        model: gives logits (n, num_classes); left in the mode it came in.
        autocast: the context that the forward pass runs in.
        interrupted: asked after each batch; when it says yes, evaluation ends without a result.
        on_unreadable: gets the samples that could not be read.
        worst: keeps the samples with the highest losses.

    Returns:
        The numbers of :meth:`EvalMeter.compute`, or None if interrupted.
    """
    training = model.training
    model.eval()
    meter = EvalMeter(num_classes, device)
    try:
        for batch in batches:
            on_unreadable(batch.unreadable)
            with autocast():
                logits = model(batch.inputs)
            meter.add(logits, batch.targets)
            if worst:
                worst.add(batch.inputs, logits, batch.targets)
            if interrupted():
                return None
        return meter.compute()
    finally:
        model.train(training)
