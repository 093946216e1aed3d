"""The samples of an evaluation that the network is most wrong about, as small pictures."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

THUMBNAIL = 64  # pixels


class Worst:
    """Keeps the samples with the highest losses, on the device, without waiting for it."""

    def __init__(self, count: int = 16) -> None:
        self.count = count
        self.kept: tuple[Tensor, ...] | None = None

    def add(self, inputs: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Look at a batch: inputs (n, [clips,] C, [T,] H, W), logits (n, K), targets (n,), below 0 without a label."""
        inputs = inputs[:, 0] if inputs.ndim == 6 else inputs  # several clips of a video: the first
        if inputs.ndim not in (4, 5) or inputs.shape[1] not in (1, 3):
            return
        losses = F.cross_entropy(logits.float(), targets.clamp_min(0), reduction="none")
        losses = losses.masked_fill(targets < 0, -math.inf)
        best = losses.topk(min(self.count, len(losses))).indices
        values = logits[best].float().softmax(1).max(1)
        found = (losses[best], targets[best], values.indices, values.values, thumbnails(inputs[best]))
        if self.kept:
            joined = [torch.cat(pair) for pair in zip(self.kept, found)]
            best = joined[0].topk(min(self.count, len(joined[0]))).indices
            found = tuple(each[best] for each in joined)  # type: ignore[assignment]
        self.kept = found

    def compute(self) -> list[dict[str, Any]]:
        """Of all ranks, the worst first: ``loss``, ``target``, ``predicted``, its ``share``, and ``png`` (base64).

        All ranks call this; it waits for the device.
        """
        mine = self._samples()
        if dist.is_initialized():
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, mine)
            mine = [sample for samples in every for sample in samples]
        return sorted(mine, key=lambda sample: -sample["loss"])[: self.count]

    def _samples(self) -> list[dict[str, Any]]:
        if self.kept is None:
            return []
        rows = zip(*(each.tolist() for each in self.kept[:4]), self.kept[4].cpu())
        return [
            {"loss": loss, "target": target, "predicted": predicted, "share": share, "png": _png(image)}
            for loss, target, predicted, share, image in rows
            if math.isfinite(loss)
        ]


def thumbnails(inputs: Tensor) -> Tensor:
    """(n, C, [T,] H, W) normalised → uint8 (n, 3, h, w), :data:`THUMBNAIL` pixels at most; of clips the middle frame.

    The range of each sample is stretched to 0…255, which undoes any normalisation well enough to see what it is.
    """
    images = (inputs[:, :, inputs.shape[2] // 2] if inputs.ndim == 5 else inputs).float()
    scale = min(1.0, THUMBNAIL / max(images.shape[2:]))
    if scale < 1:
        size = [max(1, round(side * scale)) for side in images.shape[2:]]
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    low, high = (f(images.flatten(1), 1).view(-1, 1, 1, 1) for f in (torch.amin, torch.amax))
    images = (images - low) / (high - low).clamp_min(1e-6)
    return (255 * images).round().to(torch.uint8).expand(-1, 3, -1, -1)


def _png(image: Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
