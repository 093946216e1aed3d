"""Real training and evaluation processes on the moving digits, small enough for seconds."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from tests.processes import last_step, run, start

SMALL = {
    "model.name": "c2d_resnet50_bat3d",
    "model.args": json.dumps({"layers": [1] * 4, "channels": [8] * 4, "bat_size": 2, "nonlocal_mod": 1}),
    "clip.seq_length": 4,
    "clip.sample_rate": 5,
    "clip.size": 32,
    "clip.short_side": 32,
    "clip.num_segments": 2,
    "train.epochs": 2,
    "train.batch_size": 8,
    "optim.lr": 0.01,
    "schedule.warmup_epochs": 0,
    "log.every": 1,
    "data.workers": 1,
}


def settings(folder: Path, data: Path, **options: object) -> dict[str, object]:
    """The small settings with ``options`` (dots as two underscores) over them."""
    return {"out": folder, "data.path": data} | SMALL | {k.replace("__", "."): v for k, v in options.items()}


def train(folder: Path, data: Path, processes: int = 1, **options: object) -> subprocess.CompletedProcess:
    """Train to the end; fails the test if training does."""
    done = run("video/train.py", processes=processes, **settings(folder, data, **options))
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def interrupt(folder: Path, data: Path, step: int, number: int, **options: object) -> int:
    """Train until ``step`` is logged, then send a signal; returns the exit code."""
    process = start("video/train.py", **settings(folder, data, **options))
    deadline = time.monotonic() + 240
    while last_step(folder) < step:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate(timeout=120)
    return process.returncode
