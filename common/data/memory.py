"""A whole data set in memory, on the device; batches are cut out of it there, all images of a batch at once.

Made for images of CIFAR's size: 50,000 of 32×32 pixels are 480 MB with padding and mirror images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.data.arrays import open_arrays
from common.data.augment import AugmentConfig, Normalize, test_transform
from common.data.forms import open_source
from common.data.im2rec import Im2recSource
from common.data.images import ImageSet
from common.data.loader import FILLER, Batch, LoaderConfig, Unreadable, evaluation_loader
from common.data.order import Division, Order, evaluation_size, micro_ranges
from common.data.source import DataError, Source, digest, local_path


@dataclass
class MemoryConfig(LoaderConfig):
    """Where the images are; they are all read at the start, encoded ones by the worker processes."""

    path: str = "data/digits32"
    """Folder that cifar/prepare.py made, one with .rec files of MXNet's im2rec, or one of class folders."""
    format: Literal["auto", "memory", "folder", "recordio", "webdataset"] = "auto"
    """Form of the data; auto looks what is there."""
    train: str = "train"
    """Name of the training split: PATH/train.rec, PATH/train/CLASS and so on."""
    val: str = "val"
    """Name of the split that is evaluated on."""
    max_unreadable: float = 0.01
    """Share of unreadable samples above which training stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(f"max_unreadable = {self.max_unreadable}: expected a share, 0 to 1")


@dataclass
class CropConfig:
    """How images are padded, cropped, mirrored and normalised."""

    size: int = 32
    """Height and width of the images, pixels; encoded images of another size are resized and cropped when read."""
    pad: int = 4
    """Black pixels around an image, of which a crop of its own size is taken at random (training)."""
    hflip: float = 0.5
    """Probability of a horizontal flip (training)."""
    mean: tuple[float, float, float] = (123.68 / 255, 116.779 / 255, 103.939 / 255)
    """Per channel (R, G, B), on the scale 0–1; subtracted."""
    std: tuple[float, float, float] = (1 / 255, 1 / 255, 1 / 255)
    """Per channel, on the scale 0–1; divided by. 1/255 leaves values on the scale 0–255, as FBN was published."""

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"size = {self.size}: expected at least 8 pixels")
        if self.pad < 0:
            raise ValueError(f"pad = {self.pad}: expected 0 (off) or more pixels")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip = {self.hflip}: expected a probability, 0 to 1")


@dataclass
class MemorySet:
    """One split."""

    images: Tensor
    """(N, 3, H, W) uint8."""
    targets: Tensor
    """(N,) int64 class indices; in evaluation also UNREADABLE."""
    classes: tuple[str, ...]
    unreadable: list[Unreadable] = field(default_factory=list)
    """What could not be read; see :class:`common.data.images.ImageSet` for what stands in its place."""

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> MemorySet:
        """The set on another device."""
        return MemorySet(self.images.to(device), self.targets.to(device), self.classes, self.unreadable)

    def fingerprint(self) -> str:
        """SHA-256 of pixels, labels and class names: the same for all forms of the same data."""
        content = np.ascontiguousarray(self.images.numpy(force=True))
        return digest("\n".join(self.classes), content, self.targets.numpy(force=True))


def load_memory(config: MemoryConfig, split: str, size: int, training: bool) -> MemorySet:
    """Read the split called ``split`` into CPU memory; what is in the memory form stays in its file.

    Raises:
        DataError: nothing is there, or not in the form asked for.
    """
    root = local_path(config.path)
    arrays = open_arrays(root, split) if config.format in ("auto", "memory") else None
    if arrays is None and config.format == "memory":
        raise DataError(
            f"{root}: no memory data of split {split!r}: expected {split}.npy; see cifar/prepare.py"
        )
    if arrays is None:
        return _decode(_source(root, split, config.format), config, size, training)
    images, labels, classes = arrays
    if images.shape[2:] != (size, size):
        found = f"{images.shape[2]}×{images.shape[3]}"
        raise DataError(f"{root}: split {split!r} has images of {found} pixels, augment.size is {size}")
    return MemorySet(torch.from_numpy(images), torch.from_numpy(labels), classes)


def train_batches(
    data: MemorySet, crop: CropConfig, order: Order, division: Division, steps: int
) -> Callable[[int], Iterator[Batch]]:
    """A function that gives this process's micro-batches from any step on, up to ``steps``.

    The same stream as :func:`common.data.loader.train_batches`; crop and flip are a function of (seed, draw).
    """
    windows = _windows(data.images, crop)
    normalize = _normalize(crop, data.images.device)

    def start(step: int) -> Iterator[Batch]:
        # Every process has read all of them: each reports its share.
        unreadable = data.unreadable[division.rank :: division.world]
        for indices in micro_ranges(division, step, steps):
            index = crops(order.seed, order.table(indices), crop)
            sample = torch.from_numpy(index[0]).to(data.targets.device, non_blocking=True)
            yield Batch(normalize(_take(windows, index)), data.targets[sample], unreadable)
            unreadable = []

    return start


def evaluation_batches(
    data: MemorySet, crop: CropConfig, batch_size: int, world: int, rank: int
) -> Callable[[], Iterator[Batch]]:
    """A function that gives this process's part of the set: equally many batches of equal size on every rank."""
    normalize = _normalize(crop, data.images.device)
    size = evaluation_size(len(data), batch_size, world)

    def start() -> Iterator[Batch]:
        unreadable = data.unreadable[rank::world]
        for begin in range(0, len(data), size * world):
            place = begin + rank * size + torch.arange(size, device=data.images.device)
            index = place.clamp_max(len(data) - 1)
            targets = torch.where(place < len(data), data.targets[index], FILLER)
            yield Batch(normalize(data.images[index]), targets, unreadable)
            unreadable = []

    return start


