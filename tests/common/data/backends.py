"""Photographs in every encoding, and the batches that a backend makes of them."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from common.data.augment import AugmentConfig, Normalize
from common.data.images import DataConfig, open_images
from common.data.loader import Batch, evaluation_loader, train_batches
from common.data.order import Division, Order
from tests.common.data.forms import few_digits

CPU = torch.device("cpu")
SIZE = 48


def encode(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photos() -> list[Image.Image]:
    """Parts of two photographs of 640 × 427."""
    whole = [Image.fromarray(picture) for picture in load_sample_images().images]
    boxes = [
        (0, 0, 640, 427),
        (100, 20, 600, 395),
        (30, 40, 280, 410),
        (200, 100, 300, 180),
        (0, 0, 301, 300),
    ]
    return [picture.crop(box) for picture in whole for box in boxes]


def kinds() -> list[bytes]:
    """Photographs in every encoding that ImageNet and others hold."""
    pictures, turned = photos(), Image.Exif()
    turned[0x0112] = 6
    plain = [encode(picture, quality=90) for picture in pictures]
    first, small = pictures[1], pictures[3]
    return [
        *plain,
        encode(first, progressive=True),
        encode(first, quality=95, subsampling=0),
        encode(first, quality=95, subsampling=1),
        encode(first.convert("L")),
        encode(first.convert("CMYK")),
        encode(first, exif=turned),
        encode(first, xmp=b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'),
        encode(small, "PNG"),
        encode(small.convert("RGBA"), "PNG"),
        encode(small.quantize(32), "PNG"),
        encode(small.convert("L"), "WEBP"),
    ]


def samples() -> list[tuple[str, bytes, int]]:
    found = [(f"{n:04d}", data, n % 10) for n, data in enumerate(kinds())]
    return found + [(f"9{key}", data, label) for key, data, label in few_digits(11)]


def training(
    path: Path,
    backend: str,
    augment: AugmentConfig,
    batch: int = 8,
    steps: int = 8,
    start: int = 0,
    workers: int = 0,
    world: int = 1,
    rank: int = 0,
    parts: int = 1,
) -> list[Batch]:
    """One process's micro-batches of a training, ``parts`` a step."""
    config = DataConfig(path=str(path), workers=workers, backend=backend)
    data = open_images(config, augment, "train", 0)
    order, division = Order(len(data.source), 0), Division(batch, parts, world, rank)
    return list(train_batches(data, order, division, steps, config, CPU, Normalize(augment, CPU))(start))


def evaluation(
    path: Path,
    backend: str,
    augment: AugmentConfig,
    batch: int = 8,
    workers: int = 0,
    world: int = 1,
    rank: int = 0,
) -> list[Batch]:
    """One process's batches of an evaluation."""
    config = DataConfig(path=str(path), workers=workers, backend=backend)
    data = open_images(config, augment, "val", 0)
    finish = Normalize(augment, CPU)
    return list(evaluation_loader(data, len(data.source), batch, world, rank, config, CPU, finish)())


def levels(ours: list[Batch], theirs: list[Batch], augment: AugmentConfig) -> torch.Tensor:
    """By how many of 256 levels each value differs; all else of the batches is equal."""
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs):
        assert torch.equal(mine.targets, other.targets)
        assert mine.unreadable == other.unreadable
        assert mine.inputs.dtype == torch.float32
        assert mine.inputs.is_contiguous()
    difference = torch.cat([a.inputs for a in ours]) - torch.cat([b.inputs for b in theirs])
    return (difference * torch.tensor(augment.std).view(3, 1, 1) * 255).abs()


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
