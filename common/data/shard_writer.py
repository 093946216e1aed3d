"""Writing WebDataset shards, as :mod:`common.data.shards` reads them: the same samples give the same bytes."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.data.shards import BLOCK, VERSION
from common.data.source import Sample, check_key, image_extension, refuse_existing
from common.files import Hashed, atomic_write

Parts = list[tuple[str, bytes]]
"""The files of a sample, sorted: extension and content."""
Group = tuple[str, Parts]
"""A sample: its key and its files."""


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
            previous, count = sample[0], count + 1
            size += group_size(image_parts(*sample[1:]))
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

    def groups() -> Iterator[Group]:
        for key, data, label in samples:
            if not 0 <= label < len(classes):
                raise ValueError(f"label {label} of {key!r}: expected 0 to {len(classes) - 1}")
            yield key, image_parts(data, label)

    return write_groups(path, groups())


def write_groups(path: Path, samples: Iterable[Group]) -> dict[str, Any]:
    """:func:`write_shard` of samples of any kind."""
    lines: list[str] = []
    with atomic_write(path.with_suffix(".idx")) as idx, atomic_write(path) as file, Hashed(file) as tar:
        for key, components in samples:
            check_key(key)
            lines.append(" ".join(_add(tar, f"{key}.{ext}", ext, part) for ext, part in components) + "\n")
        tar.write(bytes(2 * BLOCK))
        tar.write(bytes(-tar.size % tarfile.RECORDSIZE))
        idx.write(f"{VERSION} {len(lines)}\n{''.join(lines)}".encode())
    return tar.entry(path.name, len(lines))


def numbered_key(number: int, name: str) -> str:
    """A key that sorts by number and says what the sample was called; ``name`` as :func:`check_key` wants it."""
    return f"{number:08d}-{name}"


def image_parts(data: bytes, label: int) -> Parts:
    """The files of an encoded image and its label."""
    return [("cls", b"%d" % label), (image_extension(data), data)]


def group_size(parts: Parts) -> int:
    """Bytes that a sample takes in a shard, headers and padding included."""
    return sum(BLOCK + len(data) + -len(data) % BLOCK for _, data in parts)


def _add(tar: Hashed, name: str, ext: str, data: bytes) -> str:
    tar.write(_member_header(name, len(data)))
    offset = tar.size
    tar.write(data)
    tar.write(bytes(-len(data) % BLOCK))
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
