"""Throughput, the share of time spent waiting for data, and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Counts the time since the last log entry, and how much of it was spent waiting for data."""

    def __init__(self, device: torch.device, batch_size: int) -> None:
        self.device, self.batch_size = device, batch_size
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self.begun, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent here is waiting for data."""
        begun = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begun

    def rates(self) -> dict[str, float]:
        """Samples per second in all and in computing alone, the share of waiting, and peak memory (GiB).

        Meaningful only right after something that waited for the device.
        """
        elapsed, images = time.perf_counter() - self.begun, self.steps * self.batch_size
        return {
            "samples_per_s": images / elapsed,
            "compute_samples_per_s": images / max(elapsed - self.waited, 1e-9),
            "data_wait": self.waited / elapsed,
            "memory_gib": _peak_memory(self.device) / 2**30,
        }

    def seconds_per_step(self) -> float:
        """Mean duration of the interval's steps."""
        return (time.perf_counter() - self.begun) / max(self.steps, 1)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
