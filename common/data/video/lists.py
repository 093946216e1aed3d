"""List files: a line a clip, ``video_path frame_num label``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data.source import DataError, Names, digest
from common.files import atomic_write

Clip = tuple[str, int, int]
"""Path, number of frames, label."""


@dataclass
class ClipList:
    """The clips of a list file.

    Args:
        path: the list.
        root: folder that its paths are relative to.
        frames, labels, lines: (n,) of each clip: number of frames, label, line in the list.
    """

    path: Path
    root: Path
    names: Names
    frames: np.ndarray
    labels: np.ndarray
    lines: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The clip's path as it stands in the list."""
        return self.names[index].decode("utf-8", "surrogateescape")

    def file(self, index: int) -> Path | bytes:
        """The clip's file, or folder of frames; or what is in the file."""
        return self.root / self.name(index)

    def where(self, index: int) -> str:
        """List, line and path, for messages."""
        return f"{self.path}:{self.lines[index]} {self.name(index)}"

    def shard(self, index: int) -> str:
        """The list."""
        return self.path.name

    def fingerprint(self) -> str:
        """SHA-256 of the names, lengths and labels, in order."""
        return digest("clips", self.names.text, self.names.ends, self.frames, self.labels)


def read_list(path: Path, root: Path, num_classes: int | None = None) -> ClipList:
    """Read a list file. A path may hold spaces; blank lines are no clips.

    Args:
        num_classes: labels must be below it.

    Raises:
        DataError: the file is missing or empty, or a line is wrong: one line with file and line number.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; expected a list, a line a clip: path frames label"
        ) from None
    rows = [
        (_parse(line, f"{path}:{number}", num_classes), number)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not rows:
        raise DataError(f"{path}: holds no clips; expected a line a clip: path frames label")
    clips, numbers = zip(*rows)
    names, frames, labels = zip(*clips)
    encoded = Names(name.encode("utf-8", "surrogateescape") for name in names)
    return ClipList(path, root, encoded, *(np.array(part, np.int64) for part in (frames, labels, numbers)))


def write_list(path: Path, clips: Iterable[Clip]) -> None:
    """Write a list file, which appears when all of it is written.

    Raises:
        DataError: a path that a list cannot hold.
    """
    with atomic_write(path) as file:
        for name, frames, label in clips:
            if "\n" in name or "\r" in name or name != name.strip():
                raise DataError(f"{name!r}: a list cannot hold a path with a line break or an outer space")
            file.write(f"{name} {frames} {label}\n".encode("utf-8", "surrogateescape"))


def write_classes(folder: Path, classes: Iterable[str]) -> None:
    """Write ``classes.txt``: a name a line, in the order of the labels."""
    with atomic_write(folder / "classes.txt") as file:
        file.write("".join(f"{name}\n" for name in classes).encode())


def _parse(line: bytes, where: str, num_classes: int | None) -> Clip:
    # As bytes: of text, Python splits at white space of other scripts and at control characters too.
    words = [word.decode("utf-8", "surrogateescape") for word in line.rsplit(maxsplit=2)]
    if len(words) != 3:
        raise DataError(f"{where}: {line.strip()[:80]!r}: expected path, number of frames and label")
    name, frames, label = words
    if "\0" in name:
        raise DataError(f"{where}: {name[:80]!r}: a path cannot hold a zero byte")
    count, number = _integer(frames), _integer(label)
    if count is None or count < 1:
        raise DataError(f"{where}: number of frames {frames!r}: expected a whole number, 1 or more")
    if number is None or number < 0:
        raise DataError(f"{where}: label {label!r}: expected a whole number, 0 or more")
    if num_classes is not None and number >= num_classes:
        raise DataError(
            f"{where}: label {number}: there are {num_classes} classes, so at most {num_classes - 1}"
        )
    return name, count, number


def _integer(word: str) -> int | None:
    return int(word) if re.fullmatch("-?[0-9]{1,9}", word) else None
