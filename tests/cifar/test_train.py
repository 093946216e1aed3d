"""Training, evaluating and drawing as users do it: real processes on the digits, killed, resumed, compared."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys

import pytest
import torch
import yaml

import cifar.models  # noqa: F401
from cifar.eval import Mirrored, spread
from cifar.prepare import digits, write
from cifar.train import Config
from common.attention.fbn import FactorizedBilinear
from common.config import parse
from common.engine import checkpoint
from common.engine.setup import seed_step
from common.models.build import build_model
from common.report.compare import read_events, read_history, table
from tests.processes import ROOT, error_line, metrics, run, start, wait_for_step

pytestmark = pytest.mark.xdist_group("cifar")  # one worker, so that the runs below are made once

# The recipe of the digits, small.
SHORT = {
    "augment.size": 16,
    "augment.pad": 2,
    "augment.hflip": 0.5,
    "model.args": '{"depth": 11, "factors": 4}',
    "train.epochs": 2,
    "train.batch_size": 96,
    "checkpoint.every_steps": 4,
    "log.every": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits"
    write(path, "memory", *digits(16))
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "reference"
    train(folder, data)
    return folder


def options(folder, data, **more):
    return {"out": folder, "data.path": data} | SHORT | {key.replace("__", "."): v for key, v in more.items()}


def train(folder, data, **more):
    done = run("cifar/train.py", **options(folder, data, **more))
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def state(folder):
    path = checkpoint.newest(folder / "checkpoints")
    return [(path / name).read_bytes() for name in ("model.safetensors", "optimizer.pt")]


def assert_same_run(folder, reference):
    for split in ("train", "val"):
        assert metrics(folder, split) == metrics(reference, split)
    assert state(folder) == state(reference)


def test_without_arguments_it_trains_fbn_on_the_digits(tmp_path):
    """In an empty folder; only made shorter."""
    short = ["--train.epochs=0.15", '--model.args={"depth": 11}']
    command = [sys.executable, str(ROOT / "cifar/train.py"), *short]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    config = yaml.safe_load((tmp_path / "runs/cifar-digits/config.yaml").read_text())
    assert config["model"]["name"] == "resnet164_fbn"
    assert re.search(r"validation accuracy \d+\.\d\d % \(top-1, 355 samples\)", done.stdout)
    for name in ("curves.png", "confusion.png", "evaluation.json"):
        assert (tmp_path / "runs/cifar-digits" / name).stat().st_size > 0


def test_killed_it_goes_on_exactly(data, reference, tmp_path):
    folder = tmp_path / "killed"
    process = start("cifar/train.py", **options(folder, data))
    wait_for_step(folder, 18, process)  # in the second epoch, between two checkpoints
    process.kill()
    process.communicate(timeout=60)
    assert metrics(folder)[-1]["step"] < 30
    train(folder, data)
    assert_same_run(folder, reference)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stopped_it_goes_on_exactly_on_another_form_of_the_data(data, reference, tmp_path, number):
    folder = tmp_path / "stopped"
    process = start("cifar/train.py", **options(folder, data))
    wait_for_step(folder, 5, process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 75
    other = tmp_path / "recordio"
    write(other, "recordio", *digits(16))
    train(folder, other)
    assert_same_run(folder, reference)


def test_evaluation_gives_the_runs_own_numbers(data, reference, tmp_path):
    """Of several checkpoints at once, with their mean and deviation, also on another form of the data."""
    shards, first = tmp_path / "shards", tmp_path / "first"
    write(shards, "webdataset", *digits(16))
    shutil.copytree(reference, first)
    shutil.rmtree(sorted((first / "checkpoints").iterdir())[-1])  # as if it had ended earlier
    best = metrics(reference, "val")
    assert [entry["step"] for entry in best] == [16, 30]
    done = run("cifar/eval.py", reference, first, data__path=shards, summary=tmp_path / "all.json")
    assert done.returncode == 0, done.stderr[-3000:]
    own, result = best[-1], json.loads((reference / "eval.json").read_text())
    assert {key: result[key] for key in ("top1", "top5", "loss", "samples")} == {
        key: own[key] for key in ("top1", "top5", "loss", "samples")
    }
    assert result["error"] == 100 - own["top1"]
    assert len(result["per_class"]) == len(result["confusion"]) == 10
    assert (reference / "eval_confusion.png").stat().st_size > 0
    summary = json.loads((tmp_path / "all.json").read_text())
    errors = [entry["error"] for entry in summary["checkpoints"].values()]
    assert len(errors) == 2
    assert summary["mean_error"] == pytest.approx(sum(errors) / 2)
    assert summary["deviation"] == pytest.approx(statistics.stdev(errors))
    assert f"error {spread(errors)} %" in done.stdout


@pytest.mark.slow
def test_mirrored_evaluation_of_a_file_of_weights(data, reference, tmp_path):
    weights = checkpoint.newest(reference / "checkpoints") / "model.safetensors"
    shutil.copy(weights, tmp_path / "weights.safetensors")
    settings = options(tmp_path / "out", data, tta="mirror", model__name="resnet164_fbn")
    done = run("cifar/eval.py", tmp_path / "weights.safetensors", **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert result["tta"] == "mirror"
    assert result["loss"] != metrics(reference, "val")[-1]["loss"]


def test_the_mirrored_network_is_the_mean_over_both():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 5)).eval()
    x = torch.randn(4, 3, 8, 8)
    both = Mirrored(net)(x)
    torch.testing.assert_close(both, torch.stack([net(x), net(x.flip(-1))]).mean(0))
    torch.testing.assert_close(both, Mirrored(net)(x.flip(-1)))


def test_spread_is_mean_and_sample_deviation():
    assert spread([1.0, 2.0, 6.0]) == "3.00 ± 2.65 (3 runs)"
    assert spread([1.5]) == "1.50"


def test_curves_of_several_runs(reference, tmp_path):
    board = tmp_path / "board"
    shutil.copytree(reference / "tensorboard", board)
    done = run("cifar/plot.py", reference, board, out=tmp_path / "plots" / "both")
    assert done.returncode == 0, done.stderr[-3000:]
    last, best = (
        metrics(reference, "val")[-1],
        max(metrics(reference, "val"), key=lambda entry: entry["top1"]),
    )
    row = f"| {100 - last['top1']:.2f} | {100 - best['top1']:.2f} |"
    assert done.stdout.count(row) == 2, "metrics.jsonl and TensorBoard say the same"
    png, svg = ((tmp_path / "plots" / f"both.{kind}").read_bytes() for kind in ("png", "svg"))
    assert png.startswith(b"\x89PNG")
    assert b"<svg" in svg
    assert str(reference).encode() in svg


def test_histories_from_both_sources_are_the_same(reference):
    ours, theirs = read_history(reference), read_events(reference / "tensorboard")
    for split in ("train", "val"):
        from_events = [entry for entry in theirs if entry["split"] == split]
        assert [entry["step"] for entry in from_events] == [entry["step"] for entry in ours.of(split)]
        for key in ("loss", "top1"):
            values = [entry[key] for entry in from_events]
            assert values == pytest.approx([entry[key] for entry in ours.of(split)], rel=1e-6)
    assert f"| epoch {ours.best['epoch']:.1f} |" in table([ours])


@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint_at_an_epoch(data, reference, tmp_path):
    more = {
        "schedule.name": "steps",
        "schedule.milestones": "[3]",
        "schedule.begin_epoch": 2,
        "schedule.warmup_epochs": 0,
    }
    done = train(tmp_path / "next", data, weights=reference, optim__lr=0.05, **more)
    assert "every key loaded" in done.stdout
    entries = metrics(tmp_path / "next")
    assert entries[0]["loss"] < metrics(reference)[0]["loss"]
    assert [entry["lr"] for entry in entries] == pytest.approx([0.05] * 16 + [0.005] * 14, rel=1e-6)


def test_each_rank_draws_its_own_mask_and_the_same_one_again():
    """The engine seeds a step by (seed, step, micro-batch, rank)."""
    layer = FactorizedBilinear(4, 3, factors=64).train()
    masks = {}
    for rank in (0, 1):
        for step in (5, 6):
            seed_step(0, step, 0, rank)
            masks[rank, step] = layer.mask()
    assert all(not torch.equal(masks[a], masks[b]) for a in masks for b in masks if a != b)
    torch.rand(10)
    seed_step(0, 5, 0, 1)
    assert torch.equal(layer.mask(), masks[1, 5])


@pytest.mark.slow
def test_two_processes_draw_their_own_masks_and_the_same_ones_after_a_resume(data, tmp_path, monkeypatch):
    def masks(name):
        return [(tmp_path / f"{name}.{rank}").read_text().splitlines() for rank in (0, 1)]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"train__epochs": 1, "model__args": '{"depth": 11, "factors": 20}'}
    monkeypatch.setenv("MASKS", str(tmp_path / "masks_whole"))
    done = run("tests/cifar/record_masks.py", processes=2, **options(whole, data, **settings))
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setenv("MASKS", str(tmp_path / "masks_parts"))
    process = start("tests/cifar/record_masks.py", processes=2, **options(parts, data, **settings))
    wait_for_step(parts, 4, process)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=120)
    stopped = [len(lines) for lines in masks("masks_parts")]
    assert stopped[0] == stopped[1] < 15
    done = run("tests/cifar/record_masks.py", processes=2, **options(parts, data, **settings))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = masks("masks_whole")
    assert len(first) == len(second) == 15
    assert sum(a == b for a, b in zip(first, second)) <= 1  # 20 coins fall alike once in a million
    assert masks("masks_parts") == [first, second]
    assert metrics(parts) == metrics(whole)


RECIPES = sorted((ROOT / "cifar/recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_whole(recipe):
    config, _ = parse(Config, [f"--config={recipe}"])
    if config.model.name.startswith("resnet"):
        config.model.args["depth"] = 11  # 1001 layers take seconds
    with torch.device("meta"):
        build_model(config.model, 10)
    if "cifar" in recipe.stem:
        assert (config.augment.pad, config.augment.hflip, config.optim.clip_value) == (4, 0.5, 10.0)
        assert recipe.stem.endswith(config.data.path.removeprefix("data/"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--optim.lrr=1"], "optim.lrr: unknown key; did you mean 'optim.lr'?"),
        (["--augment.pad=-1"], "augment.pad = -1: expected 0 (off) or more"),
        (["--augment.hflip=2"], "augment.hflip = 2.0: expected a probability"),
        (["--data.max_unreadable=2"], "data.max_unreadable = 2.0: expected a share"),
        (["--schedule.begin_epoch=-1"], "schedule.begin_epoch = -1.0: expected 0 or more"),
    ],
)
def test_wrong_settings_are_one_line(argv, words):
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        parse(Config, argv)
    assert "\n" not in str(raised.value)


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, data):
    done = run("cifar/train.py", **options(tmp_path / "run", tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "nowhere' is not an existing folder" in error_line(done)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("cifar/eval.py", ["nowhere"], "'nowhere' does not exist"),
        ("cifar/eval.py", [], "expected first a run's folder"),
        ("cifar/plot.py", ["nowhere"], "'nowhere' is not an existing folder"),
        ("cifar/plot.py", ["tests"], "tests: no evaluation in metrics.jsonl or in TensorBoard's event files"),
        ("cifar/plot.py", [], "runs"),
    ],
)
def test_more_mistakes_are_one_line(script, words, expected):
    done = run(script, *words)
    assert done.returncode == 2
    assert expected in error_line(done)
