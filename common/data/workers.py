"""The processes that make batches: forked from a server of their own, and ended with the run."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import connection, forkserver, parent_process, resource_tracker
from multiprocessing.context import BaseContext

_ROOMS = ("common", "kernels", "image", "video", "cifar")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def start_server() -> BaseContext:
    """Start the process that the workers are forked from, unless it runs; returns at once.

    Forking the training process itself is not safe: a thread of torch or gloo may hold a lock at that moment, and
    the child waits for it for ever (CPython's own list of threads before 3.12: one evaluation in a thousand hung).
    The server has one thread. It imports what the training process has imported, so that a worker starts quickly.
    """
    context = multiprocessing.get_context("forkserver")
    modules = [name for name in sys.modules if name.partition(".")[0] in _ROOMS]
    context.set_forkserver_preload(modules)
    resource_tracker.ensure_running()  # else the server starts it, and that would unblock the signals
    # What asks a run to stop reaches all its processes; server and workers inherit that it is not for them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def end_with_parent(_: int) -> None:
    """Called first in a worker: it ends when the training process does, however that ends.

    torch's own watch looks at the process that forked the worker, the server, which lives as long as its workers.
    """
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@atexit.register
def _end_workers() -> None:
    """End what is left of the workers: Python would send them SIGTERM, which they block, and wait for ever."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
