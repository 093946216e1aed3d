"""The ways to share a network over processes: same losses, one kind of checkpoint, no mode that silently is another."""

import os
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from common.engine import checkpoint
from tests.processes import (
    ROOT,
    VIT,
    command,
    error_line,
    kill_all,
    metrics,
    ranks_of,
    run,
    settings,
    start,
    train,
    wait_for_step,
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("parallel")]

NORM_FREE = {
    "model__name": "vit_tiny_patch16_224",
    "model__args": VIT,
    "optim__name": "adamw",
    "optim__lr": 1e-3,
    "optim__clip_norm": 1.0,
    "train__ema": 0,
    "train__batch_size": 160,
    "train__epochs": 2.25,
}

# Smooth, since rounding grows tenfold a step in a small network of batch norm and ReLU, in one process too.
NORMED = {
    "model__name": "test_efficientnet",
    "model__args": "{}",
    "optim__lr": 0.02,
    "train__ema": 0,
    "train__epochs": 1.4,
}


@pytest.fixture(scope="module")
def alone(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(folder, digits, train__accumulation=2, **NORM_FREE)
    return folder


def assert_same_losses(folder, reference):
    for split in ("train", "val"):
        ours, theirs = metrics(folder, split), metrics(reference, split)
        assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
        assert [e["loss"] for e in ours] == pytest.approx([e["loss"] for e in theirs], rel=2e-4)


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_four_processes_give_the_losses_of_one(alone, digits, tmp_path, mode):
    train(tmp_path / "run", digits, processes=4, parallel=mode, **NORM_FREE)
    assert_same_losses(tmp_path / "run", alone)


@pytest.fixture(scope="module")
def half(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "run"
    train(folder, digits, train__precision="bf16", **NORM_FREE)
    return folder


@pytest.mark.parametrize("mode, offload", [("ddp", 0), ("fsdp", 0), ("zero1", 0), ("zero2", 1), ("zero3", 1)])
def test_bfloat16_in_every_mode(alone, half, digits, tmp_path, mode, offload):
    """Its losses are as near one process's in bfloat16 as those are to float32's, where they are not the same."""
    folder = tmp_path / "run"
    options = NORM_FREE | {"train__precision": "bf16", "offload": "true" if offload else "false"}
    train(folder, digits, processes=2, parallel=mode, **options)
    ours, theirs, exact = ([e["loss"] for e in metrics(run, "train")] for run in (folder, half, alone))
    apart = max(abs(a - b) for a, b in zip(theirs, exact, strict=True))
    assert 0 < apart < 0.02
    assert ours == pytest.approx(theirs, abs=2 * apart)
    assert ours != exact


def launch(*words, script="image/train.py", **options):
    """Start a script as the documentation says, by accelerate's own launcher."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *words]
    return subprocess.run(
        [*launcher, *command(script, **options)[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("name", ["cpu", "ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_the_launchers_files_give_the_losses_of_one_process(alone, digits, tmp_path, name):
    folder = tmp_path / "run"
    words = ("--config_file", f"slurm/accelerate/{name}.yaml", "--num_processes=2", "--main_process_port=0")
    accumulation = 2 if name == "zero2" else 1
    done = launch(*words, **settings(folder, digits, train__accumulation=accumulation, **NORM_FREE))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_losses(folder, alone)
    assert '"world": 2' in (folder / "starts.jsonl").read_text()
    mode = yaml.safe_load((folder / "config.yaml").read_text())["parallel"]
    assert mode == ("ddp" if name == "cpu" else name)


@pytest.fixture(scope="module")
def normed_alone(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("normed") / "run"
    train(folder, digits, **NORMED)
    return folder


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_synchronised_batch_norm_gives_the_losses_of_one_process(normed_alone, digits, tmp_path, mode):
    train(tmp_path / "run", digits, processes=2, parallel=mode, train__sync_bn=True, **NORMED)
    assert_same_losses(tmp_path / "run", normed_alone)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--cpu", "--num_processes=2"], "was told of several processes and started one"),
        (["--mixed_precision=bf16"], "train.precision = fp32: accelerate launch was told bf16"),
    ],
)
def test_what_the_launcher_was_told_and_does_not_become_is_an_error(digits, tmp_path, words, expected):
    done = launch("--quiet", *words, **settings(tmp_path / "run", digits))
    assert expected in error_line(done)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "first, then, processes",
    [
        ("fsdp", "ddp", 1),
        ("fsdp", "fsdp", 4),
        ("ddp", "fsdp", 4),
        ("fsdp", "zero1", 2),
        ("zero1", "zero3", 4),
        ("zero3", "zero2", 4),
        ("zero2", "ddp", 1),
    ],
)
def test_a_run_goes_on_in_another_mode(alone, digits, tmp_path, first, then, processes):
    folder = tmp_path / "run"
    process = start("image/train.py", processes=2, **settings(folder, digits, parallel=first, **NORM_FREE))
    wait_for_step(folder, 9, process)
    kill_all(process)
    mode = "auto" if then == "ddp" else then
    done = train(folder, digits, processes=processes, parallel=mode, **NORM_FREE)
    assert 8 <= continued_at(done) < 20
    assert_same_losses(folder, alone)


FSDP = {"parallel": "fsdp", "train__ema": 0.9}


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """With batch norm, momentum and EMA."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(folder, digits, processes=2, **FSDP)
    return folder


def assert_same_run(folder, reference, kinds=("model", "optimizer", "ema")):
    for split in ("train", "val"):
        assert metrics(folder, split) == metrics(reference, split)
    for kind in kinds:
        ours, theirs = (checkpoint.tensors(newest(f), kind) for f in (folder, reference))
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours.whole(name), theirs.whole(name)) for name in theirs)


