"""Video training as users run it: real processes on real H.264 files."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import timm
import torch

from common.config import parse
from common.data.video.digits import prepare_moving_digits
from common.engine import checkpoint
from common.errors import ConfigError
from common.models.build import build_model
from tests.processes import ROOT, command, error_line, metrics, run
from tests.video.runs import interrupt, settings, train
from video.train import Config

pytestmark = pytest.mark.xdist_group("video")  # one worker, so that the reference run is made once

RECIPES = sorted((ROOT / "video" / "recipes").glob("*.yaml"))
PUBLISHED = [path for path in RECIPES if path.stem != "digits"]


def weights(folder):
    path = checkpoint.newest(folder / "checkpoints")
    return [(path / name).read_bytes() for name in ("model.safetensors", "optimizer.pt")]


def assert_same_run(folder, reference):
    for split in ("train", "val"):
        assert metrics(folder, split) == metrics(reference, split)
    assert weights(folder) == weights(reference)


def test_a_run_leaves_what_users_look_for(reference):
    assert [entry["step"] for entry in metrics(reference)] == list(range(1, 7))
    assert metrics(reference, "val")[-1]["samples"] == 12
    for name in ("config.yaml", "starts.jsonl", "evaluation.json", "curves.png", "confusion.png"):
        assert (reference / name).stat().st_size > 0


def test_asked_to_stop_it_continues_exactly(digits, reference, tmp_path):
    folder = tmp_path / "stopped"
    assert interrupt(folder, digits, 2, signal.SIGTERM) == 75
    train(folder, digits, data__workers=0)
    assert_same_run(folder, reference)


@pytest.mark.slow
def test_killed_it_continues_exactly(digits, reference, tmp_path):
    folder = tmp_path / "killed"
    for step in (2, 5):
        assert interrupt(folder, digits, step, signal.SIGKILL, checkpoint__every_steps=1) == -signal.SIGKILL
    train(folder, digits, checkpoint__every_steps=1)
    assert_same_run(folder, reference)


def test_corrupt_videos_are_named_and_replaced_and_too_many_stop_the_run(digits, tmp_path):
    path = shutil.copytree(digits, tmp_path / "digits")
    for name in ("train/grows/0001.mp4", "val/fades/0000.mp4"):
        (path / name).write_bytes((path / name).read_bytes()[:900])
    folder = tmp_path / "run"
    train(folder, path, data__max_unreadable=0.1, train__epochs=1)
    lines = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["where"].split()[-1] for line in lines) == [
        "train/grows/0001.mp4",
        "val/fades/0000.mp4",
    ]
    assert all(line["reason"] for line in lines)
    last = metrics(folder, "val")[-1]
    assert (last["samples"], last["unreadable"]) == (12, 1)
    done = run("video/train.py", **settings(tmp_path / "strict", path, train__epochs=1))
    assert done.returncode == 1
    assert "1 unreadable training samples" in error_line(done)


@pytest.mark.slow
def test_two_processes_evaluate_like_one(digits, tmp_path):
    """At a learning rate of 0 only batch norm's statistics move; on two processes the main one's are kept."""
    folder = tmp_path / "both"
    train(folder, digits, processes=2, optim__lr=0.0, train__epochs=1)
    own = metrics(folder, "val")[-1]
    assert (own["samples"], own["unreadable"]) == (12, 0)
    done = run("video/eval.py", folder, views="1x1", clip__num_segments=1)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "eval.json").read_text())["samples"] == 12


@pytest.mark.slow
def test_accelerate_launch_trains_with_the_default_recipe(digits, tmp_path):
    options = {"out": tmp_path / "run", "data.path": digits, "train.epochs": 2, "train.batch_size": 8}
    words = command("video/train.py", **options)[1:]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *words]
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "validation accuracy" in done.stdout


@pytest.mark.slow
def test_time_is_what_the_3d_bat_has_over_plain_c2d(tmp_path):
    """On motions that only the order of frames tells: C2D guesses within each pair, C2D + 3-D BAT does not."""
    path, last = tmp_path / "digits", {}
    prepare_moving_digits(path)
    args = json.dumps({"layers": [1] * 4, "channels": [12, 16, 24, 32], "drop_rate": 0.0})
    for name, options in {"bat": {}, "c2d": {"model.name": "c2d_resnet50", "model.args": args}}.items():
        done = run(
            "video/train.py", **{"out": tmp_path / name, "data.path": path, "data.workers": 1} | options
        )
        assert done.returncode == 0, done.stderr[-3000:]
        last[name] = metrics(tmp_path / name, "val")[-1]["top1"]
    assert last["c2d"] < 60
    assert last["bat"] > last["c2d"] + 20


def test_a_mistake_is_one_line_and_leaves_nothing(digits, tmp_path):
    done = run("video/train.py", **settings(tmp_path / "run", tmp_path / "no"))
    assert done.returncode == 2
    assert f"'{tmp_path}/no' is not an existing folder" in error_line(done)
    assert not (tmp_path / "run").exists()


def test_a_wrong_setting_is_named():
    with pytest.raises(ConfigError, match="clip.colour: 'bgr' is not valid; expected one of rgb, published"):
        parse(Config, ["--clip.colour=bgr"])
    with pytest.raises(ConfigError, match="clip.short_side = 100: expected at least size = 224"):
        parse(Config, ["--clip.short_side=100"])


@pytest.mark.slow
def test_image_weights_are_inflated(digits, tmp_path):
    state = timm.create_model("resnet50", num_classes=7).state_dict()
    file = tmp_path / "resnet50.pth"
    torch.save(state, file)
    options = {"model__name": "i3d_resnet50", "model__args": "{}", "optim__lr": 0.0}
    options |= {"train__batch_size": 4, "train__epochs": 0.2, "clip__num_segments": 1}
    done = train(tmp_path / "run", digits, weights_2d=file, **options)
    assert "inflated" in done.stdout
    assert "left, of other classes: fc.weight" in done.stdout
    done = run("video/train.py", **settings(tmp_path / "other", digits, weights_2d="no.pth"))
    assert "'no.pth' does not exist" in error_line(done)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_the_published_recipes(path):
    config, _ = parse(Config, [f"--config={path}"])
    assert (config.train.epochs, config.train.batch_size, config.train.eval_every) == (100, 64, 5)
    assert (config.optim.lr, config.optim.bias_lr, config.optim.clip_norm) == (0.01, 2.0, 20.0)
    assert config.schedule.milestones == [40, 80]
    assert (config.clip.seq_length, config.clip.sample_rate, config.clip.colour) == (8, 8, "published")
    with torch.device("meta"):
        model = build_model(config.model, 400)
    assert model.drop_rate == 0.5
    blocks = {name for name, _ in model.named_modules() if name.count(".") == 1 and ".nl" in name}
    plain = path.stem in ("c2d", "i3d")
    assert blocks == (
        set() if plain else {f"layer2.nl{i}" for i in (1, 3)} | {f"layer3.nl{i}" for i in (1, 3, 5)}
    )


def test_all_published_runs_have_a_recipe():
    assert {path.stem for path in PUBLISHED} == {
        "c2d",
        "c2d_nl",
        "c2d_bat",
        "c2d_3dbat",
        "i3d",
        "i3d_nl",
        "i3d_bat",
    }
