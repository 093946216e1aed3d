"""What a few training steps cost: a trace, the operators that take most time, and on request where memory is held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from common.files import atomic_write

WAIT, WARMUP, ACTIVE = 3, 2, 5
_ROWS = 10


class Profiler:
    """Profiles steps 6 to 10 from where training starts, on the main process; does nothing where it is off.

    Writes ``profile/trace.json`` (for chrome://tracing or https://ui.perfetto.dev), ``profile/operators.txt`` and, with
    ``memory``, ``profile/memory.pickle`` (for https://docs.pytorch.org/memory_viz; on the CPU ``memory.txt``, the
    operators that allocate most) into the run's folder.
    """

    def __init__(self, folder: Path, device: torch.device, on: bool, memory: bool) -> None:
        self.folder, self.device, self.memory = folder / "profile", device, memory
        self.profile: profile | None = None
        self.steps, self.written = 0, False
        if not on:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self.profile = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
            profile_memory=memory,
        )
        if memory and device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        self.profile.start()

    def step(self) -> None:
        """A training step has ended."""
        if self.profile:
            self.steps += 1
            self.profile.step()

    def close(self) -> None:
        """Write what there is and end."""
        if self.profile:
            self.profile.stop()
            self.profile = None
            if not self.written:
                print(
                    f"profile: nothing is written, since training ended after {self.steps} steps of this start"
                )

    def _write(self, profiled: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.written = True
        profiled.export_chrome_trace(str(self.folder / "trace.json"))
        averages = profiled.key_averages()
        lines = [
            f"{'operator':<60} {'share':>7} {'ms a step':>10} {'calls a step':>12}",
            *self._rows(averages),
        ]
        text = "\n".join(lines) + "\n"
        self._text("operators.txt", text)
        if self.memory and self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        elif self.memory:
            self._text("memory.txt", averages.table(sort_by="self_cpu_memory_usage", row_limit=_ROWS))
        print(f"{text}written: {self.folder}", flush=True)

    def _rows(self, averages: Any) -> list[str]:
        gpu = self.device.type == "cuda"
        # Not what only frames others: the profiler's own steps.
        own = [
            (event.self_device_time_total if gpu else event.self_cpu_time_total, event)
            for event in averages
            if not event.key.startswith("ProfilerStep")
        ]
        total = sum(time for time, _ in own) or 1
        own.sort(key=lambda pair: -pair[0])
        steps = min(ACTIVE, self.steps - WAIT - WARMUP)
        return [
            f"{event.key[:60]:<60} {time / total:>7.1%} {time / 1000 / steps:>10.3f} {event.count / steps:>12.1f}"
            for time, event in own[:_ROWS]
        ]

    def _text(self, name: str, text: str) -> None:
        with atomic_write(self.folder / name) as file:
            file.write(text.encode())
