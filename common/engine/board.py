"""TensorBoard's event files, written at once: its own writer's thread prints a traceback when a disk is full."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]


class Board:
    """A new event file in ``folder``, which is made; of earlier files TensorBoard hides the steps from ``first`` on."""

    def __init__(self, folder: Path, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(self.path.open("ab"))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, when: float, values: dict[str, float]) -> None:
        """Add the scalars ``values`` by tag; ``when`` in seconds since 1970.

        Raises:
            OSError: they cannot be written; it names the file.
        """
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(wall_time=when, step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # which has been raised
            self._records.close()

    def _write(self, event: Event) -> None:
        try:
            self._records.write(event.SerializeToString())
            self._records.flush()
        except OSError as error:
            error.filename = str(self.path)
            raise
