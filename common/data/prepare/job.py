"""A data set that is being written: killed at any moment, it goes on behind the last finished shard."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.data.source import DataError
from common.files import atomic_write, sha256, sync_all

Unit = dict[str, Any]
"""What is written in one go, once: ``split``, ``next`` (position behind it), ``unusable``, and ``shard``, its entry in
the manifest."""


class Job:
    """Everything is written into ``folder / "data"``, which becomes ``out`` by one rename.

    ``progress.jsonl`` beside it has a line a finished unit, written when the unit is on the disk.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        """Raises :class:`DataError`: begun with other settings, damaged, or another process is at it."""
        self.out, self.folder = out, out.with_name(f".{out.name}.partial")
        self.data = self.folder / "data"
        self.data.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "wb")  # noqa: SIM115  (held until the process ends)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_identity(identity)
            self.units = self._finished_units()
            self._remove_unfinished()
        except BlockingIOError:
            self._lock.close()
            raise DataError(f"{out}: another process is writing it") from None
        except BaseException:
            self._lock.close()
            raise

    def add(self, unit: Unit) -> None:
        """Note a unit that is on the disk."""
        with open(self.folder / "progress.jsonl", "ab") as file:
            file.write(json.dumps(unit).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.units.append(unit)

    def of(self, split: str) -> list[Unit]:
        """The finished units of a split, in order."""
        return [unit for unit in self.units if unit["split"] == split]

    def listing(self, name: str) -> Path:
        """Where the checksums of a unit of class folders are kept until all are joined."""
        return self.folder / name

    def finish(self) -> None:
        """Make it ``out``.

        Raises:
            FileExistsError: something is there by now.
        """
        sync_all([self.data])
        self.data.rename(self.out)
        sync_all([self.out.parent])
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_identity(self, identity: dict[str, Any]) -> None:
        path = self.folder / "settings.json"
        if not path.exists():
            with atomic_write(path) as file:
                file.write(json.dumps(identity, indent=1).encode() + b"\n")
            return
        try:
            begun = json.loads(path.read_bytes())
        except ValueError:
            raise DataError(f"{path} is damaged; remove {self.folder} to begin again") from None
        if begun != identity:
            changes = describe_changes(begun, identity)
            raise DataError(
                f"{self.out} was begun with {changes}; go on with the same, or remove {self.folder}"
            )

    def _finished_units(self) -> list[Unit]:
        path = self.folder / "progress.jsonl"
        if not path.exists():
            return []
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):  # killed, or the disk was full, while it was written
            os.truncate(path, len(whole))
        try:
            units: list[Unit] = [json.loads(line) for line in whole.splitlines()]
            damaged = next((unit["shard"]["name"] for unit in units if not self._is_whole(unit)), None)
        except (ValueError, KeyError, TypeError):
            damaged = path.name
        if damaged:
            raise DataError(
                f"{self.folder}: {damaged} is missing or damaged; remove the folder to begin again"
            )
        return units

    def _is_whole(self, unit: Unit) -> bool:
        shard = unit["shard"]
        if shard["name"].endswith(".sha256"):
            path = self.listing(shard["name"])
            return path.is_file() and sha256(path) == shard["sha256"]
        path = self.data / shard["name"]
        return path.is_file() and path.stat().st_size == shard["bytes"]

    def _remove_unfinished(self) -> None:
        keep: set[str] = set()
        for unit in self.units:
            name = unit["shard"]["name"]
            if name.endswith(".sha256"):
                keep |= {line[66:] for line in self.listing(name).read_text().splitlines()}
            else:
                keep |= {str(Path(name).with_suffix(suffix)) for suffix in (".rec", ".lst", ".idx", ".tar")}
        for folder, _, names in os.walk(self.data):
            for name in names:
                path = Path(folder, name)
                if str(path.relative_to(self.data)) not in keep:
                    path.unlink()


@contextmanager
def open_job(out: Path, identity: dict[str, Any]) -> Iterator[Job]:
    """A :class:`Job`, whose lock is let go at the end."""
    job = Job(out, identity)
    try:
        yield job
    finally:
        job._lock.close()


def describe_changes(old: Any, new: Any, name: str = "") -> str:
    """What differs between two settings, for a message: ``resize 480, not 256``."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{name} {old}, not {new}"
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(
        "another source"
        if key in ("source", "sources")
        else describe_changes(old.get(key), new.get(key), key)
        for key in keys
    )
