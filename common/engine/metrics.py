"""Exact metrics: sums that stay on the device until they are asked for, and add up over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.data.loader import FILLER


class TrainMeter:
    """Loss, accuracy and samples since the last log line."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Count a micro-batch; ``loss`` is a sum over its samples, ``targets`` its class indices."""
        correct = (logits.argmax(1) == targets).sum()
        seen = torch.full_like(correct, len(targets))
        self.sums += torch.stack([loss.detach().double(), correct.double(), seen.double()])

    def compute(self) -> dict[str, float]:
        """Mean loss and accuracy (%) over all ranks. All ranks call this; it waits for the device."""
        loss, correct, seen = _all_sum(self.sums.clone()).tolist()
        return {"loss": loss / max(seen, 1), "top1": 100 * correct / max(seen, 1)}


class EvalMeter:
    """Top-1, top-5, loss and the confusion matrix of an evaluation; every sample counts once."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.top5 = torch.zeros((), dtype=torch.int64, device=device)
        # Row: target; column: prediction. An unreadable sample has no row: it is in `unreadable` alone.
        self.confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
        self.unreadable = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits (n, K), targets (n,) with FILLER and UNREADABLE for rows without a label."""
        labelled = targets >= 0
        target = targets.clamp_min(0)
        losses = torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
        self.loss += (losses.double() * labelled).sum()
        best = logits.topk(min(5, self.num_classes), dim=1).indices
        self.top5 += ((best == target[:, None]).any(1) & labelled).sum()
        cells = target * self.num_classes + best[:, 0]
        self.confusion.index_add_(0, cells, labelled.to(torch.int64))
        self.unreadable += (~labelled & (targets != FILLER)).sum()

    def compute(self) -> dict[str, Any]:
        """Numbers over all ranks. All ranks call this; it waits for the device.

        Returns:
            ``loss``, ``top1``, ``top5`` and ``mean_class`` (%; unreadable samples count as wrong in the first two
            accuracies), ``samples``, ``unreadable``, ``per_class`` (%, None for a class without samples) and
            ``confusion`` (K lists of K counts).
        """
        for sums in (self.loss, self.top5, self.confusion, self.unreadable):
            _all_sum(sums)
        confusion = self.confusion.view(self.num_classes, self.num_classes).cpu()
        counts, hits = confusion.sum(1), confusion.diagonal()
        labelled, unreadable = int(counts.sum()), int(self.unreadable)
        samples = max(labelled + unreadable, 1)
        per_class = [100 * h / c if c else None for h, c in zip(hits.tolist(), counts.tolist())]
        present = [accuracy for accuracy in per_class if accuracy is not None]
        return {
            "loss": float(self.loss) / max(labelled, 1),
            "top1": 100 * int(hits.sum()) / samples,
            "top5": 100 * int(self.top5) / samples,
            "mean_class": sum(present) / max(len(present), 1),
            "samples": labelled + unreadable,
            "unreadable": unreadable,
            "per_class": per_class,
            "confusion": confusion.tolist(),
        }


def _all_sum(values: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
