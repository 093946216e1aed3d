"""Shards on a server: fetched whole when first read, into a folder of this machine that is bounded in size.

All processes of a machine share the folder. A shard is written under another name, compared with the manifest's size
and checksum, and renamed. Those that were not read for longest make room for it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, urlsplit

from common.data.shards import ShardSource, read_manifest
from common.data.source import Cache, DataError, digest
from common.errors import ConfigError, UserError
from common.files import RandomReads, atomic_write

ATTEMPTS = 6
BACKOFF = 0.5
"""Seconds before the second attempt; twice as long before each further one."""
_TIMEOUT = 60
_BLOCK = 1 << 20
_MAX_SMALL = 1 << 30
_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP's answers that may be others a moment later."""
_UNTRUSTED = "its certificate is not trusted; SSL_CERT_FILE can name a file of authorities to trust"
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
T = TypeVar("T")


def open_remote(url: str, split: str, cache: Cache) -> ShardSource:
    """A split of the shards in the folder ``url``, as ``image/prepare.py webdataset`` made them.

    Raises:
        DataError: manifest or indexes cannot be fetched, or do not fit together.
        ConfigError: a package is missing, a shard is larger than the cache, or the address is not a folder's.
    """
    url, parts = url.rstrip("/"), urlsplit(url)
    if not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError("data.path: expected scheme://host/folder, without user, password and query")
    content = _fetch_small(f"{url}/{split}.json", _is_json)
    # The name says which manifest: data that change on the server get a new folder.
    root = cache.path / f"{split}-{digest(url, content)[:24]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _put(root / f"{split}.json", content)
        manifest = read_manifest(root, split)
        assert manifest
        _put(root / "classes.txt", "".join(f"{name}\n" for name in manifest["classes"]).encode())
        entries = {entry["name"]: (entry["bytes"], entry["sha256"]) for entry in manifest["shards"]}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(partial(_fetch_index, url, root), manifest["shards"]))
    except OSError as error:
        raise DataError(f"data.cache: {error.filename or root}: {error.strerror or error}") from None
    _check_room(url, [size for size, _ in entries.values()], cache)
    return ShardSource(root, split, partial(RemoteReads, url, entries, cache))


