"""Made-up images, on the device from the start: what a network and the training loop do when no data holds them up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.data.images import ImageSet
from common.data.loader import FILLER, Batch, Draws, Finish, LoaderConfig
from common.data.source import BadSample

CLASSES = 1000
MOST_VALIDATION = 50_000


class SyntheticSource:
    """As many samples as asked for, of the number of classes that ImageNet has."""

    def __init__(self, samples: int) -> None:
        self.classes = tuple(f"class{index:03d}" for index in range(CLASSES))
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def read(self, index: int) -> tuple[bytes, int]:
        """Raises: there is no encoded image."""
        raise BadSample("unreadable", self.where(index), "synthetic images have no file")

    def where(self, index: int) -> str:
        """The place of the sample, for messages."""
        return f"synthetic:{index}"

    def shard(self, index: int) -> str:
        """All are in one."""
        return "synthetic"

    def name(self, index: int) -> str:
        """What the sample is called."""
        return str(index)

    def fingerprint(self) -> str:
        """What tells this data from other data."""
        return f"synthetic {self.samples}"


@dataclass
class SyntheticSet(ImageSet):
    """One split; see :class:`common.data.loader.BatchMaker`. All batches hold the same images, under each its label."""

    def batches(
        self, draws: Draws, config: LoaderConfig, device: torch.device, finish: Finish
    ) -> Iterator[Batch]:
        """The batches of ``draws`` on ``device``."""
        generator = torch.Generator(device).manual_seed(self.seed)
        images = torch.empty(0, device=device)
        for drawn in draws:
            if len(images) != len(drawn):
                shape = (len(drawn), 3, self.size, self.size)
                images = torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator)
            labels = [FILLER if draw is None else draw.sample % CLASSES for draw in drawn]
            yield Batch(finish(images), torch.tensor(labels).to(device, non_blocking=True))
