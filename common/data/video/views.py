"""Test views: one decode of a video, then crops of its clips on the device, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from common.data.loader import FILLER, UNREADABLE, Row, Unreadable
from common.data.order import Draw
from common.data.source import BadSample
from common.data.video.clips import ClipConfig, Videos, shorter, stack_segments
from common.data.video.crops import Box, OffsetRule, centre_box, cut, five_boxes, three_boxes
from common.data.video.sampling import test_offsets

Crop = tuple[Box, bool]
"""A part of the frame, and whether it is mirrored."""
Boxes = Callable[[int, int], list[Crop]]
"""The crops of frames of a height and a width."""


@dataclass(frozen=True)
class Views:
    """A number of segments, and which crops."""

    segments: int
    crops: int

    def boxes(self, size: int, rule: OffsetRule = "published") -> Boxes:
        """The crops: 3 as high as the frame, 10 or 1 of ``size``."""
        if self.crops == 3:
            return lambda height, width: [(box, False) for box in three_boxes(height, width, rule)]
        if self.crops == 10:
            return lambda height, width: [
                (box, mirror) for mirror in (False, True) for box in five_boxes(height, width, size)
            ]
        return lambda height, width: [(centre_box(height, width, size), False)]


VIEWS = {"10x3": Views(10, 3), "25x10": Views(25, 10), "1x1": Views(1, 1)}


@dataclass
class ViewSet:
    """The clips of every video, uncropped; see :class:`common.data.loader.DrawDataset`.

    Frames differ in size: a batch can be of one video only.
    """

    videos: Videos
    segments: int
    clip: ClipConfig

    def row(self, draw: Draw) -> Row:
        """The clips (segments, 3, T, H, W) uint8 of a video, the shorter side ``clip.short_side``, and its label."""
        clip, index = replace(self.clip, num_segments=self.segments), draw.sample
        count, label = int(self.videos.clips.frames[index]), int(self.videos.clips.labels[index])
        offsets = test_offsets(count, self.segments, clip.seq_length, clip.sample_rate)
        try:
            frames = self.videos.segments(index, offsets, clip, shorter(clip.short_side))
        except BadSample as bad:
            reason = Unreadable(bad.where, bad.reason, bad.detail, self.videos.clips.shard(index))
            return Row(self.filler().inputs, UNREADABLE, (reason,))
        return Row(stack_segments(frames, self.segments), label)

    def filler(self) -> Row:
        """A row that only fills up a batch: the least that a network takes."""
        side = self.clip.short_side
        return Row(torch.zeros(1, 3, self.clip.seq_length, side, side, dtype=torch.uint8), FILLER)


class ViewAverage(nn.Module):
    """The mean of a network's logits over the views of a video.

    Args:
        boxes: the crops of a frame.
        normalize: applied to uint8 views (n, 3, T, h, w) on their device.
        at_once: views that go through the network together.

    Attributes:
        scores: the logits (1, K) of the videos so far.
    """

    def __init__(
        self, model: nn.Module, boxes: Boxes, normalize: Callable[[Tensor], Tensor], at_once: int
    ) -> None:
        super().__init__()
        self.model, self.boxes, self.normalize, self.at_once = model, boxes, normalize, at_once
        self.scores: list[Tensor] = []

    def forward(self, clips: Tensor) -> Tensor:
        """Clips (1, segments, 3, T, H, W) uint8 of one video → logits (1, K)."""
        total, views = torch.zeros((), device=clips.device), 0
        for some in self._chunks(clips[0]):
            total = total + self.model(self.normalize(some)).float().sum(0)
            views += len(some)
        self.scores.append((total / views)[None])
        return self.scores[-1]

    def _chunks(self, clips: Tensor) -> Iterator[Tensor]:
        """The views, ``at_once`` at a time; a view is cut out only when its turn has come."""
        height, width = clips.shape[-2:]
        plan = [(clip, crop) for crop in self.boxes(height, width) for clip in clips]
        for start in range(0, len(plan), self.at_once):
            some = [(cut(clip, box), mirror) for clip, (box, mirror) in plan[start : start + self.at_once]]
            yield torch.stack([view.flip(-1) if mirror else view for view, mirror in some])
