"""ImageNet (ILSVRC 2012) as it is handed out: three archives, read where they lie; nothing is unpacked to the disk."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.data.prepare.convert import find_splits
from common.data.shards import Member, scan
from common.data.source import BadSample, DataError, Names, Source, check_size, digest, local_path
from common.files import RandomReads

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
_WNID = r"n\d{8}"
_TRUTH, _META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
_MAX_DEVKIT = 64 << 20
"""The devkit is 2.5 MB, and little more unpacked."""


def open_imagenet(path: str | Path) -> dict[str, Source]:
    """Open the splits of ImageNet that are in a folder: the archives, or class folders ``train`` and ``val``.

    Classes are the synsets' WordNet ids in alphabetical order, the numbering of every published ImageNet model.

    Raises:
        DataError: nothing is there, or an archive is not what it is called.
    """
    root = local_path(path)
    if not root.is_dir():
        raise DataError(f"{root} is not an existing folder; expected one with {TRAIN}, {VAL} and {DEVKIT}")
    archives = [name for name in (TRAIN, VAL) if (root / name).is_file()]
    if not archives and not (root / "train").is_dir() and not (root / "val").is_dir():
        raise DataError(f"{root}: expected {TRAIN}, {VAL} and {DEVKIT}, or class folders in train and val")
    return _open_archives(root) if archives else _open_folders(root)


def _open_folders(root: Path) -> dict[str, Source]:
    sources = find_splits(root, format="folder")
    for name in next(iter(sources.values())).classes:
        if not re.fullmatch(_WNID, name):
            raise DataError(f"{root}: class folder {name!r} is not a WordNet id such as n01440764")
    return sources


def _open_archives(root: Path) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    if (root / TRAIN).is_file():
        sources["train"] = open_train(root / TRAIN)
    if not (root / VAL).is_file():
        return sources
    if not (root / DEVKIT).is_file():
        raise DataError(f"{root / DEVKIT} is missing; the labels of {VAL} are in it")
    wnids, labels = read_devkit(root / DEVKIT)
    classes = tuple(sorted(wnids))
    if sources and sources["train"].classes != classes:
        odd = sorted(set(classes) ^ set(sources["train"].classes))
        raise DataError(f"{root}: {TRAIN} and {DEVKIT} differ in {len(odd)} classes, the first {odd[0]}")
    number = {wnid: index for index, wnid in enumerate(classes)}
    sources["val"] = open_val(root / VAL, classes, [number[wnid] for wnid in labels])
    return sources


class TarSource:
    """Images in a tar, at places that are known; see :class:`common.data.source.Source`."""

    def __init__(
        self, tar: Path, members: Sequence[Member], labels: Sequence[int], classes: tuple[str, ...]
    ) -> None:
        self.classes = classes
        self._files = RandomReads([tar])
        self._names = Names(member.name.encode() for member in members)
        self._spans = np.array([(member.offset, member.size) for member in members], np.int64).reshape(-1, 2)
        self._labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[bytes, int]:
        """The member's bytes, and its label."""
        where, (offset, size) = self.where(index), self._spans[index].tolist()
        check_size(size, where)
        try:
            data = self._files.read(0, offset, size)
        except OSError as error:
            raise BadSample("unreadable", where, error.strerror or str(error)) from None
        if len(data) < size:
            raise BadSample("truncated", where, f"{size - len(data)} bytes are missing")
        return data, int(self._labels[index])

    def where(self, index: int) -> str:
        """Archive and member."""
        return f"{self.shard(index)}: {self._names[index].decode()}"

    def shard(self, index: int) -> str:
        """The archive."""
        return self._files.paths[0].name

    def name(self, index: int) -> str:
        """The member's name without its ending."""
        return self._names[index].decode().rpartition(".")[0]

    def fingerprint(self) -> str:
        """Of classes, names, places and labels."""
        names = self._names
        return digest("tar", "\n".join(self.classes), self._spans, self._labels, names.text, names.ends)


