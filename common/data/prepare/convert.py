"""From a source in any form to a data set in any form."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from common.data.forms import forms_there, open_source
from common.data.prepare.encode import encode
from common.data.prepare.feed import Encode, Feed, Item, Progress, Unusable, read_batch
from common.data.prepare.job import Job, describe_changes, open_job
from common.data.prepare.settings import Settings
from common.data.prepare.workers import Workers
from common.data.recordio import join_indexes, write_part
from common.data.shard_writer import Group, Parts, group_size, image_parts, numbered_key, write_groups
from common.data.source import DataError, Source, image_extension, local_path, safe_name
from common.errors import RunError
from common.files import atomic_write, sync_all

_EMPTY_PART = "parts: {name} would have no sample that can be read; use fewer parts"
_WRITERS = 8
"""Threads that write class folders: they wait for the disk."""
UNIT_FILES = 1000
"""Class folders are finished so many files at a time."""


def _no_more(folder: Path, split: str) -> None:
    pass


@dataclass(frozen=True)
class Kind:
    """What a kind of samples is stored as.

    Args:
        encode: what is stored of a sample's bytes.
        parts: the files of a sample in a WebDataset shard, of the source, the index in it and the sample.
        finish: called with the folder and the split when all shards of the split are written.
    """

    encode: Encode
    parts: Callable[[Any, int, Item], Parts]
    finish: Callable[[Path, str], None] = _no_more


IMAGES = Kind(encode, lambda source, index, item: image_parts(item.data, item.label))


def find_splits(path: str | Path, names: Sequence[str] = (), format: str = "auto") -> dict[str, Source]:
    """Open splits of a data set: those that are named, or ``train`` and ``val`` as far as they are there.

    Raises:
        DataError: a split cannot be opened, none is there, or their classes differ.
    """
    root = local_path(path)
    there = [split for split in ("train", "val") if root.is_dir() and forms_there(root, split)]
    sources = {split: open_source(root, split, format) for split in names or there or ["train"]}
    if len({source.classes for source in sources.values()}) > 1:
        raise DataError(f"{path}: the splits {', '.join(sources)} have different classes")
    return sources


def convert(
    sources: Mapping[str, Source],
    out: str | Path,
    settings: Settings,
    max_unreadable: float = 0.01,
    workers: int = 1,
    progress: Progress | None = None,
    kind: Kind = IMAGES,
) -> bool:
    """Write a data set into the folder ``out``, which appears when all of it is written.

    The same samples and settings give the same bytes, whatever the number of workers. Samples that cannot be used
    are left out and listed in ``quarantine.jsonl``. A call that was killed is continued by the same call; shards
    that were finished are not touched again.

    Args:
        sources: the splits to write, all with the same classes.
        out: a missing or an empty folder.
        settings: the form and what is done to the samples.
        max_unreadable: the share of a split's samples that may be left out.
        workers: processes that read and encode; 1 does it in this one, in threads.
        progress: told now and then how far it is.
        kind: what is not an image can be written as ``webdataset``.

    Returns:
        False if ``out`` holds the same samples, written with the same settings, already.

    Raises:
        DataError: ``out`` holds something else or was begun otherwise, or these classes do not fit the form.
        RunError: the disk is full, too many samples are unusable, or a worker died.
    """
    out = local_path(out).resolve()
    classes = next(iter(sources.values())).classes
    _check_classes(classes, settings)
    identity = {
        "settings": settings.as_dict(),
        "sources": {split: source.fingerprint() for split, source in sources.items()},
    }
    if _is_finished(out, identity):
        return False
    with open_job(out, identity) as job:
        try:
            with Workers(workers, read_batch, (dict(sources), settings, kind.encode)) as pool:
                for split, source in sources.items():
                    feed = _feed(job, split, source, settings, max_unreadable, progress)
                    feed.start(pool)
                    _write_split(job, feed, settings, kind)
                    kind.finish(job.data, split)
                    _write_manifest(job, feed, settings, identity)
            _write_rest(job, classes)
            job.finish()
        except OSError as error:
            place = error.filename or job.folder
            raise RunError(
                f"{place}: {error.strerror or error}; what is finished is kept, the same command goes on from there"
            ) from None
    return True


def _is_finished(out: Path, identity: dict[str, Any]) -> bool:
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; expected a folder to make")
    if out == Path.cwd() or out.is_mount():
        raise DataError(f"{out} is the current folder or a mount point; name a folder to make inside it")
    if not out.exists() or not any(out.iterdir()):
        return False
    for split, fingerprint in identity["sources"].items():
        try:
            manifest = json.loads((out / f"{split}.json").read_bytes())
            there = {"settings": manifest["settings"], "source": manifest["source"]}
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{out} is there already and is not this data set; name another folder") from None
        wanted = {"settings": identity["settings"], "source": fingerprint}
        if there != wanted:
            changes = describe_changes(there, wanted)
            raise DataError(f"{out} is there already, made with {changes}; name another folder")
    return True


def _check_classes(classes: Sequence[str], settings: Settings) -> None:
    for name in classes:
        if not name.isprintable() or "/" in name or name.startswith(".") or not 0 < len(name.encode()) <= 200:
            raise DataError(
                f"class name {name!r}: expected up to 200 printable bytes, no '/', no '.' in front"
            )
    if settings.format == "folder" and list(classes) != sorted(classes):
        pair = next((a, b) for a, b in zip(classes, sorted(classes)) if a != b)
        raise DataError(
            f"class folders are numbered by the alphabet, these classes are not: {pair[1]!r} would take the number "
            f"of {pair[0]!r}; use another form"
        )


def _feed(
    job: Job,
    split: str,
    source: Source,
    settings: Settings,
    max_unreadable: float,
    progress: Progress | None,
) -> Feed:
    order = np.arange(len(source))
    if settings.shuffle is not None:
        order = np.random.default_rng(settings.shuffle).permutation(len(source))
    units = job.of(split)
    known = sum(len(unit["unusable"]) for unit in units)
    begin = units[-1]["next"] if units else 0
    return Feed(split, source, order, begin, max_unreadable * len(source), known, progress)


def _write_split(job: Job, feed: Feed, settings: Settings, kind: Kind) -> None:
    if settings.format == "recordio" and settings.parts > len(feed.order):
        raise DataError(f"parts: {settings.parts} parts of the {len(feed.order)} samples of {feed.split!r}")
    shards = partial(_write_shard, kind=kind)
    writers: dict[str, Callable[..., dict[str, Any]]]
    writers = {"folder": _write_files, "recordio": _write_part, "webdataset": shards}
    while feed.peek() is not None:
        shard = writers[settings.format](job, feed, settings, len(job.of(feed.split)))
        unusable = [sample._asdict() for sample in feed.take_unusable()]
        job.add({"split": feed.split, "next": feed.position, "unusable": unusable, "shard": shard})
    if settings.format == "recordio" and len(job.of(feed.split)) < settings.parts:
        raise DataError(_EMPTY_PART.format(name=f"{feed.split}_{settings.parts - 1}.rec"))


def _write_part(job: Job, feed: Feed, settings: Settings, number: int) -> dict[str, Any]:
    end = len(feed.order) * (number + 1) // settings.parts
    name = f"{feed.split}.rec" if settings.parts == 1 else f"{feed.split}_{number}.rec"

    def samples() -> Iterator[tuple[int, str, bytes, int]]:
        while (item := feed.peek()) is not None and item.position < end:
            feed.take()
            yield item.position, f"{classes[item.label]}/{safe_name(item.name)}", item.data, item.label

    classes = feed.source.classes
    first = feed.peek()
    if first is None or first.position >= end:
        raise DataError(_EMPTY_PART.format(name=name))
    return write_part(job.data / name, samples(), classes)


def _write_shard(job: Job, feed: Feed, settings: Settings, number: int, kind: Kind) -> dict[str, Any]:
    def fill() -> Iterator[Group]:
        samples = size = 0
        while (item := feed.peek()) is not None:
            if samples >= settings.shard_samples or size >= settings.shard_mb << 20:
                return
            feed.take()
            parts = kind.parts(feed.source, int(feed.order[item.position]), item)
            samples, size = samples + 1, size + group_size(parts)
            yield numbered_key(item.position, safe_name(item.name)), parts

    return write_groups(job.data / f"{feed.split}-{number:06d}.tar", fill())


def _write_files(job: Job, feed: Feed, settings: Settings, number: int) -> dict[str, Any]:
    root = job.data / feed.split
    if number == 0:
        for name in feed.source.classes:
            (root / name).mkdir(parents=True, exist_ok=True)
    writes: deque[Future[str]] = deque()
    lines: list[str] = []
    names: set[str] = set()
    with ThreadPoolExecutor(_WRITERS) as pool:
        while (item := feed.peek()) is not None and len(names) < UNIT_FILES:
            feed.take()
            name = _free_name(job.data, f"{feed.split}/{feed.source.classes[item.label]}", item, names)
            names.add(name)
            writes.append(pool.submit(_write_file, job.data, name, item.data))
            if len(writes) > 4 * _WRITERS:
                lines.append(writes.popleft().result())
        lines += [write.result() for write in writes]
    sync_all({(job.data / name).parent for name in names})
    name, text = f"{feed.split}-{number:06d}.sha256", "".join(lines).encode()
    with atomic_write(job.listing(name)) as file:
        file.write(text)
    return {"name": name, "samples": len(lines), "bytes": len(text), "sha256": sha256(text).hexdigest()}


def _free_name(root: Path, folder: str, item: Item, taken: set[str]) -> str:
    stem, ending = f"{folder}/{safe_name(item.name)}", image_extension(item.data)
    names = (f"{stem}{suffix}.{ending}" for suffix in chain([""], (f"_{n}" for n in count(2))))
    return next(name for name in names if name not in taken and not os.path.lexists(f"{root}/{name}"))


def _write_file(root: Path, name: str, image: bytes) -> str:
    """Write a file to the disk; returns its line as ``sha256sum`` writes it."""
    with open(f"{root}/{name}", "xb") as file:
        file.write(image)
        file.flush()
        os.fsync(file.fileno())
    return f"{sha256(image).hexdigest()}  {name}\n"


def _write_manifest(job: Job, feed: Feed, settings: Settings, identity: dict[str, Any]) -> None:
    units = job.of(feed.split)
    shards = [unit["shard"] for unit in units]
    manifest: dict[str, Any] = {
        "split": feed.split,
        "samples": sum(shard["samples"] for shard in shards),
        "unusable": sum(len(unit["unusable"]) for unit in units),
        "settings": identity["settings"],
        "source": identity["sources"][feed.split],
        "classes": list(feed.source.classes),
    }
    if settings.format == "folder":
        listing = b"".join(job.listing(shard["name"]).read_bytes() for shard in shards)
        with atomic_write(job.data / f"{feed.split}.sha256") as file:
            file.write(listing)
        manifest["checksums"] = sha256(listing).hexdigest()
    else:
        manifest["shards"] = shards
    if settings.format == "recordio" and settings.parts > 1:
        join_indexes([job.data / shard["name"] for shard in shards], job.data / f"{feed.split}.idx")
    with atomic_write(job.data / f"{feed.split}.json") as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")


def _write_rest(job: Job, classes: Sequence[str]) -> None:
    with atomic_write(job.data / "classes.txt") as file:
        file.write("".join(f"{name}\n" for name in classes).encode())
    unusable = [Unusable(**sample) for unit in job.units for sample in unit["unusable"]]
    if unusable:
        with atomic_write(job.data / "quarantine.jsonl") as file:
            file.write("".join(json.dumps(sample._asdict()) + "\n" for sample in unusable).encode())
    sync_all(folder for folder, _, _ in os.walk(job.data))
