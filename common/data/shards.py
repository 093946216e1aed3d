"""WebDataset shards: ``{split}-000000.tar`` with members ``KEY.jpg`` (or ``.png``) and ``KEY.cls``, read by index.

Beside each shard stands the index that DALI's ``wds2idx`` writes (v1.2), beside all of them ``{split}.json``
with the number of samples, the bytes and the SHA-256 of each. Without an index the tar headers are read instead.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.data.source import (
    IMAGE_EXTENSIONS,
    BadSample,
    DataError,
    Names,
    Sample,
    check_key,
    check_size,
    digest,
    image_extension,
    read_classes,
    refuse_existing,
)
from common.files import Hashed, RandomReads, atomic_write

_BLOCK = tarfile.BLOCKSIZE
_VERSION = "v1.2"
_COMPONENT = re.compile(r"(\S+) ([0-9]{1,18}) ([0-9]{1,18}) ((?:\S*/)?[^\s./]+)\.\1(?: |$)")
"""ext, offset, size and name of a member in the index; the name is the key, a dot and ext."""
_NUMBER = re.compile(r"^[0-9]{8}-(?=.)")
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE)


class Member(NamedTuple):
    """A file in a tar, called ``key.ext``."""

    key: str
    ext: str
    offset: int
    """Of its first byte, behind its header."""
    size: int

    @property
    def name(self) -> str:
        return f"{self.key}.{self.ext}"


class ShardSource:
    """One split in shards; see :class:`common.data.source.Source`. Samples are in the order of the shards."""

    def __init__(self, root: Path, split: str) -> None:
        """Raises :class:`DataError`: shards, index, manifest and classes.txt do not fit together."""
        self.classes = read_classes(root)
        manifest = _read_manifest(root, split)
        paths = _shard_files(root, split, manifest)
        if manifest is not None and tuple(manifest["classes"]) != self.classes:
            raise DataError(f"{root / 'classes.txt'} and {split}.json name different classes")
        self._files = RandomReads(paths)
        self._checksums = [str(entry["sha256"]) for entry in manifest["shards"]] if manifest else []
        names: list[bytes] = []
        places: list[np.ndarray] = []
        for path in paths:
            samples = read_index(path)
            _check_manifest(path, len(samples), manifest)
            names += [os.fsencode(image.name) for image, _ in samples]
            rows = [(*image[2:], *label[2:]) for image, label in samples]
            places.append(np.array(rows, dtype=np.int64).reshape(-1, 4))
        self._names = Names(names)
        self._shard = np.repeat(np.arange(len(paths), dtype=np.int32), [len(rows) for rows in places])
        self._places = np.concatenate(places)

    def __len__(self) -> int:
        return len(self._shard)

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its label."""
        key, ext = _split_name(os.fsdecode(self._names[index]))
        image, image_size, label, label_size = self._places[index].tolist()
        text = self._member(index, Member(key, "cls", label, label_size)).strip()
        if not text.isdigit() or len(text) > 9 or int(text) >= len(self.classes):
            detail = f"{text[:20]!r}: expected a class index below {len(self.classes)}"
            raise BadSample("bad label", self.where(index), detail)
        return self._member(index, Member(key, ext, image, image_size)), int(text)

    def where(self, index: int) -> str:
        """Shard and member."""
        return f"{self._files.paths[self._shard[index]].name}: {os.fsdecode(self._names[index])}"

    def name(self, index: int) -> str:
        """The key, without folders and without the number that :func:`numbered_key` gave it."""
        key = _split_name(os.fsdecode(self._names[index]))[0].rpartition("/")[2]
        return _NUMBER.sub("", key)

    def fingerprint(self) -> str:
        """Of classes, shards, member names, offsets and sizes, and the manifest's checksums."""
        shards = "\n".join([*(path.name for path in self._files.paths), *self._checksums])
        names = self._names
        return digest(
            "webdataset", "\n".join(self.classes), shards, self._shard, self._places, names.text, names.ends
        )

    def _member(self, index: int, member: Member) -> bytes:
        where = self.where(index)
        check_size(member.size, where)
        try:
            data = self._files.read(int(self._shard[index]), member.offset - _BLOCK, _BLOCK + member.size)
        except OSError as error:
            raise BadSample("unreadable", where, error.strerror or str(error)) from None
        if len(data) < _BLOCK + member.size:
            raise BadSample("truncated", where, f"{_BLOCK + member.size - len(data)} bytes are missing")
        try:
            header = _header(data[:_BLOCK])
        except tarfile.HeaderError as error:
            raise BadSample(
                "corrupt", where, f"no tar header at byte {member.offset - _BLOCK} ({error})"
            ) from None
        if (header.name, header.size) != (member.name, member.size):
            detail = f"byte {member.offset} holds {header.name!r} of {header.size} bytes, not {member.size}"
            raise BadSample("corrupt", where, f"the index does not fit the tar: {detail}")
        return data[_BLOCK:]


