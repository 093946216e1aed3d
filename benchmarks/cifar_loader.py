"""Images per second of one core: the loader in memory against torchvision's: `python benchmarks/cifar_loader.py`.

Both pad by 4, crop, flip and normalise 50,000 images of 32×32 pixels, shuffled, in batches of 128. torchvision's is
its CIFAR10 data set, already in memory, with its transforms and a DataLoader without workers, its cheapest form per
core. The two alternate; on the CPU, measured is the processor's time of one thread, on a GPU the wall-clock time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10

from common.data.memory import CropConfig, MemorySet, train_batches
from common.data.order import Division, Order
from common.environment import environment

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class InMemory(CIFAR10):
    """torchvision's CIFAR10 with given images instead of its files."""

    def __init__(self, images: np.ndarray, transform: Callable[[Any], Any]) -> None:
        self.data, self.targets = images, [0] * len(images)
        self.transform, self.target_transform = transform, None


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cifar_loader.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (arguments.images, 32, 32, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    loaders = {
        "torchvision": (theirs(images, arguments.batch), 8),
        "memory": (ours(images, arguments.batch, device), 160),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for name, (loader, batches) in list(loaders.items()) * (arguments.blocks + 1):
        rates[name].append(batches * arguments.batch / seconds(loader, batches, device))
    median = {name: statistics.median(values[1:]) for name, values in rates.items()}
    ratio = statistics.median(m / t for m, t in zip(rates["memory"][1:], rates["torchvision"][1:]))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    print(
        f"{where}: {', '.join(f'{name} {rate:,.0f} images/s' for name, rate in median.items())}, {ratio:.1f} times"
    )
    settings = {
        "images": arguments.images,
        "batch": arguments.batch,
        "blocks": arguments.blocks,
        "device": where,
    }
    result = {"images_per_s": median, "times": ratio, "all_images_per_s": rates}
    arguments.out.write_text(json.dumps(result | settings | environment(), indent=1) + "\n")


def theirs(images: np.ndarray, batch: int) -> Iterator[Any]:
    """torchvision's way."""
    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    loader: DataLoader = DataLoader(InMemory(images, transform), batch, shuffle=True, drop_last=True)
    return itertools.chain.from_iterable(loader for _ in itertools.count())


def ours(images: np.ndarray, batch: int, device: torch.device) -> Iterator[Any]:
    """The loader of cifar/train.py."""
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
    data = MemorySet(pixels, torch.zeros(len(images), dtype=torch.int64, device=device), ("0",))
    crop = CropConfig(mean=MEAN, std=STD)
    return train_batches(data, crop, Order(len(images), 0), Division(batch), 10**9)(0)


def seconds(loader: Iterator[Any], batches: int, device: torch.device) -> float:
    """Time for so many batches: of the wall on a GPU, else of this process on the processor."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    begun = clock()
    for _ in range(batches):
        next(loader)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begun


if __name__ == "__main__":
    main()
