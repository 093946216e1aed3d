"""Every mechanism on real data: `nice python benchmarks/digits_mechanisms.py` (30 short trainings).

A small ResNet with average pooling, the same with BAT, NOAH and FBN, and small SANs of both kinds are trained by
image/train.py on scikit-learn's digits at 64×64 for the same epochs, from five seeds each. Interrupted, the same
command goes on. Writes the numbers as JSON, and prints them as the table of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from cifar_digits import QUIET, script, spread
from torch.nn import functional as F

import image.models  # noqa: F401  (registers the models)
from common.engine.run import read_metrics
from common.environment import environment
from common.models.build import ModelConfig, build_model
from common.models.table import count_params

RESNET = {"layers": [1, 1, 1, 1], "channels": [32, 48, 64, 96]}
SAN = {"layers": [1, 1, 1, 1], "widths": [32, 64, 128, 256], "kernels": [3, 3, 5, 5]}
NETS = {
    "ResNet, average pooling": ModelConfig("resnet18", RESNET),
    "ResNet, BAT": ModelConfig("resnet18", RESNET, {"bat": {"after": ["layer2", "layer3"], "size": 4}}),
    "ResNet, NOAH": ModelConfig("resnet18", RESNET, {"noah": {"heads": 4}}),
    "ResNet, FBN": ModelConfig("resnet18", RESNET, {"fbn": {}}),
    "SAN, pairwise": ModelConfig("san10_pairwise", SAN),
    "SAN, patchwise": ModelConfig("san10_patchwise", SAN),
}
SETTINGS = {
    "augment.size": 64,
    "augment.scale": "[0.6, 1.0]",
    "augment.hflip": 0.0,
    "augment.crop": 1.0,
    "train.epochs": 8,
    "train.batch_size": 64,
    "train.eval_every": 8,
    "optim.name": "sgd",
    "optim.lr": 0.1,
    "optim.weight_decay": 5e-4,
    "schedule.name": "cosine",
    "schedule.warmup_epochs": 1,
    "data.workers": 1,
}
# At the others' settings the FB term, which squares its inputs, diverges: it learns ten times slower, and clipped.
OWN = {"ResNet, FBN": {"optim.lr_scale": '{"bilinear": 0.1}', "optim.clip_norm": 1.0}}
SAMPLES, CLASSES = 1442, 10


def main() -> None:
    """Train, collect, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/digits_mechanisms"), help="folder for runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/digits_mechanisms.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = arguments.runs / "data"
    if not data.exists():
        script("image/prepare.py", "digits", data)
    accuracies: dict[str, list[float]] = {label: [] for label in NETS}
    for seed in range(arguments.seeds):
        for label in NETS:
            accuracies[label].append(train(arguments.runs, data, label, seed))
    report(accuracies, arguments.out)


def train(runs: Path, data: Path, label: str, seed: int) -> float:
    """Train one network to the end; returns its validation accuracy, %."""
    net, run = NETS[label], folder_of(runs, label, seed)
    own = {"out": run, "data.path": data, "train.seed": seed, "model.name": net.name}
    own |= {"model.args": json.dumps(net.args), "model.attach": json.dumps(net.attach)}
    options = SETTINGS | QUIET | OWN.get(label, {}) | own
    script("image/train.py", *(f"--{key}={value}" for key, value in options.items()))
    return [entry["top1"] for entry in read_metrics(run) if entry["split"] == "val"][-1]


def folder_of(runs: Path, label: str, seed: int) -> Path:
    """Where a network is trained."""
    return runs / f"{label.replace(', ', '-').replace(' ', '-').lower()}-{seed}"


def epoch_seconds(net: ModelConfig, steps: int = 5) -> float:
    """Processor time of an epoch's forward and backward passes and updates: the median step's, times the steps."""
    torch.manual_seed(0)
    batch, size = int(SETTINGS["train.batch_size"]), int(SETTINGS["augment.size"])
    model = build_model(net, CLASSES).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images, targets, times = torch.randn(batch, 3, size, size), torch.arange(batch) % CLASSES, []
    for _ in range(steps):
        begun = time.process_time()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - begun)
    return statistics.median(times) * SAMPLES / batch


def report(accuracies: dict[str, list[float]], out: Path) -> None:
    """Print mean ± sample deviation over the seeds, and write every number."""
    rows: dict[str, dict[str, Any]] = {}
    print("\n| network | validation top-1, % | of the seeds | parameters | time of an epoch, s |")
    print("|---|--:|---|--:|--:|")
    for label, values in accuracies.items():
        mean, deviation = spread(values)
        params, seconds = count_params(build_model(NETS[label], CLASSES)), epoch_seconds(NETS[label])
        rows[label] = {
            "top1": values,
            "mean": mean,
            "deviation": deviation,
            "params": params,
            "seconds": seconds,
        }
        each = ", ".join(f"{value:.2f}" for value in values)
        print(f"| {label} | {mean:.2f} ± {deviation:.2f} | {each} | {params:,} | {seconds:.1f} |")
    models = {label: {"args": net.args, "attach": net.attach} for label, net in NETS.items()}
    content = {"results": rows, "settings": SETTINGS, "own_settings": OWN, "models": models}
    content["device"] = "CPU, one thread"
    out.write_text(json.dumps(content | environment(), indent=1) + "\n")


if __name__ == "__main__":
    main()
