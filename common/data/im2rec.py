"""A ``.rec`` file as MXNet's im2rec writes it: no list of classes, an index or none, JPEG or PNG inside."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from common.data.recordio import RecordioSource, part_header, unframe, unpack
from common.data.source import BadSample, DataError
from common.files import RandomReads

_MAX_CLASSES = 100_000
"""A larger label is damage: it would be believed, and a network made for as many classes."""


class Im2recSource(RecordioSource):
    """The images of one file, in its order; see :class:`common.data.source.Source`.

    Where records begin is read from the file itself, an index beside it is not needed. Classes are called after
    their numbers, as many as the largest label says.
    """

    def __init__(self, rec: Path) -> None:
        """Raises :class:`DataError`: the file is cut off or not RecordIO, or it has no labels."""
        self._files = RandomReads([rec])
        try:
            with open(rec, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                begins = _begins(data)
                self._spans = np.stack([begins, np.append(begins[1:], len(data))], axis=1)
                labels = [_label(data[begin:end]) for begin, end in self._spans.tolist()]
        except (BadSample, ValueError) as error:  # mmap refuses an empty file with a ValueError
            raise DataError(f"{rec}: not a whole RecordIO file: {error}") from None
        if max(labels) < 0:
            raise DataError(f"{rec}: no record has a single class index; expected a file of im2rec")
        self.classes = tuple(map(str, range(max(labels) + 1)))
        self._file = np.zeros(len(labels), np.int32)
        self._first = np.zeros(1, np.int64)


def _begins(data: mmap.mmap) -> np.ndarray:
    begins, position, inside = [], 0, False
    while position < len(data):
        first, last, length = part_header(data, position)
        if first == inside:
            raise BadSample("corrupt", f"byte {position}", "a record begins inside another")
        if first:
            begins.append(position)
        position += length
        inside = not last
    if inside or position > len(data):
        raise BadSample("truncated", f"byte {len(data)}", "the last record goes on")
    return np.array(begins, dtype=np.int64)


def _label(record: bytes) -> int:
    """The class index, or -1 where there is none: reading such a record then names it."""
    try:
        labels = unpack(unframe(record)).labels
    except BadSample:
        return -1
    whole = len(labels) == 1 and 0 <= labels[0] < _MAX_CLASSES and labels[0] == int(labels[0])
    return int(labels[0]) if whole else -1
