"""WebDataset shards: ``{split}-000000.tar`` with members ``KEY.jpg`` (or ``.png``) and ``KEY.cls``, read by index.

Beside each shard stands the index that DALI's ``wds2idx`` writes (v1.2), beside all of them ``{split}.json``
with the number of samples, the bytes and the SHA-256 of each. Without an index the tar headers are read instead.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from common.data.source import (
    IMAGE_EXTENSIONS,
    BadSample,
    DataError,
    Names,
    check_size,
    digest,
    read_classes,
)
from common.files import RandomReads

T = TypeVar("T")

BLOCK = tarfile.BLOCKSIZE
VERSION = "v1.2"
_INTEGER = re.compile("[0-9]{1,18}")
_MAX_LABEL_BYTES = 100
_MAX_PAX_BYTES = 1 << 20
_CONTROL = re.compile(r"[\0-\x1f\x7f]")
_NUMBER = re.compile(r"^[0-9]{8}-(?=.)")
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
"""Not those with holes, whose bytes are not the file's."""


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

    def __init__(
        self, root: Path, split: str, reads: Callable[[list[Path]], RandomReads] | None = None
    ) -> None:
        """Open the shards; ``reads``, of their paths, reads those that need not be there yet.

        Raises:
            DataError: shards, index, manifest and classes.txt do not fit together.
        """
        self.classes = read_classes(root)
        there = reads is None
        shards, self._checksums = open_shards(root, split, self.classes, _image_and_label, there)
        paths = [path for path, _ in shards]
        self._files = RandomReads(paths) if reads is None else reads(paths)
        names: list[bytes] = []
        places: list[np.ndarray] = []
        for _, samples in shards:
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
        if label_size > _MAX_LABEL_BYTES:
            raise BadSample("bad label", self.where(index), f"{label_size} bytes: expected a class index")
        text = self._member(index, Member(key, "cls", label, label_size)).strip()
        if not text.isdigit() or len(text) > 9 or int(text) >= len(self.classes):
            detail = f"{text[:20]!r}: expected a class index below {len(self.classes)}"
            raise BadSample("bad label", self.where(index), detail)
        return self._member(index, Member(key, ext, image, image_size)), int(text)

    def where(self, index: int) -> str:
        """Shard and member."""
        return f"{self.shard(index)}: {os.fsdecode(self._names[index])}"

    def shard(self, index: int) -> str:
        """The tar file."""
        return self._files.paths[self._shard[index]].name

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
        return read_member(self._files, int(self._shard[index]), member, self.where(index))


def open_shards(
    root: Path,
    split: str,
    classes: Sequence[str],
    pick: Callable[[list[Member], Path], T],
    there: bool = True,
) -> tuple[list[tuple[Path, list[T]]], list[str]]:
    """The shards of a split in order, each with its samples, and their checksums if there is a manifest.

    Args:
        pick: what is kept of a sample, of its members and the shard.
        there: the shards are in the folder; else only their indexes and the manifest are.

    Raises:
        DataError: shards, index, manifest and ``classes`` do not fit together.
    """
    manifest = read_manifest(root, split)
    entries = [] if there or not manifest else manifest["shards"]
    sizes = {entry["name"]: entry["bytes"] for entry in entries}
    paths = [root / name for name in sizes] or _shard_files(root, split, manifest)
    if manifest is not None and tuple(manifest["classes"]) != tuple(classes):
        raise DataError(f"{root / 'classes.txt'} and {split}.json name different classes")
    shards = [
        (path, [pick(members, path) for members in read_index(path, sizes.get(path.name))]) for path in paths
    ]
    for path, samples in shards:
        _check_manifest(path, len(samples), sizes.get(path.name), manifest)
    return shards, [str(entry["sha256"]) for entry in manifest["shards"]] if manifest else []


def read_member(files: RandomReads, shard: int, member: Member, where: str) -> bytes:
    """The bytes of a member; ``where`` is its place for messages.

    Raises:
        BadSample: it cannot be read, or the tar holds something else there.
    """
    check_size(member.size, where)
    try:
        data = files.read(shard, member.offset - BLOCK, BLOCK + member.size)
    except OSError as error:
        raise BadSample("unreadable", where, error.strerror or str(error)) from None
    if len(data) < BLOCK + member.size:
        raise BadSample("truncated", where, f"{BLOCK + member.size - len(data)} bytes are missing")
    if _is_plain(data[:BLOCK], member):
        return data[BLOCK:]
    try:
        header = _header(data[:BLOCK])
    except tarfile.HeaderError as error:
        raise BadSample(
            "corrupt", where, f"no tar header at byte {member.offset - BLOCK} ({error})"
        ) from None
    if (header.name, header.size) != (member.name, member.size) or header.type not in _FILES:
        detail = f"byte {member.offset} holds {header.name!r} of {header.size} bytes, not {member.size}"
        raise BadSample("corrupt", where, f"the index does not fit the tar: {detail}")
    return data[BLOCK:]