class RemoteReads(RandomReads):
    """Random reads of files, each of which is fetched when it is read and not there.

    Args:
        url: the folder on the server.
        entries: size and SHA-256 of each file, by name.
        cache: what bounds them.
        paths: where the files are kept, in a folder of their own within the cache.
    """

    def __init__(
        self, url: str, entries: dict[str, tuple[int, str]], cache: Cache, paths: Sequence[str | Path]
    ) -> None:
        self.paths = tuple(Path(path) for path in paths)
        self.url, self.entries, self.cache = url, entries, cache

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """At most ``size`` bytes of file ``number`` from ``offset``: fewer only where the file ends.

        Raises:
            DataError: the file cannot be fetched.
        """
        descriptor = self._open(self.paths[number])
        try:
            if time.time() - os.fstat(descriptor).st_mtime > 1:
                with suppress(OSError):  # another user's
                    os.utime(descriptor)  # its time says when it was read last
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)  # kept open, a file that is removed would go on taking room

    def _open(self, path: Path) -> int:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            pass
        with _locked(_lock_of(path)):
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # another process has fetched it meanwhile
            except FileNotFoundError:
                return self._fetch(path)

    def _fetch(self, path: Path) -> int:
        part = _part_of(path)
        size, checksum = self.entries[path.name]
        try:
            with open(part, "wb") as file:
                self._reserve(file, size)
                url = f"{self.url}/{quote(path.name)}"
                _retry(url, partial(_download, url, file, size, checksum))
                os.fsync(file.fileno())
            descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
            os.replace(part, path)
            return descriptor
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Give the empty file its size, when there is room; what others are fetching now is waited for."""
        while True:
            with _locked(self.cache.path / ".lock"):
                if _make_room(self.cache, size):
                    os.truncate(file.fileno(), size)
                    return
            time.sleep(0.1)


def _make_room(cache: Cache, needed: int) -> bool:
    # A shard that others finish meanwhile changes its name: first those that are fetched, then the whole ones, and of
    # each the file by whichever name it has now.
    parts = [_whole_of(path) for path in cache.path.glob("*/.*.part")]
    shards = {*parts, *cache.path.glob("*/*.tar")}
    files = sorted(
        (status.st_mtime_ns, status.st_size, path)
        for path in shards
        if (status := _status(_part_of(path)) or _status(path))
    )
    excess = sum(size for _, size, _ in files) + needed - cache.bytes
    for _, size, path in files:
        if excess <= 0:
            break
        with _locked(_lock_of(path), wait=False) as free:
            if free:  # else it is being fetched
                path.unlink(missing_ok=True)
                _part_of(path).unlink(missing_ok=True)  # a killed process's
                excess -= size
    return excess <= 0


def _check_room(url: str, sizes: list[int], cache: Cache) -> None:
    if max(sizes) > cache.bytes:
        raise ConfigError(
            f"data.cache_gb = {cache.gigabytes:g}: {url} has a shard of {max(sizes) / 1e9:.3g} GB; expected more"
        )
    if sum(sizes) > cache.bytes and os.environ.get("RANK", "0") == "0":
        print(
            f"warning: data.cache_gb = {cache.gigabytes:g}: the shards of {url} have {sum(sizes) / 1e9:.3g} GB; "
            f"training, which reads them in random order, will fetch them again and again",
            file=sys.stderr,
        )


def _fetch_index(url: str, root: Path, entry: dict[str, Any]) -> None:
    path, lines = (root / entry["name"]).with_suffix(".idx"), entry["samples"] + 1

    def is_whole(content: bytes) -> bool:
        return content.count(b"\n") == lines and content.endswith(b"\n")

    if not path.exists():
        _put(path, _fetch_small(f"{url}/{quote(path.name)}", is_whole))


def _fetch_small(url: str, is_whole: Callable[[bytes], bool]) -> bytes:
    def attempt() -> bytes:
        content = b"".join(_blocks(url, _MAX_SMALL))
        if not is_whole(content):
            raise OSError(f"the {len(content)} bytes that came are not a whole file")
        return content

    return _retry(url, attempt)


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _download(url: str, file: BinaryIO, size: int, checksum: str) -> None:
    file.seek(0)
    total, count = hashlib.sha256(), 0
    for block in _blocks(url, size):
        file.write(block)
        total.update(block)
        count += len(block)
    file.flush()
    if (count, total.hexdigest()) != (size, checksum):
        raise OSError(f"{count} bytes came that are not the manifest's {size}")


def _blocks(url: str, limit: int) -> Iterator[bytes]:
    """The content, whole; raises if it is cut off or longer than ``limit``."""
    with _s3(url) if url.lower().startswith("s3:") else _http().open(url, timeout=_TIMEOUT) as answer:
        length = None if not hasattr(answer, "headers") else answer.headers.get("Content-Length")
        count = 0
        while block := answer.read(_BLOCK):
            count += len(block)
            if count > limit:
                raise OSError(f"more than the {limit} bytes expected")
            yield block
    if length is not None and count != int(length):
        raise OSError(f"cut off after {count} of {length} bytes")


def _http() -> urllib.request.OpenerDirector:
    # urllib's own opens files and FTP too.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _s3(url: str) -> Any:
    try:
        import fsspec

        return fsspec.open(url, "rb")
    except ImportError as error:
        raise ConfigError(f"data.path = {url!r}: {error}: pip install fsspec s3fs") from None


def _retry(url: str, attempt: Callable[[], T]) -> T:
    problem = ""
    for number in range(ATTEMPTS):
        if number:
            time.sleep(BACKOFF * 2 ** (number - 1) * (1 + os.getpid() % 16 / 16))  # processes not all at once
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            problem, lasting = f"HTTP {error.code} {error.reason}", error.code not in _PASSING
        except UserError:
            raise
        except Exception as error:  # what s3fs is made of has errors of its own
            problem = f"{type(error).__name__}: {error}"
            lasting = isinstance(error, (FileNotFoundError, PermissionError))  # s3fs gives them no errno
            lasting |= getattr(error, "errno", None) in _LASTING
            cause = getattr(error, "reason", None)
            if isinstance(cause, ssl.SSLCertVerificationError):
                problem, lasting = f"{_UNTRUSTED} ({cause.verify_message})", True
        if lasting:
            raise DataError(f"{url}: {problem}")
    raise DataError(f"{url}: {problem}; tried {ATTEMPTS} times")


def _put(path: Path, content: bytes) -> None:
    if not path.exists():
        with atomic_write(path) as file:
            file.write(content)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _whole_of(part: Path) -> Path:
    return part.with_name(part.name.removeprefix(".").removesuffix(".part"))


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that other processes and threads respect; without ``wait`` perhaps not, then it gives False."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    held = True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(descriptor)