def continued_at(done):
    return int(re.search(r"continuing \S+ at step (\d+)", done.stdout)[1])


def newest(folder):
    return checkpoint.newest(folder / "checkpoints")


@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_killed_and_resumed_is_bit_equal(digits, tmp_path, mode):
    """With batch norm and momentum."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {"parallel": mode, "train__ema": 0}
    train(whole, digits, processes=2, **options)
    process = start("image/train.py", processes=2, **settings(killed, digits, **options))
    wait_for_step(killed, 10, process)
    kill_all(process)
    assert 8 <= continued_at(train(killed, digits, processes=2, **options)) < 30
    assert_same_run(killed, whole, ("model", "optimizer"))


def test_a_rank_killed_while_all_write_in_the_background_ends_all_and_resume_is_exact(
    undisturbed, digits, tmp_path
):
    folder = tmp_path / "killed"
    options = FSDP | {
        "checkpoint__asynchronous": True,
        "checkpoint__every_steps": 1,
        "train__timeout_minutes": 1,
    }
    process = start("image/train.py", processes=2, **settings(folder, digits, **options))
    wait_for_step(folder, 9, process)
    killed = ranks_of(process)[1]
    while not list((folder / "checkpoints").glob(".step-*.partial")):
        assert process.poll() is None, process.communicate()[1][-3000:]
    os.kill(killed, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "SIGKILL" in err
    done = train(folder, digits, processes=2, **options)
    assert "is damaged" not in done.stderr
    assert 8 <= continued_at(done) < 30
    assert not list((folder / "checkpoints").glob(".step-*"))
    assert_same_run(folder, undisturbed)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_full_for_one_rank_ends_all_with_the_same_line(digits, tmp_path, asynchronous):
    folder = tmp_path / "run"
    options = settings(folder, digits, checkpoint__asynchronous=asynchronous, **FSDP)
    process = start("image/train.py", processes=2, **options)
    wait_for_step(folder, 6, process)
    resource.prlimit(ranks_of(process)[1], resource.RLIMIT_FSIZE, (1000, 1000))
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert lines, err
    (line,) = {line.split(": ", 1)[1] for line in lines}
    found = re.fullmatch(
        r"checkpoint of step (\d+) not written to \S+: (.*) \(rank 1\); (.*) is intact", line
    )
    assert found[2] == "File too large"
    assert found[3] == str(newest(folder))
    assert checkpoint.step_of(newest(folder)) == int(found[1]) - 4
    assert not list((folder / "checkpoints").glob(".step-*"))


def test_a_rank_that_hangs_is_waited_for_no_longer_than_the_limit(digits, tmp_path):
    folder = tmp_path / "run"
    options = settings(folder, digits, train__timeout_minutes=1)
    process = start("image/train.py", processes=2, **options)
    wait_for_step(folder, 9, process)
    os.kill(ranks_of(process)[1], signal.SIGSTOP)
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    found = re.search(
        r"error(?: \(rank \d\))?: at step (\d+) another process has died or hangs \(train.timeout_minutes = 1\)",
        err,
    )
    assert found, err
    assert int(found[1]) >= 8
    train(folder, digits, processes=2)


def test_one_process_has_nothing_to_share(digits, tmp_path):
    done = run("image/train.py", **settings(tmp_path / "run", digits, parallel="fsdp"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: parallel = fsdp: there is one process")
    assert not (tmp_path / "run").exists()


def test_a_mode_that_the_launcher_was_not_told_is_an_error(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    done = run("image/train.py", **settings(tmp_path / "run", digits, parallel="ddp"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: parallel = ddp: accelerate launch was told fsdp")