def read_index(tar: Path) -> list[tuple[Member, Member]]:
    """Image and label of each sample, from the index beside the shard, or from the tar's headers without one.

    Raises:
        DataError: the shard or its index is cut off or damaged, or a sample has not one image and one label.
    """
    idx = tar.with_suffix(".idx")
    size = tar.stat().st_size
    samples = _parse_index(idx, size) if idx.exists() else _group(scan(tar))
    return [_image_and_label(members, tar) for members in samples]


def scan(tar: Path, begin: int = 0, end: int | None = None) -> list[Member]:
    """The regular files of a tar, from its headers.

    Args:
        tar: the file.
        begin: where in the file the archive begins; not 0 for a tar that is a member of another.
        end: where it ends; the file's end by default.

    Raises:
        DataError: the tar is cut off or damaged, or uses names or types that no data set needs.
    """
    members: list[Member] = []
    position, size = begin, tar.stat().st_size if end is None else end
    with open(tar, "rb", buffering=0) as file:
        while True:
            block = os.pread(file.fileno(), _BLOCK, position)
            if len(block) < _BLOCK or position + _BLOCK > size:
                raise DataError(f"{tar} is cut off: no end of archive at byte {position}")
            if not any(block):
                return members
            try:
                header = _header(block)
            except tarfile.HeaderError as error:
                raise DataError(f"{tar}: no tar header at byte {position} ({error})") from None
            position += _BLOCK
            length = header.size if header.isreg() or header.type in _PAX else 0
            if not 0 <= length <= size - position:
                raise DataError(
                    f"{tar} is cut off: {header.name!r} at byte {position} has {header.size} bytes"
                )
            if header.type in _PAX:
                _refuse_pax_names(os.pread(file.fileno(), length, position), tar, position)
            elif header.isreg():
                members.append(Member(*_split_name(header.name), position, length))
            elif not (header.isdir() or header.islnk() or header.issym()):
                raise DataError(f"{tar}: member type {header.type!r} at byte {position} is not supported")
            position += length + -length % _BLOCK


