"""Checkpoints on a real disk: whole or not there, damaged ones passed over, nothing but data loaded."""

import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch

from common.engine import checkpoint
from common.engine.checkpoint import CheckpointError

CONTENT = {
    "model.safetensors": {"a": torch.arange(6.0).view(2, 3).t(), "n": torch.tensor(3)},
    "optimizer.pt": {"a": {"momentum_buffer": torch.ones(3, 2), "step": torch.tensor(4.0)}},
    "state.json": {"progress": {"step": 5}, "value": 0.1 + 0.2},
}


def test_round_trip_is_exact(tmp_path):
    path = checkpoint.save(tmp_path, 5, CONTENT)
    assert checkpoint.newest(tmp_path) == path
    assert torch.equal(checkpoint.load(path, "model.safetensors")["a"], CONTENT["model.safetensors"]["a"])
    assert torch.equal(checkpoint.load(path, "optimizer.pt")["a"]["momentum_buffer"], torch.ones(3, 2))
    assert checkpoint.load(path, "state.json") == CONTENT["state.json"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, capsys, file, damage):
    before, last = (checkpoint.save(tmp_path, step, CONTENT) for step in (5, 10))
    data = bytearray((last / file).read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        (last / file).unlink()
    else:
        (last / file).write_bytes(data if damage == "flip" else data[: len(data) // 2])
    assert checkpoint.newest(tmp_path) == before
    assert str(last) in capsys.readouterr().err


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 5, CONTENT)
    path = checkpoint.save(tmp_path, 5, CONTENT | {"state.json": {"again": True}})
    assert checkpoint.load(path, "state.json") == {"again": True}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        checkpoint.save(tmp_path, step, CONTENT)
    (
        tmp_path / ".step-000000004.elsewhere-1-0123abcd.partial"
    ).mkdir()  # killed at a step that does not come again
    checkpoint.prune(tmp_path, keep=2, best_step=3)
    assert [checkpoint.step_of(path) for path in sorted(tmp_path.iterdir())] == [3, 5, 6]


WRITER = """
import sys, torch
from pathlib import Path
from common.engine import checkpoint
content = {"model.safetensors": {str(i): torch.randn(200_000) for i in range(8)}, "state.json": {}}
print("ready", flush=True)
step = 0
while True:
    step += 1
    checkpoint.save(Path(sys.argv[1]), step, content)
"""


def test_killed_while_writing_leaves_only_whole_checkpoints(tmp_path):
    for delay in (0.03, 0.11, 0.24):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE
        ) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
    paths = sorted(tmp_path.glob("step-*"))
    assert paths
    assert [checkpoint.damage(path) for path in paths] == [None] * len(paths)
    checkpoint.save(tmp_path, 10**6, CONTENT)  # what a kill left is gone once that step is written again


LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from common.engine import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoint.save(Path(sys.argv[1]), 2, {"model.safetensors": {"a": torch.zeros(100_000)}})
"""


def test_a_failed_write_is_one_clear_error_and_keeps_the_older_checkpoint(tmp_path):
    first = checkpoint.save(tmp_path, 1, CONTENT)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True)
    line = done.stderr.strip().splitlines()[-1]
    assert "checkpoint of step 2 not written" in line
    assert f"{first} is intact" in line
    assert [entry.name for entry in tmp_path.iterdir()] == [first.name]
    assert checkpoint.damage(first) is None


def test_disk_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        first = checkpoint.save(disk, 1, CONTENT)
        with pytest.raises(CheckpointError, match=f"No space left on device; {first} is intact"):
            checkpoint.save(disk, 2, {"model.safetensors": {"a": torch.zeros(100_000)}})
        assert [entry.name for entry in disk.iterdir()] == [first.name]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class Payload:
    def __reduce__(self):
        return (os.system, ("touch /tmp/pairwise-was-here",))


def test_a_pickle_payload_is_refused_in_one_line(tmp_path):
    path = checkpoint.save(tmp_path, 1, CONTENT)
    torch.save({"x": Payload()}, path / "optimizer.pt")
    with pytest.raises(CheckpointError, match="refused") as error:
        checkpoint.load(path, "optimizer.pt")
    assert "\n" not in str(error.value)
    (path / "optimizer.pt").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match="refused"):
        checkpoint.load(path, "optimizer.pt")
    assert not os.path.exists("/tmp/pairwise-was-here")
