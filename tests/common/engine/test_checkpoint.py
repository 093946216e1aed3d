"""Checkpoints on a real disk: whole or not there, damaged ones passed over, nothing but data loaded."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from common.engine import checkpoint
from common.engine.checkpoint import CheckpointError
from common.errors import ConfigError

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


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"null",
        b"3",
        b'["state.json"]',
        b"\xff\xfe",
        pytest.param(b"[" * 99999, id="deep"),
    ],
)
def test_a_garbled_manifest_is_damage(tmp_path, manifest):
    path = checkpoint.save(tmp_path, 5, CONTENT)
    (path / "manifest.json").write_bytes(manifest)
    assert checkpoint.damage(path)
    with pytest.raises(ConfigError, match="every checkpoint is damaged or unreadable; mend one, or remove"):
        checkpoint.to_continue(tmp_path)


def test_what_has_no_checkpoints_name_is_left_alone(tmp_path):
    assert checkpoint.to_continue(tmp_path) is None
    path = checkpoint.save(tmp_path, 5, CONTENT)
    others = [tmp_path / name for name in ("step-000000009-copy", "step-best", "step-000000005.bak")]
    for other in others:
        shutil.copytree(path, other)
    others.append(tmp_path / "step-000000099")
    others[-1].touch()
    assert checkpoint.newest(tmp_path) == path
    checkpoint.prune(tmp_path, path, keep=1, best_step=None)
    assert set(tmp_path.iterdir()) == {path, *others}


def test_a_damaged_later_checkpoint_takes_no_ones_place(tmp_path):
    """A run goes on from step 5, since that of step 10 is damaged, and is stopped at step 7."""
    start, damaged = (checkpoint.save(tmp_path, step, CONTENT) for step in (5, 10))
    (damaged / "state.json").unlink()
    assert checkpoint.is_newest(tmp_path, start)
    last = checkpoint.save(tmp_path, 7, CONTENT)
    assert not checkpoint.is_newest(tmp_path, start)
    checkpoint.prune(tmp_path, last, keep=1, best_step=None)
    assert list(tmp_path.iterdir()) == [last]


def test_the_log_is_on_the_disk_before_the_checkpoint(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(checkpoint, "sync", lambda path: synced.append((path, checkpoint.newest(tmp_path))))
    log = tmp_path / "metrics.jsonl"
    checkpoint.save(tmp_path, 5, CONTENT, log=log)
    assert synced == []
    log.write_text("{}")
    checkpoint.save(tmp_path, 6, CONTENT, log=log)
    assert synced == [(log, tmp_path / "step-000000005")]


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
    checkpoint.prune(tmp_path, tmp_path / "step-000000006", keep=2, best_step=3)
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


AT_EVERY_MOMENT = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from common.engine import checkpoint

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

def write(folder, step, text):
    content = {"model.safetensors": {"a": torch.ones(3)}, "state.json": {"text": text}}
    checkpoint.prune(folder, checkpoint.save(folder, step, content), keep=1, best_step=None)

def killed(number, *arguments):
    '''Kill a process just before it changes the disk for the time ``number``; False if it ends before.'''
    child = os.fork()
    if child == 0:
        left = [number]
        def hook(event, _):
            if event in CHANGES:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        write(*arguments)
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL

for step in (5, 6):
    number = 1
    while True:
        folder = Path(sys.argv[1], f"{step}-{number}")
        write(folder, 5, "old")
        if not killed(number, folder, step, "new"):
            break
        found = checkpoint.newest(folder)
        assert found and checkpoint.load(found, "state.json")["text"] in ("old", "new"), (step, number)
        assert not killed(10**6, folder, step, "again")
        assert os.listdir(folder) == [f"step-{step:09d}"], (step, number)
        assert checkpoint.load(folder / f"step-{step:09d}", "state.json")["text"] == "again"
        number += 1
    print(number - 1)
"""


def test_killed_at_every_moment_of_writing_the_only_checkpoint_again_or_the_next_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", AT_EVERY_MOMENT, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stderr
    assert all(int(moments) > 15 for moments in done.stdout.split()), done.stdout


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