def write_shards(
    root: Path,
    split: str,
    samples: Iterable[Sample],
    classes: Sequence[str],
    max_samples: int = 10_000,
    max_bytes: int = 256 << 20,
) -> None:
    """Write ``{split}-*.tar``, each with its index, and last the manifest ``{split}.json``.

    The same samples give the same bytes.

    Args:
        root: an existing folder.
        split: the name that all files begin with.
        samples: sorted by key.
        classes: class names, for the manifest.
        max_samples: a shard that has this many is full.
        max_bytes: a shard that has this many is full.

    Raises:
        ValueError: keys are not sorted or not usable, labels are out of range, or there are no samples.
    """
    refuse_existing(root / f"{split}-{0:06d}.tar")
    entries: list[dict[str, Any]] = []
    stream = iter(samples)
    waiting = [sample for sample in [next(stream, None)] if sample]
    previous = ""

    def fill() -> Iterator[Sample]:
        nonlocal previous
        count = size = 0
        while waiting and count < max_samples and size < max_bytes:
            sample = waiting.pop()
            if check_key(sample[0]) <= previous:
                raise ValueError(f"key {sample[0]!r} after {previous!r}: expected keys in rising order")
            previous, count, size = sample[0], count + 1, size + sample_size(sample)
            yield sample
            waiting.extend(following for following in [next(stream, None)] if following)

    while waiting:
        entries.append(write_shard(root / f"{split}-{len(entries):06d}.tar", fill(), classes))
    if not entries:
        raise ValueError(f"no samples for split {split!r}")
    manifest = {
        "split": split,
        "samples": sum(entry["samples"] for entry in entries),
        "classes": list(classes),
        "shards": entries,
    }
    with atomic_write(root / f"{split}.json") as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")


def write_shard(path: Path, samples: Iterable[Sample], classes: Sequence[str]) -> dict[str, Any]:
    """Write one shard and, before it appears, its index; returns what the manifest says of it.

    Raises:
        ValueError: a key is not usable, or a label out of range.
    """
    lines: list[str] = []
    with atomic_write(path.with_suffix(".idx")) as idx, atomic_write(path) as file, Hashed(file) as tar:
        for key, data, label in samples:
            if not 0 <= label < len(classes):
                raise ValueError(f"label {label} of {key!r}: expected 0 to {len(classes) - 1}")
            check_key(key)
            components = [("cls", b"%d" % label), (image_extension(data), data)]
            lines.append(" ".join(_add(tar, f"{key}.{ext}", ext, part) for ext, part in components) + "\n")
        tar.write(bytes(2 * _BLOCK))
        tar.write(bytes(-tar.size % tarfile.RECORDSIZE))
        idx.write(f"{_VERSION} {len(lines)}\n{''.join(lines)}".encode())
    return tar.entry(path.name, len(lines))


def numbered_key(number: int, name: str) -> str:
    """A key that sorts by number and says what the sample was called; ``name`` as :func:`check_key` wants it."""
    return f"{number:08d}-{name}"


def sample_size(sample: Sample) -> int:
    """Bytes that a sample takes in a shard, headers and padding included."""
    _, data, label = sample
    return sum(_BLOCK + size + -size % _BLOCK for size in (len(str(label)), len(data)))


def _add(tar: Hashed, name: str, ext: str, data: bytes) -> str:
    tar.write(_member_header(name, len(data)))
    offset = tar.size
    tar.write(data)
    tar.write(bytes(-len(data) % _BLOCK))
    return f"{ext} {offset} {len(data)} {name}"


def _member_header(name: str, size: int) -> bytes:
    """What ``TarInfo.tobuf`` gives for a file of mode 0444 and no times and owners, ten times faster."""
    header = bytearray(_EMPTY_HEADER)
    header[: len(name)] = name.encode()
    header[124:135] = b"%011o" % size
    header[148:156] = b"        "
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


def _empty_header() -> bytes:
    info = tarfile.TarInfo("")
    info.mode = 0o444
    return info.tobuf(tarfile.USTAR_FORMAT)


_EMPTY_HEADER = _empty_header()


def _header(block: bytes) -> tarfile.TarInfo:
    return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # checks the header's checksum


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension: the extension begins at the first dot behind the last slash."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (folder + slash + stem if stem else ""), extension


def _group(members: list[Member]) -> list[list[Member]]:
    """Neighbours with the same key are one sample; names that begin with a dot are none."""
    samples: list[list[Member]] = []
    for member in members:
        if member.key and samples and member.key == samples[-1][0].key:
            samples[-1].append(member)
        elif member.key:
            samples.append([member])
    return samples