def crops(seed: int, draws: np.ndarray, crop: CropConfig) -> np.ndarray:
    """Where each draw is cut out: sample, flip (0 or 1), top and left, (4, n) int64; a function of (seed, draw).

    Args:
        draws: (n, 3), of :meth:`common.data.order.Order.table`.
    """
    bits = _random_bits(seed, draws.astype(np.uint64))
    first, second, third = (
        ((bits >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.int64) for i in range(3)
    )
    places = 2 * crop.pad + 1
    return np.stack([draws[:, 1], third < crop.hflip * 0x10000, first * places >> 16, second * places >> 16])


def _windows(images: Tensor, crop: CropConfig) -> Tensor:
    """All crops of all images and their mirror images, without copying: (N, flip, 3, top, left, size, size)."""
    padded = F.pad(images, [crop.pad] * 4)
    both = torch.stack([padded, padded.flip(-1)], 1) if crop.hflip else padded[:, None]
    return both.unfold(3, crop.size, 1).unfold(4, crop.size, 1)


def _take(windows: Tensor, index: np.ndarray) -> Tensor:
    """The crops at ``index`` (sample, flip, top, left), (n, 3, size, size)."""
    if windows.is_cpu:  # NumPy copies whole rows, torch pixel by pixel
        sample, flip, top, left = index
        return torch.from_numpy(windows.numpy()[sample, flip, :, top, left])
    sample, flip, top, left = torch.from_numpy(index).to(windows.device, non_blocking=True)
    return windows[sample, flip, :, top, left]


def _random_bits(seed: int, words: np.ndarray) -> np.ndarray:
    """(n, k) words → (n,) uint64, by splitmix64 (Steele, Lea and Flood, OOPSLA 2014) over one word after another."""
    state = np.full(len(words), seed % 2**64, np.uint64)
    for word in words.T:
        state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


def _source(root: Path, split: str, format: str) -> Source:
    if (
        format in ("auto", "recordio")
        and (root / f"{split}.rec").is_file()
        and not (root / "classes.txt").exists()
    ):
        return Im2recSource(root / f"{split}.rec")
    return open_source(root, split, format)


def _decode(source: Source, config: MemoryConfig, size: int, training: bool) -> MemorySet:
    images = ImageSet(source, test_transform(AugmentConfig(size=size, crop=1.0)), 0, size, training)
    cpu = torch.device("cpu")
    batches = list(evaluation_loader(images, len(source), 500, 1, 0, config, cpu, lambda batch: batch)())
    pixels, targets = (
        torch.cat(part)[: len(source)] for part in zip(*((b.inputs, b.targets) for b in batches))
    )
    unreadable = dict.fromkeys(bad for batch in batches for bad in batch.unreadable)
    return MemorySet(pixels, targets, source.classes, list(unreadable))


def _normalize(crop: CropConfig, device: torch.device) -> Normalize:
    return Normalize(AugmentConfig(mean=crop.mean, std=crop.std), device)
