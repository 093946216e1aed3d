"""RecordIO: ``{split}.rec`` and ``{split}.idx``, the form of the published BAT and FBN runs; DALI reads it.

A record is uint32 magic, uint32 lrec (3 bits of continuation flag, 29 of length), payload, zeros up to a
multiple of 4, all little-endian. A payload is cut at every occurrence of the magic at a multiple of 4 from its
start; the magic itself is left out there, and the parts carry the flags 1 (first), 2 (middle) and 3 (last);
0 is a whole one. An image's payload is ``IfQQ`` (flag, label, id, id2), then ``flag`` float32 labels, then the
encoded image.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.data.source import (
    MAX_SAMPLE_BYTES,
    BadSample,
    DataError,
    Names,
    Sample,
    check_size,
    digest,
    image_extension,
    read_classes,
    refuse_existing,
)
from common.files import Hashed, RandomReads, atomic_write

_MAGIC_WORD = 0xCED7230A
_MAGIC = struct.pack("<I", _MAGIC_WORD)
_PART = struct.Struct("<4sI")
_HEADER = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)


class Record(NamedTuple):
    """An image's payload, taken apart."""

    labels: tuple[float, ...]
    id: int
    id2: int
    image: bytes


def pack(image: bytes, labels: float | Sequence[float], id: int, id2: int = 0) -> bytes:
    """An image's payload. One number goes into the header; a sequence follows it, its length is the flag.

    Raises:
        ValueError: a value that does not fit its field, or whose bytes are the magic: the record would be cut
            inside its header, which DALI cannot read.
    """
    return _header(labels, id, id2) + image


def unpack(payload: bytes, where: str = "record") -> Record:
    """Take an image's payload apart; raises :class:`BadSample` if it is shorter than its header says."""
    if len(payload) < _HEADER.size:
        raise BadSample("corrupt", where, f"{len(payload)} bytes are too few for a header")
    flag, label, id, id2 = _HEADER.unpack_from(payload)
    begin = _HEADER.size + 4 * flag
    if begin > len(payload):
        raise BadSample("corrupt", where, f"{flag} labels do not fit in {len(payload)} bytes")
    labels = struct.unpack_from(f"<{flag}f", payload, _HEADER.size) if flag else (label,)
    return Record(labels, id, id2, payload[begin:])


def frame(payload: bytes) -> bytes:
    """The record as it stands in the file, cut into parts where the payload holds the magic.

    Raises:
        ValueError: a part is too long for its length field.
    """
    return b"".join(_framed(b"", payload))


def unframe(record: bytes, where: str = "record") -> bytes:
    """The payload of the record that fills ``record`` exactly; raises :class:`BadSample` if none does."""
    parts: list[bytes] = []
    position, flag = 0, _FIRST
    while flag in (_FIRST, _MIDDLE):
        if position + _PART.size > len(record):
            raise BadSample("truncated", where, f"ends after {len(record)} bytes, inside a part's header")
        magic, lrec = _PART.unpack_from(record, position)
        flag, length = lrec >> 29, lrec & MAX_SAMPLE_BYTES
        if magic != _MAGIC:
            raise BadSample("corrupt", where, f"no RecordIO magic {position} bytes on")
        if flag not in ((_MIDDLE, _LAST) if parts else (_WHOLE, _FIRST)):
            raise BadSample("corrupt", where, f"continuation flag {flag} in part {len(parts)}")
        begin = position + _PART.size
        position = begin + length + -length % 4
        if position > len(record):
            raise BadSample("truncated", where, f"length {length} where {len(record) - begin} bytes are left")
        if any(record[begin + length : position]):
            raise BadSample("corrupt", where, f"length {length} is wrong: what follows is not zero padding")
        parts.append(record[begin : begin + length])
    if position != len(record):
        raise BadSample("corrupt", where, f"ends after {position} bytes, the index says {len(record)}")
    return _MAGIC.join(parts)


def part_header(data: bytes | mmap.mmap, position: int) -> tuple[bool, bool, int]:
    """Whether the part at ``position`` is a record's first and its last one, and its length with all padding.

    Raises:
        BadSample: no part begins there.
    """
    header = data[position : position + _PART.size]
    if len(header) < _PART.size or header[:4] != _MAGIC:
        raise BadSample("corrupt", f"byte {position}", "no RecordIO magic")
    _, lrec = _PART.unpack(header)
    flag, length = lrec >> 29, lrec & MAX_SAMPLE_BYTES
    return flag in (_WHOLE, _FIRST), flag in (_WHOLE, _LAST), _PART.size + length + -length % 4


