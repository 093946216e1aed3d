"""Files and folders that exist whole or not at all; random reads that survive fork, pickle and threads."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import threading
import uuid
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

_OPEN_FILES = 64
_BLOCK = 1 << 20
_BLOCKS_WAITING = 8
_MAX_PIECES = 1000  # the system's limit of a gathered write is 1024
_SYNC_EVERY = 16 << 20


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that appears at ``path``, synced, when the block ends; removed if the block raises.

    What a killed process of this machine left behind is removed first.

    Raises:
        OSError: it cannot be written; it names ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f"{_temporary(path)}.tmp")
    try:
        _remove_leftovers(path)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name(error, path)
        raise
    sync(path.parent)


def append_line(path: str | Path, entry: Mapping[str, Any]) -> None:
    """Add an entry to a ``.jsonl`` file: by one write, so that lines of several processes do not mix.

    Raises:
        OSError: it cannot be written; it names ``path``.
    """
    line = json.dumps(entry).encode() + b"\n"
    try:
        with open(path, "ab+", buffering=0) as file:
            if file.seek(0, os.SEEK_END) and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                line = b"\n" + line  # apart from a line that a full disk has cut off
            while (
                line
            ):  # of a disk that is nearly full the first write takes a part, and the next one says why
                line = line[file.write(line) :]
    except OSError as error:
        _name(error, path)
        raise


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a ``.jsonl`` file, none if there is no file; lines that were cut off are left out."""
    path = Path(path)
    return entries(path.read_bytes()) if path.is_file() else []


def entries(lines: bytes) -> list[dict[str, Any]]:
    """The JSON objects in ``lines``, one a line; what is none is left out."""
    found = []
    for line in lines.splitlines():
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]


@contextmanager
def atomic_folder(path: str | Path, replace: bool = False, aside: Path | None = None) -> Iterator[Path]:
    """A new folder that becomes ``path``, synced, when the block ends; removed if the block raises.

    What a killed process of this machine left behind is removed first.

    Args:
        path: missing or an empty folder; missing parents are made.
        replace: a folder already at ``path`` is put aside, and removed once the new one is in its place.
        aside: where it is put, which a kill in just that moment leaves; by default a hidden place, and the next call
            removes it.

    Raises:
        FileExistsError: ``path`` is there when the block ends, and not empty.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    name = _temporary(path)
    partial, aside = path.with_name(f"{name}.partial"), aside or path.with_name(f"{name}.old")
    partial.mkdir()
    try:
        yield partial
        for folder, _, files in os.walk(partial):
            sync_all([folder, *(os.path.join(folder, name) for name in files)])
        if replace and path.exists():
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        try:
            partial.rename(path)
        except OSError as error:
            if path.exists():
                raise FileExistsError(error.errno, error.strerror, str(path)) from None
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if aside.exists() and not path.exists():
            aside.rename(path)
        raise
    sync(path.parent)
    if replace:
        shutil.rmtree(aside, ignore_errors=True)


def sync_all(paths: Iterable[str | Path]) -> None:
    """Wait until files or folders are on the disk.

    Together, so that the file system writes its journal for many at once: 60 times faster than one by one.
    """
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(sync, paths))


class Hashed:
    """Appends to a file and keeps the SHA-256 of what went through; a context manager.

    One thread hashes and writes while the caller makes the next block, another has the disk write meanwhile, so that
    the sync at the end finds little to do. What fails in a thread is raised by a later call.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        """Bytes so far."""
        self._file, self._total = file, hashlib.sha256()
        self._pieces: list[bytes] = []
        self._held = self._unsynced = 0
        self._writer, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._writes: deque[Future[None]] = deque()
        self._sync: Future[None] | None = None

    def write(self, data: bytes) -> None:
        """Append ``data``.

        Raises:
            OSError: what was appended before could not be written.
        """
        self._pieces.append(data)
        self.size += len(data)
        self._held += len(data)
        if self._held >= _BLOCK or len(self._pieces) >= _MAX_PIECES:
            self._pass_on()

    def entry(self, name: str, samples: int) -> dict[str, Any]:
        """What a manifest says about the file; behind the ``with`` block."""
        return {"name": name, "samples": samples, "bytes": self.size, "sha256": self._total.hexdigest()}

    def __enter__(self) -> Hashed:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._pass_on()
                while self._writes:
                    self._writes.popleft().result()
                if self._sync is not None:
                    self._sync.result()
        finally:
            self._writer.shutdown(cancel_futures=True)
            self._syncer.shutdown(cancel_futures=True)

    def _pass_on(self) -> None:
        self._writes.append(self._writer.submit(self._put, self._pieces, self._held))
        self._pieces, self._held = [], 0
        if len(self._writes) > _BLOCKS_WAITING:
            self._writes.popleft().result()

    def _put(self, pieces: list[bytes], size: int) -> None:
        for piece in pieces:
            self._total.update(piece)
        if (written := os.writev(self._file.fileno(), pieces)) < size:  # the disk is nearly full
            self._file.write(b"".join(pieces)[written:])
            self._file.flush()
        self._unsynced += size
        if self._unsynced < _SYNC_EVERY or not (self._sync is None or self._sync.done()):
            return
        if self._sync is not None:
            self._sync.result()
        self._unsynced = 0
        self._sync = self._syncer.submit(os.fdatasync, self._file.fileno())


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


class RandomReads:
    """Reads at any offset of many files: opened when first read, by each thread and process for itself."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = tuple(Path(path) for path in paths)
        self._opened = _Opened()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """At most ``size`` bytes of file ``number`` from ``offset``: fewer only where the file ends.

        Raises:
            OSError: the file cannot be opened or read.
        """
        descriptor = self._opened.get(self.paths[number])
        blocks = []
        while size > 0 and (block := os.pread(descriptor.number, size, offset)):
            blocks.append(block)
            offset += len(block)
            size -= len(block)
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.paths = state["paths"]
        self._opened = _Opened()


class _Descriptor:
    # Closed when the last reference goes, also at the end of a thread.
    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class _Opened(threading.local):
    # Of each thread its own, so that none closes a file under another's read.
    def __init__(self) -> None:
        self.descriptors: OrderedDict[Path, _Descriptor] = OrderedDict()

    def get(self, path: Path) -> _Descriptor:
        if path not in self.descriptors:
            self.descriptors[path] = _Descriptor(path)
            if len(self.descriptors) > _OPEN_FILES:
                self.descriptors.popitem(last=False)
        self.descriptors.move_to_end(path)
        return self.descriptors[path]


def _name(error: BaseException, path: str | Path) -> None:
    # The errors of a write do not say of which file.
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def _mark(path: Path) -> str:
    return f".{path.name}.{socket.gethostname()}-"


def _temporary(path: Path) -> str:
    return f"{_mark(path)}{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _remove_leftovers(path: Path) -> None:
    for entry in os.listdir(path.parent):
        found = re.fullmatch(rf"{re.escape(_mark(path))}(\d+)-[0-9a-f]{{8}}\.(tmp|partial|old)", entry)
        if found is None or _runs(int(found[1])):
            continue
        if found[2] == "tmp":
            (path.parent / entry).unlink(missing_ok=True)
        else:
            shutil.rmtree(path.parent / entry, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def sync(path: str | Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
