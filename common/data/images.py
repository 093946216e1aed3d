"""Image data sets: a source of encoded images, decoded and augmented by draw."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

import torch

from common.data.augment import (
    AugmentConfig,
    ImageTransform,
    calm_transform,
    seeded,
    test_transform,
    train_transform,
)
from common.data.decode import decode_rgb
from common.data.loader import FILLER, UNREADABLE, LoaderConfig, Row, Unreadable
from common.data.order import Draw
from common.data.source import BadSample, Source, open_source


@dataclass
class DataConfig(LoaderConfig):
    """Where images are and how they are read."""

    path: str = "data/digits"
    """Folder that image/prepare.py made, or one of class folders: PATH/train/CLASS/*.jpg, PATH/val/CLASS/*.jpg."""
    format: Literal["auto", "folder", "recordio", "webdataset"] = "auto"
    """Form of the data; auto looks what is there."""
    max_unreadable: float = 0.01
    """Share of unreadable samples above which training stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(f"max_unreadable = {self.max_unreadable}: expected a share, 0 to 1")


@dataclass
class ImageSet:
    """One split of an image data set; see :class:`common.data.loader.DrawDataset`."""

    source: Source
    transform: ImageTransform
    seed: int
    size: int
    training: bool
    calm: ImageTransform | None = None
    calm_from: float = inf

    def row(self, draw: Draw) -> Row:
        """The augmented image (3, size, size) and its label.

        An unreadable sample is named in the row. In training its place is taken by the next readable one of
        the source, in evaluation it keeps its place and counts as wrong.
        """
        unreadable: list[Unreadable] = []
        for offset in range(len(self.source)):
            index = (draw.sample + offset) % len(self.source)
            try:
                data, label = self.source.read(index)
                image = decode_rgb(data, self.source.where(index))
            except BadSample as bad:
                unreadable.append(Unreadable(bad.where, bad.reason, bad.detail))
                if not self.training:
                    return Row(self.filler().inputs, UNREADABLE, tuple(unreadable))
                continue
            transform = self.calm if self.calm and draw.epoch >= self.calm_from else self.transform
            with seeded(self.seed, draw):
                return Row(transform(image), label, tuple(unreadable))
        raise RuntimeError("no sample of the data set can be read")

    def filler(self) -> Row:
        """A row that only fills up a batch."""
        return Row(torch.zeros(3, self.size, self.size, dtype=torch.uint8), FILLER)


def open_images(
    data: DataConfig, augment: AugmentConfig, split: str, seed: int, epochs: float = inf
) -> ImageSet:
    """Open the split ``train`` or ``val`` of the data set at ``data.path``.

    Args:
        epochs: length of the whole training, whose last ``augment.calm_epochs`` are calmer.

    Raises:
        UserError: nothing is there, or not in the form asked for.
    """
    source, size = open_source(data.path, split, data.format), augment.size
    if split != "train":
        return ImageSet(source, test_transform(augment), seed, size, training=False)
    calm, calm_from = calm_transform(augment), epochs - augment.calm_epochs
    return ImageSet(source, train_transform(augment), seed, size, True, calm, calm_from)