def open_train(tar: Path) -> TarSource:
    """The training images, in the order of classes, from the tar of one tar a class.

    Raises:
        DataError: it is cut off, or a member is not called as in the official archive.
    """
    inner = sorted(_members(tar, _WNID, "tar"), key=lambda member: member.key)
    members: list[Member] = []
    labels: list[int] = []
    for label, part in enumerate(inner):
        images = _members(tar, rf"{part.key}_\d{{1,9}}", "JPEG", part.offset, part.offset + part.size)
        members += images
        labels += [label] * len(images)
    return TarSource(tar, members, labels, tuple(part.key for part in inner))


def open_val(tar: Path, classes: tuple[str, ...], labels: Sequence[int]) -> TarSource:
    """The validation images in the order of their numbers, that of the labels.

    Raises:
        DataError: as :func:`open_train`, or there are more or fewer images than labels.
    """
    members = sorted(_members(tar, r"ILSVRC2012_val_\d{8}", "JPEG"), key=lambda member: member.key)
    numbers = [int(member.key[-8:]) for member in members]
    if numbers != list(range(1, len(labels) + 1)):
        raise DataError(
            f"{tar}: {len(members)} images for {len(labels)} labels; expected the numbers 1 to {len(labels)}"
        )
    return TarSource(tar, members, labels, classes)


def read_devkit(path: Path) -> tuple[list[str], list[str]]:
    """The synsets' WordNet ids, and that of each validation image.

    Raises:
        DataError: the archive is damaged, much too large, or lacks a file.
    """
    try:
        with gzip.open(path) as file:
            unpacked = file.read(_MAX_DEVKIT + 1)
        if len(unpacked) > _MAX_DEVKIT:
            raise DataError(f"{path} unpacks to more than {_MAX_DEVKIT} bytes; it is not the devkit")
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as tar:
            truth, meta = (_devkit_file(tar, name, path) for name in (_TRUTH, _META))
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    wnid_of = _synsets(meta, path)
    try:
        labels = [wnid_of[int(line)] for line in truth.split()]
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: {_TRUTH}: no synset of {_META} has the id {error}") from None
    return list(wnid_of.values()), labels


def _devkit_file(tar: tarfile.TarFile, name: str, path: Path) -> bytes:
    for member in tar.getmembers():
        if member.isreg() and f"/{member.name}".endswith(f"/{name}"):
            file = tar.extractfile(member)
            if file is not None:
                return file.read()
    raise DataError(f"{path}: {name} is not in it")


def _synsets(meta: bytes, path: Path) -> dict[int, str]:
    """The WordNet id of each ILSVRC id, of the synsets without children: those are the classes."""
    from scipy.io import loadmat  # type: ignore[import-untyped]  # a second, only here

    try:
        table = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
        rows = [(int(row["ILSVRC2012_ID"]), str(row["WNID"])) for row in table if row["num_children"] == 0]
    except Exception as error:  # its parser raises whatever it stumbles over
        raise DataError(
            f"{path}: {_META} is not a table of synsets ({' '.join(str(error).split())})"
        ) from None
    wnid_of = dict(rows)
    if len(set(wnid_of.values())) < len(rows) or not all(re.fullmatch(_WNID, wnid) for _, wnid in rows):
        raise DataError(f"{path}: {_META}: expected ids and WordNet ids that are all different")
    return wnid_of


def _members(tar: Path, key: str, ext: str, begin: int = 0, end: int | None = None) -> list[Member]:
    """The members of a tar, all of which must be called so, each once."""
    members = scan(tar, begin, end)
    for member in members:
        if member.ext != ext or not re.fullmatch(key, member.key):
            raise DataError(f"{tar}: member {member.name!r} at byte {member.offset} is none of ImageNet's")
    if not members or len({member.key for member in members}) < len(members):
        raise DataError(f"{tar}: the archive at byte {begin} is empty, or has a member twice")
    return members
