"""Which sample comes when: a pure function of (seed, epoch, global index).

Training is one stream of global indices 0, 1, 2, … that runs through the epochs: index k is the
(k mod n)-th sample of epoch k // n. Batch b is the indices [b·B, (b+1)·B), also across an epoch's end, so all
batches are full, every sample is seen exactly once an epoch, and the number of samples seen is the loader's
whole state. Processes, accumulation and workers only divide a batch; they never change what is in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common.errors import ConfigError


class Draw(NamedTuple):
    """One sample at one place in the stream; its augmentation is a function of this and the seed."""

    epoch: int
    sample: int
    copy: int = 0  # which repetition of the sample within the epoch (repeated augmentation)


@dataclass
class Order:
    """The order of ``samples`` samples over all epochs.

    With ``repeats`` r > 1 (repeated augmentation, Hoffer et al. 2020, as DeiT trains) an epoch still has
    ``samples`` draws, made of the first ⌈n/r⌉ samples of the permutation, each r times in a row.
    """

    samples: int
    seed: int
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError("samples: the data set is empty")
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __getitem__(self, index: int) -> Draw:
        """The draw at global ``index``."""
        epoch, position = divmod(index, self.samples)
        place, copy = divmod(position, self.repeats)
        return Draw(epoch, int(self._of(epoch)[place]), copy)

    def table(self, indices: range) -> np.ndarray:
        """The draws at ``indices`` as rows (epoch, sample, copy), (n, 3) int64: the same as one by one, faster."""
        epochs, positions = np.divmod(np.arange(indices.start, indices.stop), self.samples)
        places, copies = np.divmod(positions, self.repeats)
        parts = [self._of(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.stack([epochs, np.concatenate(parts), copies], axis=1)

    def _of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._permutation = epoch, rng.permutation(self.samples)
        return self._permutation


@dataclass
class Division:
    """How a global batch is divided: ``accumulation`` micro-batches on each of ``world`` processes."""

    batch_size: int
    accumulation: int = 1
    world: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        pieces = self.accumulation * self.world
        if self.batch_size < 2 * pieces:
            raise ConfigError(
                f"train.batch_size = {self.batch_size}: too small for {self.world} processes × "
                f"{self.accumulation} micro-batches; expected at least {2 * pieces}"
            )

    def micro_batch(self, micro: int) -> slice:
        """The part of a global batch that is this process's micro-batch number ``micro``.

        Cuts fall on even places (sizes differ by 2 at most), so that neighbours, which mixup pairs, stay together.
        """
        piece, pieces = micro * self.world + self.rank, self.accumulation * self.world
        pairs = self.batch_size // 2
        start, stop = (2 * (pairs * p // pieces) for p in (piece, piece + 1))
        return slice(start, self.batch_size if piece + 1 == pieces else stop)


def micro_batches(order: Order, division: Division, first_step: int, steps: int) -> Iterator[list[Draw]]:
    """This process's micro-batches from ``first_step`` up to step ``steps``."""
    for indices in micro_ranges(division, first_step, steps):
        yield [order[index] for index in indices]


def micro_ranges(division: Division, first_step: int, steps: int) -> Iterator[range]:
    """The global indices of this process's micro-batches from ``first_step`` up to step ``steps``."""
    for step in range(first_step, steps):
        start = step * division.batch_size
        for micro in range(division.accumulation):
            part = division.micro_batch(micro)
            yield range(start + part.start, start + part.stop)


def evaluation_size(samples: int, batch_size: int, world: int) -> int:
    """Rows of each evaluation batch: at most ``batch_size``, so that as few as can be only fill up the last ones."""
    batches = -(-samples // (batch_size * world))
    return -(-samples // (batches * world))


def evaluation_batches(samples: int, batch_size: int, world: int, rank: int) -> Iterator[list[Draw | None]]:
    """Every sample once over all processes, in equally many batches of equal size on each; None fills up the last."""
    size = evaluation_size(samples, batch_size, world)
    for start in range(0, samples, size * world):
        mine = range(start + rank * size, start + (rank + 1) * size)
        yield [Draw(0, index) if index < samples else None for index in mine]