class RecordioSource:
    """One split in RecordIO files, in the order of offsets; see :class:`common.data.source.Source`."""

    def __init__(self, root: Path, split: str) -> None:
        """Raises :class:`DataError`: an index or classes.txt is missing, or index and file do not match."""
        self.classes = read_classes(root)
        paths = _part_files(root, split)
        self._files = RandomReads(paths)
        spans = [_spans(path, number, self._files) for number, path in enumerate(paths)]
        counts = [len(span) for span in spans]
        self._file = np.repeat(np.arange(len(paths), dtype=np.int32), counts)
        self._first = np.cumsum([0, *counts])
        self._spans = np.concatenate(spans)

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its label."""
        where, (begin, end) = self.where(index), self._spans[index].tolist()
        payload = unframe(_read(self._files, int(self._file[index]), begin, end, where), where)
        record = unpack(payload, where)
        label = record.labels[0]
        if len(record.labels) != 1 or not 0 <= label < len(self.classes) or label != int(label):
            detail = f"{record.labels[:3]}: expected one class index below {len(self.classes)}"
            raise BadSample("bad label", where, detail)
        return record.image, int(label)

    def where(self, index: int) -> str:
        """File, record and byte offset."""
        record, begin = index - self._first[self._file[index]], self._spans[index, 0]
        return f"{self.shard(index)} record {record} at byte {begin}"

    def shard(self, index: int) -> str:
        """The ``.rec`` file."""
        return self._files.paths[self._file[index]].name

    def name(self, index: int) -> str:
        """The file's name in the ``.lst`` without its ending, or the number where there is none."""
        return os.fsdecode(self._stems[index]) or f"{index:08d}"

    @cached_property
    def _stems(self) -> Names:
        files = enumerate(self._files.paths)
        return Names(stem for n, path in files for stem in _listed(path, self._spans[self._file == n, 0]))

    def fingerprint(self) -> str:
        """Of classes, files and all offsets and sizes."""
        names = "\n".join(path.name for path in self._files.paths)
        return digest("recordio", "\n".join(self.classes), names, self._file, self._spans)


def _listed(rec: Path, begins: np.ndarray) -> list[bytes]:
    """What ``.lst`` calls the records, without folders and ending; empty where it does not say."""
    idx, lst = rec.with_suffix(".idx"), rec.with_suffix(".lst")
    if not (idx.is_file() and lst.is_file()):
        return [b""] * len(begins)
    key_at = {offset: key for key, offset in (line.split() for line in idx.read_bytes().splitlines())}
    path_of = {line.partition(b"\t")[0]: line.rpartition(b"\t")[2] for line in lst.read_bytes().splitlines()}
    paths = [path_of.get(key_at.get(b"%d" % begin, b""), b"") for begin in begins]
    return [path.rpartition(b"/")[2].rpartition(b".")[0] for path in paths]


def write_recordio(root: Path, split: str, samples: Iterable[Sample], classes: Sequence[str]) -> None:
    """Write ``{split}.rec``, ``.lst`` (``id label key.jpg``) and last ``.idx``; ids count from 0."""
    rec = root / f"{split}.rec"
    refuse_existing(rec)
    write_part(rec, ((number, *sample) for number, sample in enumerate(samples)), classes)


def write_part(
    rec: Path, samples: Iterable[tuple[int, str, bytes, int]], classes: Sequence[str]
) -> dict[str, Any]:
    """Write one ``.rec`` with its ``.lst`` and last its ``.idx``; returns what a manifest says of it.

    Args:
        rec: the file to make.
        samples: id, key (which may have folders), encoded image and label of each.
        classes: class names; labels must be indices of them.

    Raises:
        ValueError: a label is out of range, or there are no samples.
    """
    count = 0
    lst, idx = rec.with_suffix(".lst"), rec.with_suffix(".idx")
    with (
        atomic_write(idx) as index,
        atomic_write(lst) as listing,
        atomic_write(rec) as file,
        Hashed(file) as records,
    ):
        for number, key, data, label in samples:
            if not 0 <= label < len(classes):
                raise ValueError(f"label {label} of {key!r}: expected 0 to {len(classes) - 1}")
            index.write(b"%d\t%d\n" % (number, records.size))
            listing.write(f"{number}\t{label}\t{key}.{image_extension(data)}\n".encode())
            for piece in _framed(_header(label, number), data):
                records.write(piece)
            count += 1
        if not count:
            raise ValueError(f"no samples for {rec.name}")
    return records.entry(rec.name, count)


def join_indexes(parts: Sequence[Path], idx: Path) -> None:
    """One index of several ``.rec`` files, as DALI reads it: offsets as if the files were one."""
    base = 0
    with atomic_write(idx) as file:
        for part in parts:
            for line in part.with_suffix(".idx").read_bytes().splitlines():
                key, offset = line.split(b"\t")
                file.write(b"%b\t%d\n" % (key, base + int(offset)))
            base += part.stat().st_size


