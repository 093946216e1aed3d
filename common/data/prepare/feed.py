"""The samples of a split in the order they are written, read and encoded by several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from common.data.prepare.settings import Settings
from common.data.prepare.workers import Workers
from common.data.source import BadSample, DataError, Source
from common.errors import RunError

_BATCH = 16


class Item(NamedTuple):
    """A sample that can be written."""

    position: int
    """In the order, those that cannot be read included."""
    name: str
    data: bytes
    label: int


class Unusable(NamedTuple):
    """A sample that is left out: its place in the source, and why."""

    split: str
    where: str
    reason: str
    detail: str
    shard: str = ""
    """The file with many samples, or the class folder, that it is in."""


Progress = Callable[[str, int, int], None]
"""Called with the split, the samples done and all of them."""
Encode = Callable[[bytes, str, Any], bytes]
"""What is stored of a sample: of its bytes, its place for messages, and the settings."""
Context = tuple[Mapping[str, Source], Settings, Encode]
Batch = tuple[str, list[int]]
Outcome = tuple[bytes, int] | Unusable


def read_batch(context: Context, batch: Batch) -> list[Outcome]:
    """What is to be written of some samples of a split."""
    (sources, settings, encode), (split, indices) = context, batch
    outcomes: list[Outcome] = []
    for index in indices:
        try:
            data, label = sources[split].read(index)
            outcomes.append((encode(data, sources[split].where(index), settings), label))
        except BadSample as bad:
            shard = sources[split].shard(index)
            outcomes.append(Unusable(split, bad.where, bad.reason, bad.detail, shard))
    return outcomes


class Feed:
    """The usable samples from ``begin`` on, one at a time; the others are set aside.

    Args:
        split: the split's name.
        source: its samples.
        order: indices of the source in the order in which they are written.
        begin: the position in the order to start at.
        limit: how many unusable samples of the split are left out; one more stops.
        known: how many there were before ``begin``.
        progress: told how far it is.
    """

    def __init__(
        self,
        split: str,
        source: Source,
        order: np.ndarray,
        begin: int,
        limit: float,
        known: int,
        progress: Progress | None = None,
    ) -> None:
        self.split, self.source, self.order = split, source, order
        self.limit, self.known = limit, known
        self.position = begin
        """Of the next sample, or the number of samples at the end."""
        self._progress = progress
        self._unusable: list[Unusable] = []
        self._next: Item | None = None

    def start(self, workers: Workers[Batch, list[Outcome]]) -> None:
        """Begin to read."""
        self._outcomes = self._read(workers)
        self._advance()

    def peek(self) -> Item | None:
        """The next sample, or None at the end."""
        return self._next

    def take(self) -> Item:
        """The next sample, which is read only once.

        Raises:
            RunError: the one after it is one unusable sample too many.
        """
        if self._next is None:
            raise IndexError("no samples are left")
        item = self._next
        self._advance()
        if self._progress and (self.position % _BATCH == 0 or self._next is None):
            self._progress(self.split, self.position, len(self.order))
        return item

    def take_unusable(self) -> list[Unusable]:
        """Those between the last call and the next sample."""
        taken, self._unusable = self._unusable, []
        self.known += len(taken)
        return taken

    def _read(self, workers: Workers[Batch, list[Outcome]]) -> Iterator[Outcome]:
        starts = range(self.position, len(self.order), _BATCH)
        batches = ((self.split, self.order[start : start + _BATCH].tolist()) for start in starts)
        for outcomes in workers.map(batches):
            yield from outcomes

    def _advance(self) -> None:
        position = self.position if self._next is None else self._next.position + 1
        self._next = None
        for outcome in self._outcomes:
            if not isinstance(outcome, Unusable):
                name = self.source.name(int(self.order[position]))
                self._next = Item(position, name, *outcome)
                break
            self._set_aside(outcome)
            position += 1
        self.position = position

    def _set_aside(self, sample: Unusable) -> None:
        self._unusable.append(sample)
        count = self.known + len(self._unusable)
        if count > self.limit:
            raise RunError(
                f"{count} unusable samples in split {self.split!r}, more than --max-unreadable allows; "
                f"the last: {sample.where}: {sample.reason}: {sample.detail}"
            )
        if count == len(self.order):
            raise DataError(f"split {self.split!r}: none of its {count} samples is usable")
