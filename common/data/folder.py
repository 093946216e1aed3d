"""Class folders: PATH/{train,val}/CLASS/image.jpg."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from common.data.source import (
    IMAGE_EXTENSIONS,
    DataError,
    Names,
    Sample,
    check_key,
    digest,
    read_file,
    refuse_existing,
)
from common.files import atomic_folder

_ENDINGS = tuple(f".{extension}".encode() for extension in IMAGE_EXTENSIONS)


class FolderSource:
    """One split of class folders; see :class:`common.data.source.Source`.

    Classes are the sorted names of the folders, those of ``train`` for every split, and samples are in the
    order of class and file name. Hidden files and files without an image's extension are no samples.
    """

    def __init__(self, root: Path, split: str) -> None:
        """Raises :class:`DataError`: no class folders, or classes that the training split has not."""
        self.root = root / split
        train = root / "train"
        self.classes = _class_folders(train if train.is_dir() else self.root)
        unknown = sorted(set(_class_folders(self.root)) - set(self.classes))
        if unknown:
            raise DataError(f"{self.root}: class {unknown[0]!r} is not among the classes of {train}")
        files = [_image_files(self.root / name) for name in self.classes]
        self._labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(names) for names in files])
        self._names = Names(name for names in files for name in names)

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[bytes, int]:
        """The bytes of the file, and its class."""
        where = self.where(index)
        return read_file(f"{self.root}/{where}", where), int(self._labels[index])

    def where(self, index: int) -> str:
        """``class/name``."""
        return f"{self.classes[self._labels[index]]}/{os.fsdecode(self._names[index])}"

    def shard(self, index: int) -> str:
        """The class folder: ``split/class``."""
        return f"{self.root.name}/{self.classes[self._labels[index]]}"

    def name(self, index: int) -> str:
        """The file's name without its ending."""
        return os.fsdecode(self._names[index]).rpartition(".")[0]

    def fingerprint(self) -> str:
        """Of classes, names and order, and the sizes of a thousand files."""
        some = np.unique(np.linspace(0, len(self) - 1, 1000).astype(np.int64))
        sizes = np.array([_size(self.root / self.where(index)) for index in some], dtype=np.int64)
        return digest(
            "folder", "\n".join(self.classes), self._labels, self._names.text, self._names.ends, sizes
        )


def write_folder(root: Path, split: str, samples: Iterable[Sample], classes: Sequence[str]) -> None:
    """Write ``root/split/CLASS/KEY.jpg``; the folder ``split`` appears when all of it is written."""
    refuse_existing(root / split)
    with atomic_folder(root / split) as folder:
        for name in classes:
            (folder / name).mkdir()
        for key, data, label in samples:
            with open(folder / classes[label] / f"{check_key(key)}.jpg", "xb") as file:
                file.write(data)


def _class_folders(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: no class folders; expected {folder.name}/CLASS/*.jpg")
    return tuple(names)


def _image_files(folder: Path) -> list[bytes]:
    if not folder.is_dir():  # a class of the training split that this one has no images of
        return []
    names = []
    with os.scandir(os.fsencode(folder)) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                raise DataError(
                    f"{os.fsdecode(entry.path)} is a folder inside a class folder; expected images"
                )
            # Broken links stay: reading them names them.
            if entry.name.lower().endswith(_ENDINGS):
                names.append(entry.name)
    return sorted(names)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
