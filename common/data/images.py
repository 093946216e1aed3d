"""Image data sets: a source of encoded images, decoded and augmented by draw."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, Literal

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
from common.data.forms import open_source
from common.data.jpeg import decode_plain
from common.data.loader import FILLER, UNREADABLE, LoaderConfig, Row, Unreadable
from common.data.order import Draw
from common.data.source import BadSample, Cache, Source


@dataclass
class DataConfig(LoaderConfig):
    """Where images are and how they are read."""

    path: str = "data/digits"
    """Folder that image/prepare.py made, or one of class folders: PATH/train/CLASS/*.jpg, PATH/val/CLASS/*.jpg; of
    shards also their address on a server: https://, http:// or s3://."""
    format: Literal["auto", "folder", "recordio", "webdataset", "synthetic"] = "auto"
    """Form of the data; auto looks what is there, synthetic is made up on the device, to measure all but loading."""
    synthetic: int = 1_281_167
    """Images of an epoch with format = synthetic."""
    cache: str = Cache.folder
    """Folder for the shards of a server; processes and runs of a machine share it."""
    cache_gb: float = Cache.gigabytes
    """10⁹ bytes that they may take there."""
    backend: Literal["torch", "dali"] = "torch"
    """What decodes, crops and resizes: worker processes (torch), or NVIDIA DALI."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where DALI does it."""
    max_unreadable: float = 0.01
    """Share of unreadable samples above which training stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(f"max_unreadable = {self.max_unreadable}: expected a share, 0 to 1")
        if self.synthetic < 1:
            raise ValueError(f"synthetic = {self.synthetic}: expected at least 1")
        if not self.cache_gb > 0:
            raise ValueError(f"cache_gb = {self.cache_gb}: expected a number above 0")
        if self.device == "gpu" and self.backend != "dali":
            raise ValueError("device = gpu: only with data.backend = dali")


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
    tensors: bool = False
    """The transform takes tensors, which plain JPEGs are sooner decoded to."""

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
                return Row(self.inputs(data, self.source.where(index), draw), label, tuple(unreadable))
            except BadSample as bad:
                unreadable.append(Unreadable(bad.where, bad.reason, bad.detail, self.source.shard(index)))
                if not self.training:
                    return Row(self.filler().inputs, UNREADABLE, tuple(unreadable))
        raise RuntimeError("no sample of the data set can be read")

    def inputs(self, data: bytes, where: str, draw: Draw) -> Any:
        """The encoded image ``data`` decoded and augmented; raises :class:`BadSample` if it cannot be."""
        pixels = decode_plain(data) if self.tensors else None
        image = decode_rgb(data, where) if pixels is None else pixels
        transform = self.calm if self.calm and draw.epoch >= self.calm_from else self.transform
        with seeded(self.seed, draw):
            return transform(image)

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
        UserError: nothing is there, or not in the form asked for; or the backend cannot do it.
    """
    size = augment.size
    if data.format == "synthetic":
        from common.data.synthetic import (
            MOST_VALIDATION,
            SyntheticSet,
            SyntheticSource,
        )  # it imports this module

        samples = data.synthetic if split == "train" else min(data.synthetic, MOST_VALIDATION)
        made_up = SyntheticSource(samples)
        return SyntheticSet(made_up, test_transform(augment), seed, size, training=split == "train")
    source = open_source(data.path, split, data.format, Cache(data.cache, data.cache_gb))
    if data.backend == "dali":
        from common.data.dali import open_dali  # it imports this module

        return open_dali(source, data.device, augment, split == "train", seed)
    if split != "train":
        return ImageSet(source, test_transform(augment), seed, size, training=False)
    calm, calm_from = calm_transform(augment), epochs - augment.calm_epochs
    tensors = augment.kind == "standard"
    return ImageSet(source, train_transform(augment), seed, size, True, calm, calm_from, tensors)
