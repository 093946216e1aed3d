"""Training as users run it: real processes on real JPEG files, killed, stopped, resumed, evaluated."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from common.data.digits import prepare_digits
from common.engine import checkpoint
from tests.processes import (
    ROOT,
    VIT,
    command,
    error_line,
    interrupt,
    metrics,
    run,
    settings,
    start,
    train,
    wait_for_step,
)

pytestmark = pytest.mark.xdist_group("train")  # one worker, so that the runs below are made once


@pytest.fixture(scope="module")
def reference(tmp_path_factory, digits):
    """A run that nothing ever disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "reference"
    train(folder, digits)
    return folder


def weights(folder):
    path = checkpoint.newest(folder / "checkpoints")
    return {
        name: (path / name).read_bytes() for name in ("model.safetensors", "ema.safetensors", "optimizer.pt")
    }


def assert_same_run(folder, reference):
    for split in ("train", "val"):
        assert metrics(folder, split) == metrics(reference, split)
    assert weights(folder) == weights(reference)


def test_a_run_leaves_what_users_look_for(reference):
    assert [entry["step"] for entry in metrics(reference)] == list(range(1, 31))
    assert [entry["step"] for entry in metrics(reference, "val")] == [16, 30]
    for name in ("config.yaml", "starts.jsonl", "evaluation.json", "curves.png", "confusion.png"):
        assert (reference / name).stat().st_size > 0
    assert list((reference / "tensorboard").glob("events*"))
    start = json.loads((reference / "starts.jsonl").read_text())
    assert start["git"]
    assert start["versions"]["torch"]
    assert "--train.epochs=2" in start["command"]


def test_killed_again_and_again_gives_the_same_losses_and_weights(digits, reference, tmp_path):
    folder = tmp_path / "killed"
    # In the middle of the first epoch; about the evaluation and the checkpoint at its end; twice in the second.
    for step, delay in ((6, 0.0), (16, 0.15), (19, 0.02), (26, 0.0)):
        assert interrupt(folder, digits, step, signal.SIGKILL, delay) == -signal.SIGKILL
    train(folder, digits)
    assert_same_run(folder, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_it_saves_at_once_and_continues_exactly(digits, reference, tmp_path, number):
    folder = tmp_path / "stopped"
    assert interrupt(folder, digits, 5, number) == 75
    stopped_at = checkpoint.step_of(checkpoint.newest(folder / "checkpoints"))
    assert stopped_at == metrics(folder)[-1]["step"], "nothing that was computed is computed again"
    train(folder, digits, data__workers=0)  # the number of workers may change
    assert_same_run(folder, reference)


def test_a_finished_run_is_left_alone(digits, reference):
    before = {path: path.stat().st_mtime_ns for path in (reference / "checkpoints").rglob("*")}
    done = train(reference, digits)
    assert "has finished already" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (reference / "checkpoints").rglob("*")}


def test_other_settings_or_data_are_an_error_that_lists_what_differs(digits, reference, tmp_path):
    done = run("image/train.py", **settings(reference, digits, optim__lr=0.05, log__every=2))
    assert done.returncode == 2
    assert "optim.lr: 0.1 → 0.05" in error_line(done)
    assert "log.every" not in error_line(done)
    other = tmp_path / "digits"
    prepare_digits(other, "folder")
    next((other / "train" / "3").iterdir()).unlink()
    done = run("image/train.py", **settings(reference, other))
    assert "data.fingerprint" in error_line(done)


def test_weights_start_another_run(digits, reference, tmp_path):
    done = train(tmp_path / "next", digits, weights=reference, train__epochs=0.2)
    assert "every key loaded" in done.stdout
    loss = metrics(tmp_path / "next")[0]["loss"]
    assert loss < metrics(reference)[0]["loss"] * 0.9


def test_a_damaged_newest_checkpoint_costs_only_its_steps(digits, reference, tmp_path):
    folder = tmp_path / "damaged"
    interrupt(folder, digits, 10, signal.SIGTERM)
    newest = checkpoint.newest(folder / "checkpoints")
    (newest / "model.safetensors").write_bytes(b"x" * 1000)
    done = train(folder, digits)
    assert f"{newest} is damaged" in done.stderr
    assert_same_run(folder, reference)


def test_evaluation_gives_the_runs_own_numbers_on_every_form_of_the_data(digits, reference, tmp_path):
    own = metrics(reference, "val")[-1]
    for form in ("folder", "recordio", "webdataset"):
        path = digits
        if form != "folder":
            path = tmp_path / form
            prepare_digits(path, form)
        done = run("image/eval.py", reference, data__path=path)
        assert done.returncode == 0, done.stderr
        result = json.loads((reference / "eval.json").read_text())
        assert {key: result[key] for key in ("top1", "top5", "loss", "samples")} == {
            key: own[key] for key in ("top1", "top5", "loss", "samples")
        }
        assert sum(map(sum, result["confusion"])) == 355
    assert f"top1 {own['top1']:.2f} %" in done.stdout
    assert (reference / "eval_confusion.png").stat().st_size > 0


def blank(shard, *samples):
    """Put zeros in the place of images of a shard."""
    lines = shard.with_suffix(".idx").read_text().splitlines()[1:]
    with open(shard, "r+b") as file:
        for sample in samples:
            ext, offset, size, _ = lines[sample].split()[-4:]
            assert ext == "jpg"
            file.seek(int(offset))
            file.write(bytes(int(size)))


