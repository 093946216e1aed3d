"""Plain, FBN and full bilinear heads on real data: `python benchmarks/cifar_digits.py` (25 short trainings).

Every network is trained from five seeds with cifar/train.py on scikit-learn's digits, for the same epochs, at 16×16
pixels so that all of it takes half an hour of one slow core. Interrupted, the same command goes on. Writes the numbers
as JSON, and prints them as the table of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from common.engine.run import read_metrics
from common.environment import environment

ROOT = Path(__file__).parent.parent
# FBN's published alternative to a slow start, here besides it: the FB layer learns ten times slower.
FBN = {"optim.lr_scale": '{"bilinear": 0.1}'}
# The bilinear head's features have length 1 in 112,896 dimensions: at 0.05 it reaches 78 % in 12 epochs.
BILINEAR = {"optim.lr": 0.2}
NETS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Inception-BN-small": ("inception_bn_small", {}, {}),
    "Inception-BN-small, FBN": ("inception_bn_small_fbn", {}, FBN),
    "Inception-BN-small, bilinear": ("inception_bn_small_bilinear", {}, BILINEAR),
    "ResNet-20": ("resnet164", {"depth": 20}, {}),
    "ResNet-20, FBN": ("resnet164_fbn", {"depth": 20}, FBN),
}
SETTINGS = {
    "augment.size": 16,
    "augment.pad": 2,
    "augment.hflip": 0.0,
    "train.epochs": 12,
    "train.batch_size": 64,
    "optim.lr": 0.05,
    "optim.weight_decay": 1e-4,
    "optim.clip_value": 10.0,
    "schedule.name": "cosine",
    "schedule.warmup_epochs": 4,
    "schedule.warmup_from": 0.1,
}
QUIET = {"log.every": 1000, "log.tensorboard": "false", "checkpoint.every_minutes": 0, "checkpoint.keep": 1}


def main() -> None:
    """Train, collect, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/cifar_digits"), help="folder for data and runs"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cifar_digits.json"))
    arguments = parser.parse_args()
    if not (arguments.runs / "data").exists():
        script("cifar/prepare.py", "digits", arguments.runs / "data", "--size", SETTINGS["augment.size"])
    jobs = [(label, seed) for seed in range(arguments.seeds) for label in NETS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda job: train(arguments.runs, *job), jobs))
    evaluations = {label: [r for r, job in zip(results, jobs) if job[0] == label] for label in NETS}
    report(evaluations, arguments.out)


def train(runs: Path, label: str, seed: int) -> dict[str, Any]:
    """Train one network to the end; returns its last evaluation."""
    name, args, more = NETS[label]
    run = runs / f"{name}-{seed}"
    own = {"out": run, "data.path": runs / "data", "model.name": name, "model.args": json.dumps(args)}
    options = SETTINGS | more | QUIET | own | {"train.seed": seed}
    script("cifar/train.py", *(f"--{key}={value}" for key, value in options.items()))
    return [entry for entry in read_metrics(run) if entry["split"] == "val"][-1]


def script(path: str, *words: object) -> None:
    """Run one of the project's scripts with this Python; its output goes where ours goes."""
    subprocess.run([sys.executable, ROOT / path, *map(str, words)], check=True)


def report(evaluations: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Print mean ± sample deviation over the seeds, and write every number."""
    rows = {}
    print("\n| network | validation error, % | validation loss | errors of the seeds, % |\n|---|---|---|---|")
    for label, results in evaluations.items():
        errors, losses = [100 - entry["top1"] for entry in results], [entry["loss"] for entry in results]
        rows[label] = {"errors": errors, "losses": losses, "error": spread(errors), "loss": spread(losses)}
        mean, deviation = rows[label]["error"]
        each = ", ".join(f"{error:.2f}" for error in errors)
        loss = "{:.3f} ± {:.3f}".format(*rows[label]["loss"])
        print(f"| {label} | {mean:.2f} ± {deviation:.2f} | {loss} | {each} |")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread a run"
    own = {label: more for label, (_, _, more) in NETS.items() if more}
    content = {
        "results": rows,
        "settings": SETTINGS,
        "own_settings": own,
        "precision": "fp32",
        "device": device,
    } | environment()
    out.write_text(json.dumps(content, indent=1) + "\n")


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample deviation."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
