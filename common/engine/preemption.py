"""SIGTERM, SIGUSR1 and Ctrl-C as a request that all ranks see at the same step."""

from __future__ import annotations

import signal
import types
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

STOPPED = 75
"""Exit code of a run that was asked to stop and can be resumed (EX_TEMPFAIL: try again later)."""


class Request(IntEnum):
    """What a rank asks for; the largest of all ranks' requests counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2
    FAIL = 3  # a checkpoint was not written, of which each rank hears at another step


class Stopped(Exception):
    """The run was asked to stop, and has saved its state."""


class Requests:
    """Collects requests on this rank and agrees on them with the others.

    Signals reach ranks at different times, so that each rank acting by itself would leave the others waiting
    in a collective. Here every poll posts this rank's request to a sum that runs on the CPU in the background, and
    reads the one posted by the poll before: no rank waits for the device, and all act at the same poll.

    Args:
        timeout_minutes: the longest wait for another rank's poll; also at exit, where torch waits for what was posted.
    """

    def __init__(self, timeout_minutes: float = 10) -> None:
        self._wanted = Request.NOTHING
        limit = timedelta(minutes=timeout_minutes)
        self._group: Any = dist.new_group(backend="gloo", timeout=limit) if dist.is_initialized() else None
        self._posted: tuple[dist.Work, torch.Tensor] | None = None
        self._previous = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def ask(self, request: Request) -> None:
        """Make a request on this rank."""
        self._wanted = max(self._wanted, request)

    def poll(self) -> Request:
        """What the ranks agreed on at the poll before. All ranks call this, equally often."""
        if self._group is None:
            agreed, self._wanted = self._wanted, Request.NOTHING
            return agreed
        agreed = self._collect()
        wanted, self._wanted = torch.tensor(int(self._wanted)), Request.NOTHING
        work = dist.all_reduce(wanted, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None  # because it is asynchronous
        self._posted = (work, wanted)
        return agreed

    def close(self) -> None:
        """Give the signals back; what is still posted needs no answer."""
        self._posted = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _collect(self) -> Request:
        if self._posted is None:
            return Request.NOTHING
        work, agreed = self._posted
        work.wait()
        self._posted = None
        return Request(int(agreed))

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        if number == signal.SIGINT and self._wanted is Request.STOP:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self.ask(Request.STOP)


_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