def _is_plain(header: bytes, member: Member) -> bool:
    """Whether it is the member's header as :func:`_add` writes it: seen in a tenth of the time of parsing it."""
    name = os.fsencode(member.name)
    begins, kind, prefix = header.startswith(name + b"\0"), header[156:157], header[345:346]
    return begins and header[124:136] == b"%011o\0" % member.size and (kind, prefix) == (b"0", b"\0")


def read_index(tar: Path, size: int | None = None) -> list[list[Member]]:
    """The members of each sample, from the index beside the shard, or from the tar's headers without one.

    Args:
        size: of the shard in bytes, where it is not there.

    Raises:
        DataError: the shard or its index is cut off or damaged.
    """
    idx = tar.with_suffix(".idx")
    if size is None and not idx.exists():
        return _group(scan(tar))
    return _parse_index(idx, tar.stat().st_size if size is None else size)


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
            block = os.pread(file.fileno(), BLOCK, position)
            if len(block) < BLOCK or position + BLOCK > size:
                raise DataError(f"{tar} is cut off: no end of archive at byte {position}")
            if not any(block):
                return members
            try:
                header = _header(block)
            except tarfile.HeaderError as error:
                raise DataError(f"{tar}: no tar header at byte {position} ({error})") from None
            position += BLOCK
            length = header.size if header.type in (*_FILES, *_PAX) else 0
            if not 0 <= length <= size - position:
                raise DataError(
                    f"{tar} is cut off: {header.name!r} at byte {position} has {header.size} bytes"
                )
            if header.type in _PAX:
                _check_pax(os.pread(file.fileno(), min(length, _MAX_PAX_BYTES + 1), position), tar, position)
            elif header.type in _FILES and not _CONTROL.search(header.name):
                members.append(Member(*_split_name(header.name), position, length))
            elif not (header.isdir() or header.islnk() or header.issym()):
                what = f"{header.name!r} of type {header.type!r}"
                raise DataError(f"{tar}: member {what} at byte {position} is not supported")
            position += length + -length % BLOCK


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
        if version != VERSION or int(count) != len(lines) - 1:
            raise ValueError
    except ValueError:
        raise DataError(
            f"{idx}: expected '{VERSION} COUNT' and COUNT lines, as DALI's wds2idx writes it"
        ) from None
    samples, end = [], 0
    for number, line in enumerate(lines[1:], start=2):
        members = _members(line)
        if not members:
            raise DataError(f"{idx} line {number}: expected 'ext offset size name' for each member")
        for member in members:
            if member.offset < end + BLOCK or member.offset % BLOCK:
                raise DataError(f"{idx} line {number}: {member.name} at byte {member.offset} is out of order")
            end = member.offset + member.size
        samples.append(members)
    if end > size:
        raise DataError(f"{idx.with_suffix('.tar')} is cut off: it has {size} bytes, its index goes to {end}")
    return samples


def _members(line: str) -> list[Member]:
    """The members of a sample in a line of the index; none if the line is wrong."""
    words, members = line.split(" "), []
    for ext, offset, size, name in zip(*[iter(words)] * 4):
        key, extension = _split_name(name)
        if not key or extension != ext or name.split() != [name]:
            return []
        if not (_INTEGER.fullmatch(offset) and _INTEGER.fullmatch(size)):
            return []
        members.append(Member(key, ext, int(offset), int(size)))
    return members if 4 * len(members) == len(words) else []


def _image_and_label(members: list[Member], tar: Path) -> tuple[Member, Member]:
    key = members[0].key
    images = [member for member in members if member.ext.lower() in IMAGE_EXTENSIONS and member.key == key]
    labels = [member for member in members if member.ext == "cls" and member.key == key]
    if len(images) != 1 or len(labels) != 1:
        names = ", ".join(member.name for member in members[:6]) + (", …" if len(members) > 6 else "")
        raise DataError(f"{tar}: expected one image and one .cls of the same key in a sample, found {names}")
    return images[0], labels[0]


def read_manifest(root: Path, split: str) -> dict[str, Any] | None:
    """What ``{split}.json`` says of the shards; None without one. Raises :class:`DataError` if it is damaged."""
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


def _check_manifest(path: Path, samples: int, size: int | None, manifest: dict[str, Any] | None) -> None:
    if manifest is None:
        return
    entry = next(entry for entry in manifest["shards"] if entry["name"] == path.name)
    there = (samples, path.stat().st_size if size is None else size)
    if there != (entry["samples"], entry["bytes"]):
        found = f"has {there[0]} samples and {there[1]} bytes"
        raise DataError(f"{path} {found}, the manifest says {entry['samples']} and {entry['bytes']}")


def _check_pax(header: bytes, tar: Path, position: int) -> None:
    if len(header) > _MAX_PAX_BYTES:
        raise DataError(f"{tar}: extended header of more than {_MAX_PAX_BYTES} bytes at byte {position}")
    if any(word in header for word in (b" path=", b" size=", b" GNU.sparse.")):
        raise DataError(
            f"{tar}: extended header with a name, a size or holes at byte {position} is not supported"
        )
