"""Where samples are: the contract that class folders, RecordIO files and WebDataset shards keep alike."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from common.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
MAX_SAMPLE_BYTES = (1 << 29) - 1
"""Encoded images above this are refused; it is also the longest part of a RecordIO record."""

Sample = tuple[str, bytes, int]
"""What is written: a key, the encoded image, the class index."""


class DataError(UserError):
    """A data set that cannot be used: one line that says where, what is wrong and what would be right."""


class BadSample(Exception):
    """One sample that cannot be used, while the others can.

    Attributes:
        reason: ``unreadable``, ``truncated``, ``corrupt``, ``bad label``, ``not an image``,
            ``wrong channels`` or ``too large``.
        where: the file and the place in it, as :meth:`Source.where` gives it.
        detail: what was found.
    """

    def __init__(self, reason: str, where: str, detail: str) -> None:
        super().__init__(reason, where, detail)
        self.reason, self.where, self.detail = reason, where, detail

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}: {self.detail}"


@dataclass
class Cache:
    """Where the shards of a server are kept."""

    folder: str = "~/.cache/pairwise"
    gigabytes: float = 200.0
    """10⁹ bytes that shards may take."""

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder).expanduser()

    @property
    def bytes(self) -> int:
        """What shards may take."""
        return int(self.gigabytes * 1e9)


class Source(Protocol):
    """The samples of one split, read by index; picklable, and safe after a fork and in threads."""

    classes: tuple[str, ...]
    """Class names; a label is an index of them."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image as it is stored, and its label.

        Raises:
            BadSample: this sample cannot be read or is damaged.
        """

    def where(self, index: int) -> str:
        """The place of the sample, for messages."""

    def shard(self, index: int) -> str:
        """The file with many samples, or the class folder, that the sample is in."""

    def name(self, index: int) -> str:
        """What the sample is called, without class and ending; not always unique."""

    def fingerprint(self) -> str:
        """SHA-256 of what tells this data from other data without reading the images: names, order, sizes."""


def local_path(path: str | Path) -> Path:
    """``path``, refused when it looks like a URL or like webdataset's ``pipe:``, which would run a shell."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", str(path)):
        raise DataError(f"data: {str(path)!r} is not a local folder; only local folders are read")
    return Path(path)


def read_classes(root: Path) -> tuple[str, ...]:
    """The class names in ``classes.txt``, one a line."""
    file = root / "classes.txt"
    if not file.is_file():
        raise DataError(f"{file} is missing: one class name a line, in the order of the labels")
    try:
        classes = tuple(file.read_text("utf-8").splitlines())
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8 text: expected one class name a line") from None
    if not classes or len(set(classes)) < len(classes) or not all(name.strip() for name in classes):
        raise DataError(f"{file}: expected one class name a line, none empty and none twice")
    return classes


def check_key(key: str) -> str:
    """``key``, if it can be a file's name, a tar member's name and a word of DALI's index."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,90}", key):
        raise ValueError(f"key {key!r}: expected 1 to 90 ASCII letters, digits, '_' and '-', no dot")
    return key


def safe_name(name: str) -> str:
    """``name`` with ``_`` for what :func:`check_key` refuses, and at most 80 characters of it."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:80] or "_"


def image_extension(data: bytes) -> str:
    """How a file of this encoded image is called: ``png`` or ``jpg``."""
    return "png" if data.startswith(b"\x89PNG") else "jpg"


def read_file(path: str | Path, where: str) -> bytes:
    """The bytes of a regular file.

    Raises:
        BadSample: it cannot be read; it is something else, or absurdly large.
    """
    try:
        # A pipe that is called .jpg must not block the reader.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadSample("unreadable", where, "not a regular file")
            check_size(status.st_size, where)
            return file.read()
    except OSError as error:
        raise BadSample("unreadable", where, error.strerror or str(error)) from None


def check_size(size: int, where: str) -> None:
    """Raise :class:`BadSample` for an image of absurd size."""
    if size > MAX_SAMPLE_BYTES:
        raise BadSample("too large", where, f"{size} bytes, the limit is {MAX_SAMPLE_BYTES}")


def refuse_existing(path: Path) -> None:
    """Raise :class:`DataError` if there is something at ``path``."""
    if path.exists():
        raise DataError(f"{path} is there already; write to an empty folder")


def digest(*parts: str | bytes | np.ndarray) -> str:
    """Hex SHA-256 of the parts and of where each ends."""
    total = hashlib.sha256()
    for part in parts:
        data = (
            part.encode("utf-8", "surrogateescape")
            if isinstance(part, str)
            else part.tobytes()
            if isinstance(part, np.ndarray)
            else part
        )
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


class Names:
    """Many short names in two buffers, which worker processes share; a Python object each would be copied."""

    def __init__(self, names: Iterable[bytes]) -> None:
        names = list(names)
        self.text = b"".join(names)
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)

    def __getitem__(self, index: int) -> bytes:
        return self.text[self.ends[index - 1] if index else 0 : self.ends[index]]
