"""Whether maps of attention show what counts: `nice python benchmarks/occlusion.py` (9 short trainings).

Three seeds each of the demo (image/train.py without arguments) and of benchmarks/digits_mechanisms.py's SANs. In every
validation digit a grey square of 20×20 of its 64×64 pixels hides where a map is highest, where it is lowest, where
another digit's map is highest, and eight random places. The cost is the fall of the true class's probability. Maps: the
evidence for the class (common.report.evidence), and the weights alone: how much of each position P and Q, or the
footprints, take. Writes the numbers as JSON, and prints them as the table of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import digits_mechanisms
import torch
from cifar_digits import QUIET, script
from torch import Tensor, nn
from torch.nn import functional as F

from common.data.augment import AugmentConfig
from common.environment import environment
from common.export import open_model
from common.report.evidence import evidence, on_inputs
from common.report.maps import Footprints, Transforms, attention_maps
from common.report.occlusion import excess, occlude
from image.train import Config
from image.visualize import read

SIZE, SIDE = (64, 64), 20
DEMO = "the demo, BAT"
NETS = (DEMO, "SAN, pairwise", "SAN, patchwise")
COMPARED = (("highest", "random"), ("lowest", "random"), ("highest", "others"))


def main() -> None:
    """Train, measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/digits_mechanisms"), help="folder for runs and data"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/occlusion.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = arguments.runs / "data"
    if not data.exists():
        script("image/prepare.py", "digits", data)
    images, targets = validation(data)
    results: dict[str, list[dict[str, Any]]] = {}
    for label in NETS:
        for seed in range(arguments.seeds):
            model, _ = open_model(str(trained(arguments.runs, data, label, seed)))
            for kind, numbers in measured(model, images, targets).items():
                results.setdefault(f"{label}: {kind}", []).append(numbers)
    print(table(results))
    content = {"results": results, "device": "CPU, one thread", "side": SIDE, "size": SIZE} | environment()
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


def validation(data: Path) -> tuple[Tensor, Tensor]:
    """The digits as the networks see them, and their classes."""
    config = Config(augment=AugmentConfig(size=SIZE[0], crop=1.0))
    files = sorted((data / "val").glob("*/*.jpg"))
    return torch.stack([read(str(file), config) for file in files]), torch.tensor(
        [int(file.parent.name) for file in files]
    )


def trained(runs: Path, data: Path, label: str, seed: int) -> Path:
    """The folder of a run, trained to its end."""
    if label != DEMO:
        run = digits_mechanisms.folder_of(runs, label, seed)
        if not (run / "evaluation.json").is_file():  # written once, at the end
            digits_mechanisms.train(runs, data, label, seed)
        return run
    run = runs / f"demo-{seed}"
    options = QUIET | {"out": run, "data.path": data, "train.seed": seed, "data.workers": 1}
    script("image/train.py", *(f"--{key}={value}" for key, value in options.items()))
    return run


def measured(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, dict[str, Any]]:
    """By kind of map: what hiding a random square costs, and what others cost more, with standard errors."""
    parts = [evidence(model, x, t) for x, t in zip(images.split(64), targets.split(64))]
    shares = {name: torch.cat([part[name] for _, part in parts]) for name in parts[0][1]}
    alone = torch.stack([weights_alone(model, x) for x in images])
    right = (torch.cat([logits for logits, _ in parts]).argmax(1) == targets).float().mean()
    rows = {}
    for kind, heat in {"evidence": on_inputs(shares, SIZE), "weights alone": alone}.items():
        costs = occlude(model, images, targets, heat, SIDE)
        rows[kind] = {"top1": 100 * float(right), "random": float(costs.random.mean())} | {
            f"{more} - {than}": excess(getattr(costs, more), getattr(costs, than)) for more, than in COMPARED
        }
    return rows


def weights_alone(model: nn.Module, image: Tensor) -> Tensor:
    """How much of each pixel all modules take, each in shares of 1."""
    taken = []
    for maps in attention_maps(model, image[None])[1]:
        if isinstance(maps, Transforms):
            heat = (maps.p.sum(1)[:, :, None] * maps.q.sum(2)[:, None]).mean(0)
        else:
            assert isinstance(maps, Footprints)
            _, area, height, width = maps.weights.shape
            sides = (height * maps.stride, width * maps.stride)
            weights = maps.weights.abs().mean(0).reshape(1, area, height * width)
            heat = F.fold(weights, sides, maps.side, padding=maps.side // 2, stride=maps.stride)[0, 0]
        large = F.interpolate(heat[None, None], size=SIZE, mode="bilinear", align_corners=False)[0, 0]
        taken.append(large / large.sum())
    return torch.stack(taken).mean(0)


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """As in docs/results.md: points of probability, with the standard error over the digits, by seed."""
    lines = ["| map | random square | highest − random | lowest − random | highest − another digit's |"]
    lines.append("|---|--:|--:|--:|--:|")
    for label, rows in results.items():
        cells = [", ".join(f"{100 * row['random']:.1f}" for row in rows)]
        for more, than in COMPARED:
            pairs = [row[f"{more} - {than}"] for row in rows]
            cells.append(", ".join(f"{100 * mean:.1f} ± {100 * error:.1f}" for mean, error in pairs))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
