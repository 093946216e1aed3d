"""Samples that cannot be read: counted, named in quarantine.jsonl, and too many of them stop the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.data.loader import Unreadable
from common.errors import RunError
from common.files import append_line, entries, read_lines

_NAMED = 10
"""Files that a line names."""


def count(samples: Iterable[Mapping[str, Any]]) -> tuple[Counter[str], Counter[str]]:
    """Entries of a quarantine.jsonl, each once, counted by reason and by the file or class folder they are in."""
    once = {(sample.get("shard"), sample.get("where")): sample for sample in samples}.values()
    reasons = Counter(sample.get("reason", "?") for sample in once)
    return reasons, Counter(sample.get("shard") or "?" for sample in once)


def describe(path: Path) -> str:
    """What the quarantine.jsonl at ``path`` lists, in a line: how many of which kind, in which files; empty if none."""
    reasons, shards = count(read_lines(path))
    kinds = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    return (
        f"unreadable samples: {reasons.total()} ({kinds}); {in_files(shards)}; see {path}" if reasons else ""
    )


def in_files(shards: Mapping[str, int]) -> str:
    """How many samples are in which files, those with most of them by name."""
    files = ", ".join(f"{number} in {shard}" for shard, number in Counter(shards).most_common(_NAMED))
    return files + (f" and {len(shards) - _NAMED} other files" if len(shards) > _NAMED else "")


class Quarantine:
    """The list of a run's unreadable samples, each once: of all its processes and starts.

    Args:
        path: the ``quarantine.jsonl`` to continue, which all processes see.
        limit: unreadable training samples in the list above which the run stops.
    """

    def __init__(self, path: Path, limit: float) -> None:
        self.path, self.limit = path, limit
        self.known: set[tuple[str, str]] = set()
        self.training: set[tuple[str, str]] = set()
        self._read = 0
        self._hear()

    def add(self, samples: Iterable[Unreadable], training: bool) -> None:
        """Note samples.

        Raises:
            RunError: more training samples than the limit are unreadable.
        """
        last = ""
        for sample in samples:
            if (sample.shard, sample.where) not in self.known:
                self._hear()
            if (sample.shard, sample.where) not in self.known:
                append_line(self.path, sample._asdict() | {"training": training})
                self._hear()
            last = f"{sample.where} ({sample.reason}: {sample.detail})"
        if training and last and len(self.training) > self.limit:
            raise RunError(
                f"{len(self.training)} unreadable training samples, more than data.max_unreadable allows; "
                f"the last: {last}; {describe(self.path)}"
            )

    def _hear(self) -> None:
        """Take in what all processes have listed since."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            lines = file.read()
        self._read += lines.rfind(b"\n") + 1
        for entry in entries(lines):
            sample = (entry.get("shard", ""), entry.get("where", ""))
            self.known.add(sample)
            if entry.get("training"):
                self.training.add(sample)
