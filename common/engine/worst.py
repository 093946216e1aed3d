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
    """Keeps the samples with the highest losses, on the device, without waiting for it.

    Args:
        count: samples that are kept.
        frames: frames that are shown of a video, over all its clips; 1 is the middle one of the first clip.
    """

    def __init__(self, count: int = 16, frames: int = 1) -> None:
        self.count, self.frames = count, frames
        self.kept: tuple[Tensor, ...] | None = None
        self.batches = 0

    def add(self, inputs: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Look at a batch: inputs (n, [clips,] C, [T,] H, W), logits (n, K), targets (n,), below 0 without a label."""
        indices = self._indices(len(targets), targets.device)
        clips = inputs if inputs.ndim == 6 else inputs[:, None]
        inputs = clips[:, 0]
        if inputs.ndim not in (4, 5) or inputs.shape[1] not in (1, 3):
            return
        losses = F.cross_entropy(logits.float(), targets.clamp_min(0), reduction="none")
        losses = losses.masked_fill(targets < 0, -math.inf)
        best = losses.topk(min(self.count, len(losses))).indices
        values = logits[best].float().softmax(1).max(1)
        pictures = thumbnails(inputs[best]) if self.frames == 1 else film_strips(clips[best], self.frames)
        found = (losses[best], targets[best], values.indices, values.values, indices[best], pictures)
        if self.kept:
            joined = [torch.cat(pair) for pair in zip(self.kept, found)]
            best = joined[0].topk(min(self.count, len(joined[0]))).indices
            found = tuple(each[best] for each in joined)  # type: ignore[assignment]
        self.kept = found

    def compute(self) -> list[dict[str, Any]]:
        """Of all ranks, the worst first: ``loss``, ``target``, ``predicted``, its ``share``, ``index`` and ``png``.

        The index is the sample's in the data set, where the batches were
        :func:`common.data.order.evaluation_batches`; the picture is base64. All ranks call this; it waits for the
        device.
        """
        mine = self._samples()
        if dist.is_initialized():
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, mine)
            mine = [sample for samples in every for sample in samples]
        return sorted(mine, key=lambda sample: -sample["loss"])[: self.count]

    def _indices(self, size: int, device: torch.device) -> Tensor:
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self.batches += 1
        return torch.arange(size, device=device) + ((self.batches - 1) * world + rank) * size

    def _samples(self) -> list[dict[str, Any]]:
        if self.kept is None:
            return []
        names = ("loss", "target", "predicted", "share", "index")
        rows = zip(*(each.tolist() for each in self.kept[:-1]), self.kept[-1].cpu())
        return [
            dict(zip(names, numbers)) | {"png": _png(image)}
            for *numbers, image in rows
            if math.isfinite(numbers[0])
        ]


def thumbnails(inputs: Tensor) -> Tensor:
    """(n, C, [T,] H, W) normalised → uint8 (n, 3, h, w), :data:`THUMBNAIL` pixels at most; of clips the middle frame.

    The range of each sample is stretched to 0…255, which undoes any normalisation well enough to see what it is.
    """
    images = (inputs[:, :, inputs.shape[2] // 2] if inputs.ndim == 5 else inputs).float()
    return _stretched(_scaled(images, min(1.0, THUMBNAIL / max(images.shape[2:])))).expand(-1, 3, -1, -1)


def film_strips(inputs: Tensor, frames: int) -> Tensor:
    """(n, clips, C, T, H, W) → uint8 (n, 3, t, t · frames), t = :data:`THUMBNAIL`: frames of each, side by side.

    They go in the order of time from the first clip's first to the last clip's last; black beside or above and below
    frames that are not square.
    """
    count, clips, _, length, height, width = inputs.shape
    which, when = (
        torch.linspace(0, n - 1, frames, device=inputs.device).round().long() for n in (clips, length)
    )
    images = inputs[:, which, :, when].float().transpose(0, 1).flatten(0, 1)
    images = _scaled(images, THUMBNAIL / max(height, width)).unflatten(0, (count, frames))
    down, right = (THUMBNAIL - side for side in images.shape[3:])
    images = F.pad(_stretched(images), (right // 2, right - right // 2, down // 2, down - down // 2))
    return images.permute(0, 2, 3, 1, 4).flatten(3).expand(-1, 3, -1, -1)


def _scaled(images: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return images
    size = [max(1, round(side * scale)) for side in images.shape[2:]]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def _stretched(images: Tensor) -> Tensor:
    """Each sample's range made 0…255."""
    low, high = (f(images.flatten(1), 1).view(-1, *[1] * (images.ndim - 1)) for f in (torch.amin, torch.amax))
    return (255 * (images - low) / (high - low).clamp_min(1e-6)).round().to(torch.uint8)


def _png(image: Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