@pytest.mark.slow
def test_unreadable_samples_are_counted_per_shard_and_named(tmp_path):
    prepare_digits(tmp_path / "data", "webdataset")
    blank(tmp_path / "data/train-000002.tar", 0, 7, 255)
    blank(tmp_path / "data/train-000005.tar", 3)
    blank(tmp_path / "data/val-000001.tar", 1, 5)
    done = train(tmp_path / "run", tmp_path / "data", processes=2, train__epochs=1)
    line = next(line for line in done.stdout.splitlines() if line.startswith("unreadable samples"))
    assert "unreadable samples: 6 (6 not an image); 3 in train-000002.tar, " in line
    assert "2 in val-000001.tar" in line
    assert "1 in train-000005.tar" in line
    done = run("image/eval.py", tmp_path / "run")
    assert "unreadable samples: 2 (2 not an image); 2 in val-000001.tar; " in done.stdout
    named = [json.loads(line) for line in (tmp_path / "run/eval_quarantine.jsonl").read_text().splitlines()]
    assert {sample["shard"] for sample in named} == {"val-000001.tar"}
    assert len(named) == 2


def test_a_runs_weights_as_one_file_evaluate_to_its_numbers(digits, reference, tmp_path):
    file = tmp_path / "weights.safetensors"
    done = run("-m", "common.engine.consolidate", reference, file)
    assert done.returncode == 0, done.stderr
    done = run("image/eval.py", file, config=reference / "config.yaml", out=tmp_path / "evaluation")
    assert done.returncode == 0, done.stderr
    result, own = json.loads((tmp_path / "evaluation/eval.json").read_text()), metrics(reference, "val")[-1]
    assert [result[key] for key in ("top1", "loss")] == [own[key] for key in ("top1", "loss")]


def test_a_diverging_run_stops_with_step_rate_and_last_good_checkpoint(digits, tmp_path):
    options = {
        "optim__lr": 1e25,
        "schedule__warmup_epochs": 0.5,
        "train__ema": 0,
        "checkpoint__every_steps": 1,
    }
    done = run("image/train.py", **settings(tmp_path / "run", digits, **options))
    assert done.returncode == 1
    line = error_line(done)
    assert "learning rate" in line
    last = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert f"last good checkpoint: {last}" in line
    assert f"at step {metrics(tmp_path / 'run')[-1]['step'] + 1} " in line, "within one log interval"


@pytest.mark.slow
def test_killed_while_it_writes_in_the_background_it_continues_exactly(digits, reference, tmp_path):
    folder = tmp_path / "killed"
    options = settings(folder, digits, checkpoint__asynchronous=True, checkpoint__every_steps=2)
    for _ in range(5):  # the write may have ended before the signal comes
        process = start("image/train.py", **options)
        wait_for_step(folder, 5, process)
        while not list((folder / "checkpoints").glob(".step-*.partial")):
            assert process.poll() is None, process.communicate()[1][-3000:]
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        if list((folder / "checkpoints").glob(".step-*.partial")):
            break
    else:
        pytest.fail("never killed in the middle of a write")
    train(folder, digits, checkpoint__asynchronous=True)
    assert not list((folder / "checkpoints").glob(".step-*"))
    assert_same_run(folder, reference)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_resume_is_exact(digits, tmp_path):
    """One of two ranks dies of SIGKILL: the other does not hang, and the run continues as if nothing had happened."""
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    train(undisturbed, digits, processes=2)
    process = start("image/train.py", processes=2, **settings(folder, digits, train__timeout_minutes=1))
    wait_for_step(folder, 9, process)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    begun = time.monotonic()
    os.kill(int(ranks.stdout.split()[1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - begun < 60
    assert "SIGKILL" in err, "the launcher names how it died"
    train(folder, digits, processes=2)
    assert_same_run(folder, undisturbed)


def test_accelerate_launch_trains(digits, tmp_path):
    """The first command of the README, on a recipe."""
    arguments = command("image/train.py", **settings(tmp_path / "run", digits, train__epochs=0.2))[1:]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        arguments[0],
        "--config",
        "image/recipes/digits.yaml",
    ]
    done = subprocess.run([*launch, *arguments[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "validation accuracy" in done.stdout
    assert str(tmp_path / "run" / "curves.png") in done.stdout


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"optim.lrr": 1}, "optim.lrr: unknown key; did you mean 'optim.lr'?"),
        ({"data.path": "no/where"}, "'no/where' is not an existing folder"),
        ({"model.name": "resnet50_bta"}, "no such model; did you mean 'resnet50_bat'?"),
        ({"train.precision": "fp16"}, "needs a GPU"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(digits, tmp_path, options, expected):
    done = run("image/train.py", **settings(tmp_path / "run", digits, **options))
    assert done.returncode == 2
    assert expected in error_line(done)
    assert not (tmp_path / "run").exists()


def test_two_processes_train_and_evaluate_like_one(digits, tmp_path):
    """Without batch norm the numbers do not depend on the number of processes, also when it changes on the way."""
    vit = {
        "model__name": "vit_tiny_patch16_224",
        "model__args": VIT,
        "optim__name": "adamw",
        "optim__lr": 1e-3,
    }
    vit |= {"mixup__cutmix": 1.0, "train__ema": 0, "train__batch_size": 160}
    alone, both, changed = (tmp_path / name for name in ("alone", "both", "changed"))
    train(alone, digits, train__accumulation=3, **vit)
    train(both, digits, processes=2, **vit)
    interrupt(changed, digits, 8, signal.SIGTERM, **vit)
    train(changed, digits, processes=2, **vit)
    for folder in (both, changed):
        for split in ("train", "val"):
            ours, theirs = metrics(folder, split), metrics(alone, split)
            assert [e["step"] for e in ours] == [e["step"] for e in theirs]
            assert [e["loss"] for e in ours] == pytest.approx([e["loss"] for e in theirs], rel=2e-4)
        assert metrics(folder, "val")[-1]["samples"] == 355
