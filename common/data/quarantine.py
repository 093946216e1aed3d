"""Samples that cannot be read: counted, named in quarantine.jsonl, and too many of them stop the run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from common.data.loader import Unreadable
from common.errors import RunError


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
                f"the last: {last}; all are listed in {self.path}"
            )
