"""Samples that cannot be read: counted, named in quarantine.jsonl, and too many of them stop the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.data.loader import Unreadable
from common.errors import RunError

_NAMED = 10
"""Files that a line names."""


def count(samples: Iterable[Mapping[str, Any]]) -> tuple[Counter[str], Counter[str]]:
    """Entries of a quarantine.jsonl, each once, counted by reason and by the file or class folder they are in."""
    once = {(sample.get("shard"), sample.get("where")): sample for sample in samples}.values()
    reasons = Counter(sample.get("reason", "?") for sample in once)
    return reasons, Counter(sample.get("shard") or "?" for sample in once)


def describe(path: Path) -> str:
    """What the quarantine.jsonl at ``path`` lists, in a line: how many of which kind, in which files; empty if none."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    reasons, shards = count(json.loads(line) for line in lines if line.endswith(b"}"))
    kinds = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    return (
        f"unreadable samples: {reasons.total()} ({kinds}); {in_files(shards)}; see {path}" if reasons else ""
    )


def in_files(shards: Mapping[str, int]) -> str:
    """How many samples are in which files, those with most of them by name."""
    files = ", ".join(f"{number} in {shard}" for shard, number in Counter(shards).most_common(_NAMED))
    return files + (f" and {len(shards) - _NAMED} other files" if len(shards) > _NAMED else "")


class Quarantine:
    """The list of a run's unreadable samples, each once.

    Args:
        path: the ``quarantine.jsonl`` to continue.
        limit: unreadable training samples, seen by this process, above which the run stops.
    """

    def __init__(self, path: Path, limit: float) -> None:
        self.path, self.limit = path, limit
        lines = path.read_bytes().splitlines() if path.is_file() else []
        self.known = {Unreadable(**json.loads(line)) for line in lines if line.endswith(b"}")}
        self.training: set[Unreadable] = set()

    def add(self, samples: Iterable[Unreadable], training: bool) -> None:
        """Note samples.

        Raises:
            RunError: more training samples than the limit are unreadable.
        """
        for sample in samples:
            if sample not in self.known:
                self.known.add(sample)
                with self.path.open("ab", buffering=0) as file:  # one write: processes' lines do not mix
                    file.write(json.dumps(sample._asdict()).encode() + b"\n")
            if training:
                self.training.add(sample)
        if len(self.training) > self.limit:
            last = f"{sample.where} ({sample.reason}: {sample.detail})"
            raise RunError(
                f"{len(self.training)} unreadable training samples, more than data.max_unreadable allows; "
                f"the last: {last}; {describe(self.path)}"
            )
