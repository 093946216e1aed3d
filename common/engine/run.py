"""A run's folder: what it is, how it was started, and that only one process trains in it.

config.yaml      the resolved configuration
starts.jsonl     a line a start: command, git revision, versions, devices
metrics.jsonl    a line a log entry and an evaluation
quarantine.jsonl samples that could not be read
checkpoints/     see common.engine.checkpoint
tensorboard/     event files
evaluation.json  the last evaluation, with the confusion matrix
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import IO, Any

import yaml

from common.environment import environment
from common.errors import UserError
from common.files import atomic_write


class Run:
    """The folder of one run. Only the main process writes."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    def open(self, config: dict[str, Any], world: int, device: str) -> None:
        """Create the folder, lock it, and record the configuration and this start.

        Raises:
            UserError: another process trains in this folder, or it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"out = {str(self.folder)!r}: another process is training in this folder"
            ) from None
        except OSError as error:
            raise UserError(f"out = {str(self.folder)!r}: cannot be made ({error.strerror})") from None
        with atomic_write(self.folder / "config.yaml") as file:
            file.write(yaml.safe_dump(config, sort_keys=False).encode())
        self.append("starts.jsonl", {"world": world, "device": device} | environment())

    def append(self, name: str, entry: dict[str, Any]) -> None:
        """Add a line to a ``.jsonl`` file; one write, so that lines of several processes do not mix."""
        with (self.folder / name).open("ab", buffering=0) as file:
            file.write(json.dumps(entry).encode() + b"\n")

    def rewind(self, step: int) -> None:
        """Drop the metrics after ``step``, which a resumed run will write again."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return
        lines = [
            line
            for line in path.read_bytes().splitlines()
            if _is_entry(line) and json.loads(line)["step"] <= step
        ]
        with atomic_write(path) as file:
            file.writelines(line + b"\n" for line in lines)


def run_of(path: str | Path) -> Path | None:
    """The run's folder that ``path`` is, or that the checkpoint ``path`` lies in; None for anything else."""
    path = Path(path)
    candidates = [path, *path.absolute().parents[:2]]
    return next((folder for folder in candidates if (folder / "config.yaml").is_file()), None)


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write a JSON file at once; returns its path."""
    with atomic_write(path) as file:
        file.write(json.dumps(content).encode())
    return path


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run's metrics.jsonl, in order; a last line cut off by a kill is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if _is_entry(line)]


def _is_entry(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
