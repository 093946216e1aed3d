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

import errno
import fcntl
import json
import sys
from pathlib import Path
from typing import IO, Any

import yaml

from common.environment import environment
from common.errors import UserError
from common.files import append_line, atomic_write, read_lines

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # such as Lustre mounted without flock


class Run:
    """The folder of one run. Only the main process writes."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    def lock(self) -> None:
        """Create the folder and lock it, as long as this process lives.

        Raises:
            UserError: another process trains in this folder, or it cannot be made or written.
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
            if error.errno not in _NO_LOCKS:
                raise UserError(f"out = {str(self.folder)!r}: cannot be written ({error.strerror})") from None
            print(
                f"warning: the file system of {self.folder} has no locks ({error.strerror}): see to it yourself that "
                "only one run writes there",
                file=sys.stderr,
            )

    def record(self, config: dict[str, Any], world: int, device: str) -> None:
        """Write the configuration and a line about this start."""
        with atomic_write(self.folder / "config.yaml") as file:
            file.write(yaml.safe_dump(config, sort_keys=False).encode())
        append_line(self.folder / "starts.jsonl", {"world": world, "device": device} | environment())

    @property
    def metrics(self) -> Path:
        """The file of log entries and evaluations."""
        return self.folder / "metrics.jsonl"

    def rewind(self, step: int, evaluated_step: int) -> None:
        """Drop the metrics after ``step``, and the evaluations after ``evaluated_step``: they will be written again."""
        if not self.metrics.is_file():
            return
        last = {"train": step, "val": evaluated_step}
        with atomic_write(self.metrics) as file:
            for entry in read_metrics(self.folder):
                if entry["step"] <= last[entry["split"]]:
                    file.write(json.dumps(entry).encode() + b"\n")


def run_of(path: str | Path) -> Path | None:
    """The run's folder that ``path`` is, or that the checkpoint ``path`` lies in; None for anything else."""
    path = Path(path)
    whole = path.absolute()
    candidates = [
        path,
        *(above.parent for above in (whole, *whole.parents[:2]) if above.name == "checkpoints"),
    ]
    return next((folder for folder in candidates if (folder / "config.yaml").is_file()), None)


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write a JSON file at once; returns its path."""
    with atomic_write(path) as file:
        file.write(json.dumps(content).encode())
    return path


def read_file(path: Path) -> dict[str, Any]:
    """A run's config.yaml or evaluation.json.

    Raises:
        UserError: it is damaged.
    """
    try:
        content = (json.loads if path.suffix == ".json" else yaml.safe_load)(path.read_bytes())
    except (ValueError, RecursionError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged, and not what a training writes")
    return content


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run's metrics.jsonl, in order; a line cut off by a kill or a full disk is left out."""
    return [entry for entry in read_lines(folder / "metrics.jsonl") if entry.get("split") in ("train", "val")]