def _parse_index(idx: Path, size: int) -> list[list[Member]]:
    try:
        lines = idx.read_bytes().decode("utf-8", "surrogateescape").removesuffix("\n").split("\n")
        version, count = lines[0].split()
        if version != _VERSION or int(count) != len(lines) - 1:
            raise ValueError
    except ValueError:
        raise DataError(
            f"{idx}: expected '{_VERSION} COUNT' and COUNT lines, as DALI's wds2idx writes it"
        ) from None
    samples, end = [], 0
    for number, line in enumerate(lines[1:], start=2):
        found = _COMPONENT.findall(line)
        members = [Member(key, ext, int(offset), int(length)) for ext, offset, length, key in found]
        if not members or line.count(" ") + 1 != 4 * len(members):
            raise DataError(f"{idx} line {number}: expected 'ext offset size name' for each member")
        for member in members:
            if member.offset < end + _BLOCK or member.offset % _BLOCK:
                raise DataError(f"{idx} line {number}: {member.name} at byte {member.offset} is out of order")
            end = member.offset + member.size
        samples.append(members)
    if end > size:
        raise DataError(f"{idx.with_suffix('.tar')} is cut off: it has {size} bytes, its index goes to {end}")
    return samples


def _image_and_label(members: list[Member], tar: Path) -> tuple[Member, Member]:
    key = members[0].key
    images = [member for member in members if member.ext.lower() in IMAGE_EXTENSIONS and member.key == key]
    labels = [member for member in members if member.ext == "cls" and member.key == key]
    if len(images) != 1 or len(labels) != 1:
        names = ", ".join(member.name for member in members)
        raise DataError(f"{tar}: expected one image and one .cls of the same key in a sample, found {names}")
    return images[0], labels[0]


def _read_manifest(root: Path, split: str) -> dict[str, Any] | None:
    path = root / f"{split}.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_bytes())
        entries = manifest["shards"]
        names = [entry["name"] for entry in entries if re.fullmatch(rf"{split}-\d+\.tar", entry["name"])]
        typed = all(
            type(entry[key]) is kind
            for entry in entries
            for key, kind in (("samples", int), ("bytes", int), ("sha256", str))
        )
        total = sum(entry["samples"] for entry in entries)
        if not typed or len(set(names)) != len(entries) or manifest["samples"] != total:
            raise ValueError
        if not entries or not all(type(name) is str for name in manifest["classes"]):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DataError(
            f"{path} is damaged: expected samples, classes and shards, each with its size"
        ) from None
    return manifest


def _shard_files(root: Path, split: str, manifest: dict[str, Any] | None) -> list[Path]:
    there = {
        name: int(found[1])
        for name in os.listdir(root)
        if (found := re.fullmatch(rf"{split}-(\d+)\.tar", name))
    }
    names = sorted(there, key=lambda name: there[name])
    if manifest is None:
        if [there[name] for name in names] != list(range(len(names))):
            raise DataError(
                f"{root}: the numbers of {split}-*.tar do not count from 0; a shard is missing or twice"
            )
        return [root / name for name in names]
    listed = [entry["name"] for entry in manifest["shards"]]
    for name in set(listed) ^ set(names):
        problem = "missing" if name in listed else "not in the manifest"
        raise DataError(f"{root / name} is {problem}; see {split}.json")
    return [root / name for name in listed]


def _check_manifest(path: Path, samples: int, manifest: dict[str, Any] | None) -> None:
    if manifest is None:
        return
    entry = next(entry for entry in manifest["shards"] if entry["name"] == path.name)
    there = (samples, path.stat().st_size)
    if there != (entry["samples"], entry["bytes"]):
        found = f"has {there[0]} samples and {there[1]} bytes"
        raise DataError(f"{path} {found}, the manifest says {entry['samples']} and {entry['bytes']}")


def _refuse_pax_names(header: bytes, tar: Path, position: int) -> None:
    if b" path=" in header or b" size=" in header:
        raise DataError(f"{tar}: extended header with a name or a size at byte {position} is not supported")
