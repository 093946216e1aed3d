"""Real training processes for the tests, on the embedded digits, small enough for seconds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Small, but with all that must survive a kill: dropout, batch norm, momentum, EMA, mixup, random augmentation.
SMALL = {
    "model.name": "resnet18_bat",
    "model.args": json.dumps(
        {
            "layers": [1] * 4,
            "channels": [8, 8, 16, 16],
            "bat_size": 2,
            "nl_mod": [1, 1, 1000],
            "drop_rate": 0.2,
        }
    ),
    "augment.size": 32,
    "augment.auto": "rand-m5-mstd0.5",
    "mixup.mixup": 0.2,
    "train.epochs": 2,
    "train.batch_size": 96,
    "train.ema": 0.9,
    "checkpoint.every_steps": 4,
    "log.every": 1,
    "data.workers": 2,
}
VIT = '{"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}'


def command(script: str, *positional: object, processes: int = 1, **options: object) -> list[str]:
    """A command line; options' dots are written as two underscores."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    words = [f"--{key.replace('__', '.')}={value}" for key, value in options.items()]
    return [sys.executable, *launcher, script, *map(str, positional), *words]


def start(script: str, *positional: object, processes: int = 1, **options: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command(script, *positional, processes=processes, **options),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(
    script: str, *positional: object, processes: int = 1, **options: object
) -> subprocess.CompletedProcess:
    process = start(script, *positional, processes=processes, **options)
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def train(folder: Path, data: Path, processes: int = 1, **options: object) -> subprocess.CompletedProcess:
    """Train to the end; fails the test if training does."""
    done = run("image/train.py", processes=processes, **settings(folder, data, **options))
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def settings(folder: Path, data: Path, **options: object) -> dict[str, object]:
    """The small settings with ``options`` over them."""
    dotted = {key.replace("__", "."): value for key, value in options.items()}
    return {"out": folder, "data.path": data} | SMALL | dotted


def interrupt(
    folder: Path, data: Path, step: int, number: signal.Signals, delay: float = 0.0, **options: object
) -> int:
    """Train until ``step`` is logged, wait ``delay`` seconds more, send a signal; returns the exit code."""
    process = start("image/train.py", **settings(folder, data, **options))
    wait_for_step(folder, step, process)
    time.sleep(delay)
    process.send_signal(number)
    process.communicate(timeout=120)
    return process.returncode


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started, by rank."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True)
    return [int(word) for word in found.stdout.split()]


def kill_all(launcher: subprocess.Popen) -> None:
    """SIGKILL to torchrun and to all ranks, each of which has a process group of its own."""
    for process in (launcher.pid, *ranks_of(launcher)):
        os.kill(process, signal.SIGKILL)
    launcher.communicate(timeout=120)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Wait until the training ``process`` has logged ``step``; fails the test if it ends before."""
    deadline = time.monotonic() + 240
    while last_step(folder) < step:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def metrics(folder: Path, split: str = "train") -> list[dict]:
    """The entries of metrics.jsonl without what depends on the clock."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    timing = ("time", "samples_per_s", "compute_samples_per_s", "data_wait", "memory_gib")
    entries = [json.loads(line) for line in lines]
    return [{k: v for k, v in e.items() if k not in timing} for e in entries if e["split"] == split]


def last_step(folder: Path) -> int:
    """The last step in metrics.jsonl, which may be being written."""
    path = folder / "metrics.jsonl"
    found = re.findall(rb'"step": (\d+)', path.read_bytes()) if path.exists() else []
    return int(found[-1]) if found else 0


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line that a user's mistake is answered with."""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1, done.stderr
    return lines[0]
