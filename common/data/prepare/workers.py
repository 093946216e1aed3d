"""A stream of tasks over processes, results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, Generic, TypeVar

from common.errors import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")

_AHEAD = 4
"""Tasks a worker that wait or are done: enough that none waits, few enough for the memory."""


_READERS = 4
"""Threads of one process: they wait for the disk most of the time."""


class Workers(Generic[Task, Result]):
    """Runs ``work(context, task)`` in ``number`` processes; a context manager.

    1 stays in this process: a few threads, so that waiting for the disk to read does not hold up writing. Processes
    end by themselves when this one is killed.
    """

    def __init__(self, number: int, work: Callable[[Any, Task], Result], context: Any) -> None:
        self._pool: Executor
        if number == 1:
            self._ahead = _READERS
            self._call: Callable[[Task], Result] = partial(work, context)
            self._pool = ThreadPoolExecutor(_READERS)
        else:
            self._ahead = number * _AHEAD
            self._call = _run
            # Not by fork: threads may run here, and the children would hold each other's pipes open.
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(number, spawn, _begin, (work, context, os.getpid()))

    def map(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """The tasks' results in order, while later ones are worked on.

        Raises:
            RunError: a worker died.
        """
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(self._call, task))
                if len(waiting) > self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RunError("a worker process was killed; out of memory? Try fewer --workers") from None

    def __enter__(self) -> Workers[Task, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


_job: list[Callable[[Any], Any]] = []


def _begin(work: Callable[[Any, Any], Any], context: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _job[:] = [partial(work, context)]
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(task: Any) -> Any:
    return _job[0](task)
