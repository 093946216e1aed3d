"""What a transform in time buys: `nice python benchmarks/video_digits.py` (6 short trainings).

C2D with 3-D BAT (the demo of video/train.py) and plain C2D of the same size, trained on handwritten digits that move,
whose 12 classes no single frame tells apart; three seeds each, same settings. Interrupted, the same command goes on.
Writes the numbers as JSON, and prints them as the table of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cifar_digits import QUIET, script, spread

from common.engine.run import read_metrics
from common.environment import environment

SMALL = {"layers": [1, 1, 1, 1], "channels": [12, 16, 24, 32], "drop_rate": 0.0}
NETS: dict[str, dict[str, str]] = {
    "C2D + 3-D BAT": {},
    "C2D": {"model.name": "c2d_resnet50", "model.args": json.dumps(SMALL)},
}


def main() -> None:
    """Train, collect, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/video_digits"), help="folder for runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/video_digits.json"))
    arguments = parser.parse_args()
    data = arguments.runs / "data"
    if not data.exists():
        script("video/prepare.py", "digits", data)
    rows = {}
    for label, own in NETS.items():
        values = [train(arguments.runs, data, label, own, seed) for seed in range(arguments.seeds)]
        mean, deviation = spread(values)
        rows[label] = {"top1": values, "mean": mean, "deviation": deviation}
    print("\n| network | validation top-1, % | of the seeds |\n|---|--:|---|")
    for label, row in rows.items():
        each = ", ".join(f"{value:.2f}" for value in row["top1"])
        print(f"| {label} | {row['mean']:.2f} ± {row['deviation']:.2f} | {each} |")
    content = {"results": rows, "own_settings": NETS, "device": "CPU, one thread"} | environment()
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


def train(runs: Path, data: Path, label: str, own: dict[str, str], seed: int) -> float:
    """Train one network to the end; returns its validation accuracy, %."""
    run = runs / f"{label.replace(' + ', '-').replace(' ', '').lower()}-{seed}"
    options = QUIET | own | {"out": run, "data.path": data, "train.seed": seed, "data.workers": 1}
    script("video/train.py", *(f"--{key}={value}" for key, value in options.items()))
    return [entry["top1"] for entry in read_metrics(run) if entry["split"] == "val"][-1]


if __name__ == "__main__":
    main()
