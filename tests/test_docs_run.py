"""Every command of the docs is run, one after the other, as a new user would, on small real data.

What the commands name, a folder of archives or a published checkpoint, is made first; options that make training
short are added behind. The few commands that are not run here say where they are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

import image.models  # noqa: F401  (registers the models)
from common.data.video.digits import prepare_moving_digits
from tests.common.data.archives import write_archives
from tests.processes import ROOT
from tests.test_docs import COMMANDS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("docs")]

SHORT = "--train.epochs 1 --train.batch_size 4 --train.eval_batch_size 4 --log.every 1 --data.workers 0"
TINY = json.dumps({"layers": [1] * 4, "channels": [8] * 4, "bat_size": 2, "nl_mod": [1, 1, 1000]})
TINY_IMAGES = (
    f"{SHORT} --augment.size 64 --schedule.name cosine --schedule.warmup_epochs 0 --model.args '{TINY}'"
)
TINY_SAN = "--model.args.widths [32,32,32,32,32] --model.args.kernels [3,3,3,3,3]"
TINY_CLIPS = (
    f"{SHORT} --clip.size 32 --clip.short_side 32 --clip.seq_length 4 --clip.sample_rate 3 --schedule.warmup_epochs 0 "
    """--model.args '{"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "bat_size": 2, "nonlocal_mod": 1}'"""
)
DIGITS = f"{SHORT} --train.batch_size 64 --train.eval_batch_size 64"
RECIPE = f"--data.path data/imagenet {TINY_IMAGES}"

NOT_HERE = {
    "make demo": "the whole environment anew: by hand, from fresh clones",
    "make test": "this is it",
    "source .venv/bin/activate": "a shell's own",
    "python image/train.py --data.path https://host/imagenet-wds --data.cache /scratch/pairwise --data.cache_gb 160": (
        "tests/common/data/test_remote.py, with a real server"
    ),
    "python benchmarks/scaling.py": "a measurement of ten minutes",
    "cp slurm/site.env.example slurm/site.env": "would configure this checkout",
}
SLURM = "tests/slurm, on a real SLURM"

# A command of the docs → what to put in the place of its words, and behind it.
CHANGES: dict[str, tuple[dict[str, str], str]] = {
    "python image/prepare.py imagenet ARCHIVES data/imagenet --format webdataset": (
        {"ARCHIVES": "archives"},
        "",
    ),
    "accelerate launch image/train.py --config image/recipes/resnet50_bat.yaml --out runs/resnet50_bat": (
        {},
        TINY_IMAGES,
    ),
    "accelerate launch image/train.py --config image/recipes/resnet50_bat.yaml --out runs/mine "
    "--optim.lr 0.05 --train.precision bf16 --train.channels_last true": ({}, TINY_IMAGES),
    "python image/eval.py san10_pairwise.pth --model.name san10_pairwise --data.path data/imagenet": (
        {},
        "--data.workers 0",
    ),
    "python image/prepare.py imagenet archives data/imagenet --format folder": (
        {"data/imagenet": "data/folders"},
        "",
    ),
    "python image/prepare.py imagenet archives data/imagenet-480 --resize 480 --quality 90 --shuffle 0 --parts 16": (
        {"16": "2"},
        "",
    ),
    "accelerate launch image/train.py": ({}, DIGITS),
    "accelerate launch image/train.py --model.name san10_pairwise --model.args.layers [1,1,1,1,1]": (
        {},
        f"{DIGITS} --out runs/san {TINY_SAN}",
    ),
    "accelerate launch image/train.py --config RECIPE.yaml --train.epochs 30 --optim.lr 0.05 --out runs/short": (
        {"RECIPE.yaml": "image/recipes/resnet50_bat.yaml"},
        RECIPE,
    ),
    "accelerate launch --num_processes 8 --mixed_precision no image/train.py --config RECIPE.yaml": (
        # Several processes on the CPU want the launcher's file (docs/scaling.md).
        {"RECIPE.yaml": "image/recipes/resnet50_bat.yaml", "8": "1"},
        f"--out runs/launched {RECIPE}",
    ),
    "torchrun --nproc_per_node 2 image/train.py": ({}, f"--out runs/two {DIGITS}"),
    "python image/train.py --out runs/profiled --profile --train.epochs 1": ({}, "--data.workers 0"),
    "python image/train.py --out runs/profiled2 --profile --profile_memory --train.epochs 1": (
        {},
        "--data.workers 0",
    ),
    "python cifar/prepare.py digits DATA": ({"DATA": "data/digits32"}, ""),
    "python cifar/train.py --data.path DATA --out RUN": (
        {"DATA": "data/digits32", "RUN": "RUN0"},
        "--train.epochs 1",
    ),
    "python cifar/eval.py RUN0 RUN1 RUN2 --summary errors.json": ({"RUN1 ": "", "RUN2 ": ""}, ""),
    "python cifar/plot.py RUN0 RUN1 --out curves": ({"RUN1 ": ""}, ""),
    "python video/train.py": ({}, TINY_CLIPS),
    "accelerate launch video/train.py": ({}, f"--out runs/moving {TINY_CLIPS}"),
    "accelerate launch video/train.py --config video/recipes/c2d_3dbat.yaml --weights_2d resnet50_bat.pth": (
        {
            "--weights_2d resnet50_bat.pth": ""
        },  # of full size; tests/video/test_train.py starts from a small one
        TINY_CLIPS,
    ),
    "python video/eval.py runs/c2d_3dbat_kinetics400 --views 10x3": ({}, "--data.workers 0"),
    "python video/visualize.py runs/c2d_3dbat_kinetics400 VIDEO": ({"VIDEO": "video.mp4"}, ""),
    "python video/visualize.py RUN VIDEO": ({"RUN": "runs/moving-digits", "VIDEO": "video.mp4"}, ""),
    "python -m common.engine.consolidate RUN OUT.safetensors": ({"RUN": "runs/digits"}, ""),
    "python -m common.engine.consolidate RUN OUT.safetensors --plain": (
        {"RUN": "runs/digits", "OUT": "PLAIN"},
        "",
    ),
    "python -m common.report runs/seed0 runs/seed1 runs/seed2 -o report.html": (
        {"runs/seed0": "runs/digits", "runs/seed1": "runs/two", "runs/seed2 ": "runs/san "},
        "",
    ),
    "python image/visualize.py runs/digits IMAGE IMAGE --top 5 --pixels [[0.3,0.5],[0.7,0.5]]": (
        {"IMAGE": "data/digits/val/3/0059.jpg"},
        "",
    ),
    "python image/visualize.py resnet50_bat.pth IMAGE --model.name resnet50_bat --out pictures": (
        {"IMAGE": "data/digits/val/3/0059.jpg"},
        "",
    ),
}
# Commands read what others have made: first those that make it.
ORDER = ("prepare.py", "train.py", "")


ALL = list(dict.fromkeys(" ".join(command.split(" # ")[0].split()) for _, command in COMMANDS))


def plan() -> list[str]:
    """Every command once, in an order in which they work."""
    ours = [c for c in ALL if c not in NOT_HERE and "slurm/" not in c.split("image/")[0].split("--config")[0]]
    stage = {c: next(i for i, word in enumerate(ORDER) if word in c) for c in ours}
    return sorted(ours, key=stage.__getitem__)


def test_every_exception_is_a_command_of_the_docs() -> None:
    assert (set(NOT_HERE) | set(CHANGES)) - set(ALL) == set()


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the repository's commands run, with what their words name."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("image", "video", "cifar", "common", "kernels", "benchmarks", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    write_archives(folder / "archives")
    for name in ("san10_pairwise", "resnet50_bat"):
        classes = 3 if name == "san10_pairwise" else 1000
        weights = timm.create_model(name, num_classes=classes).state_dict()
        torch.save({"state_dict": {f"module.{key}": x for key, x in weights.items()}}, folder / f"{name}.pth")
    prepare_moving_digits(folder / "data" / "moving-digits", {"train": 1, "val": 1})
    kinetics(folder)
    return folder


def kinetics(folder: Path) -> None:
    """Videos in class folders named as Kinetics names them, and its two tables."""
    lines = (folder / "data" / "moving-digits" / "train.txt").read_text().splitlines()
    classes = (folder / "data" / "moving-digits" / "classes.txt").read_text().splitlines()
    table = "label,youtube_id,time_start,time_end,split\n"
    for split, csv in (("train", "train.csv"), ("val", "validate.csv")):
        rows = []
        for number, line in enumerate(lines):
            path, _, label = line.rsplit(" ", 2)
            video = f"video{number:06d}"[-11:].rjust(11, "x")
            to = folder / "VIDEOS" / split / classes[int(label)] / f"{video}_000000_000010.mp4"
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes((folder / "data" / "moving-digits" / path).read_bytes())
            rows.append(f"{classes[int(label)]},{video},0,10,{split}")
        (folder / csv).write_text(table + "\n".join(rows) + "\n")
    (folder / "video.mp4").write_bytes(to.read_bytes())


@pytest.mark.parametrize("command", plan())
def test_command(command: str, user: Path, shell: Callable[[str], None]) -> None:
    words, behind = CHANGES.get(command, ({}, ""))
    done = command
    for word, instead in words.items():
        assert word in done
        done = done.replace(word, instead)
    shell(f"{done} {behind}")


@pytest.fixture
def shell(user: Path) -> Callable[[str], None]:
    binaries = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }

    def run(line: str) -> None:
        done = subprocess.run(
            ["bash", "-c", line], cwd=user, env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"

    return run