def _header(labels: float | Sequence[float], id: int, id2: int = 0) -> bytes:
    several = not isinstance(labels, (int, float))
    numbers = tuple(labels) if isinstance(labels, Sequence) else (labels,)
    if not numbers:
        raise ValueError("labels is empty: expected at least one number")
    try:
        header = _HEADER.pack(len(numbers) if several else 0, 0.0 if several else numbers[0], id, id2)
        header += struct.pack(f"<{len(numbers)}f", *numbers) if several else b""
    except (struct.error, OverflowError) as error:
        raise ValueError(
            f"labels {labels}, id {id}, id2 {id2}: do not fit a record's header ({error})"
        ) from None
    if _MAGIC in header and len(_cut(header)) > 1:
        raise ValueError(
            f"labels {labels}, id {id}, id2 {id2}: bytes equal to RecordIO's magic; use other ids"
        )
    return header


def _framed(header: bytes, rest: bytes) -> list[bytes]:
    """The record of a payload, in pieces that need not be joined; the header's length is a multiple of 4."""
    parts = _cut(rest)
    framed = []
    for number, part in enumerate(parts):
        before = b"" if number else header
        length = len(before) + len(part)
        if length > MAX_SAMPLE_BYTES:
            raise ValueError(
                f"a record of {len(header) + len(rest)} bytes is too long: at most {MAX_SAMPLE_BYTES}"
            )
        last = number == len(parts) - 1
        flag = (_WHOLE if last else _FIRST) if number == 0 else (_LAST if last else _MIDDLE)
        framed += [_PART.pack(_MAGIC, flag << 29 | length) + before, part, bytes(-length % 4)]
    return framed


def _cut(payload: bytes) -> list[bytes]:
    # As numbers, several times faster than a search for the bytes.
    words = np.frombuffer(payload, "<u4", len(payload) // 4)
    places = (4 * (words == _MAGIC_WORD).nonzero()[0]).tolist()
    begins, ends = [0, *(place + len(_MAGIC) for place in places)], [*places, len(payload)]
    return [payload[begin:end] for begin, end in zip(begins, ends)]


def _part_files(root: Path, split: str) -> list[Path]:
    found = (re.fullmatch(rf"{split}_([0-9]+)\.rec", name) for name in os.listdir(root))
    parts = sorted((int(part[1]), part[0]) for part in found if part)
    single = root / f"{split}.rec"
    if single.exists() and parts:
        raise DataError(f"{single} and {parts[0][1]} are both there; expected one or the other")
    if single.exists():
        return [single]
    for expected, (number, name) in enumerate(parts):
        if number > expected:
            raise DataError(f"{root / f'{split}_{expected}.rec'} is missing; parts go up to {parts[-1][0]}")
        if number < expected:
            raise DataError(f"{root / name} and {parts[expected - 1][1]} are the same part; expected one")
    return [root / name for _, name in parts]


def _spans(rec: Path, number: int, files: RandomReads) -> np.ndarray:
    """(n, 2) begin and end of every record of a file; the last one is read, which shows an index cut off."""
    size = rec.stat().st_size
    begins = _offsets(rec.with_suffix(".idx"))
    if begins[-1] >= size:
        raise DataError(f"{rec}: the index has a record at byte {begins[-1]}, the file has {size} bytes")
    ends = np.append(begins[1:], size)
    if (ends == begins).any():
        raise DataError(f"{rec}: the index has byte {begins[ends == begins][0]} twice")
    where = f"{rec} record {len(begins) - 1} at byte {begins[-1]}"
    try:
        unframe(_read(files, number, int(begins[-1]), size, where), where)
    except BadSample as bad:
        raise DataError(f"{bad}; the file or its index is cut off or damaged") from None
    return np.stack([begins, ends], axis=1)


def _offsets(idx: Path) -> np.ndarray:
    if not idx.exists():
        raise DataError(f"{idx} is missing; expected a line 'key<TAB>offset' for each record")
    text = idx.read_bytes()
    if not re.fullmatch(rb"(?:\d{1,18}\t\d{1,18}\n)*\d{1,18}\t\d{1,18}\n?", text):
        lines = text.split(b"\n")
        bad = next((n for n, line in enumerate(lines) if not re.fullmatch(rb"\d{1,18}\t\d{1,18}", line)), 0)
        raise DataError(f"{idx} line {bad + 1}: {lines[bad][:40]!r} is not 'key<TAB>offset'")
    return np.sort(np.array(text.split(), dtype=np.int64)[1::2])


def _read(files: RandomReads, number: int, begin: int, end: int, where: str) -> bytes:
    check_size(end - begin, where)
    try:
        return files.read(number, begin, end - begin)
    except OSError as error:
        raise BadSample("unreadable", where, error.strerror or str(error)) from None
