"""Checkpoints written at once, or in the background while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from common.engine import checkpoint
from common.engine.checkpoint import CheckpointConfig
from common.engine.parts import Part
from common.engine.ranks import Ranks


class Writer:
    """Writes a run's checkpoints, one at a time, and removes old ones.

    In the background it writes a copy in the host's memory. What goes wrong there is raised by the next :meth:`save` or
    :meth:`wait`. All ranks have a writer and call both.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, ranks: Ranks | None = None, log: Path | None = None
    ) -> None:
        self._folder, self._keep, self._ranks, self._log = folder, config.keep, ranks or Ranks(), log
        self._thread = ThreadPoolExecutor(1, "checkpoint") if config.asynchronous else None
        self._pending: Future[None] | None = None

    def save(self, step: int, content: Mapping[str, Any], best_step: int | None) -> None:
        """Write the checkpoint of ``step``, after the one before it; see :func:`common.engine.checkpoint.save`."""
        self.wait()
        if self._thread is None:
            self._write(step, content, best_step)
        else:
            self._pending = self._thread.submit(self._write, step, _on_host(content), best_step)

    @property
    def failed(self) -> bool:
        """Whether a write has ended, and failed. Ranks see it at different moments."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            CheckpointError: on all ranks, if the write failed on one.
            RuntimeError: a rank has died, or hangs.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread, once it has written."""
        if self._thread is not None:
            self._thread.shutdown()

    def _write(self, step: int, content: Mapping[str, Any], best_step: int | None) -> None:
        path = checkpoint.save(self._folder, step, content, self._ranks, self._log)
        if self._ranks.rank == 0:
            checkpoint.prune(self._folder, path, self._keep, best_step)


def _on_host(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _on_host(item) for key, item in value.items()}
    if isinstance(value, Part):
        return replace(value, data=_on_host(value.data))
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
