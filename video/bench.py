"""Time and memory of a training step of the video networks: ``python -m video.bench``.

A step is forward, cross entropy, backward and SGD, on synthetic clips that are on the device, with cuDNN's search
for algorithms. The result is JSON: for every network the median time of a step over a number of blocks of steps,
clips a second, peak memory, and the published program's numbers on one H200 beside them. Needs torch and timm only.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import timm
import torch
from torch import nn

import video.models  # noqa: F401  (registers the models)
from common.errors import UserError, run_main

# Training steps of the published programs: one H200, torch 2.11 with CUDA 13.0, 16 clips of 8×224². `c2d on frames`
# is a plain C2D of torch's own layers by 2-D convolutions over frames.
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "c2d_resnet50": {
        "fp32": {"ms": 45.4, "clips_s": 352.7, "peak_GiB": 8.3},
        "bf16": {"clips_s": 400, "peak_GiB": 4.7},
        "bf16, channels_last": {"ms": 35.0, "clips_s": 457.8, "peak_GiB": 5.0},
        "c2d on frames, bf16, channels_last": {"ms": 29.7, "clips_s": 539.6, "peak_GiB": 4.54},
        "c2d on frames, bf16, channels_last, compiled": {"ms": 27.5, "clips_s": 582.4, "peak_GiB": 4.38},
    },
    "c2d_resnet50_bat2d": {
        "fp32": {"ms": 61.4, "clips_s": 260.6, "peak_GiB": 10.77},
        "bf16": {"clips_s": 283, "peak_GiB": 6.0},
    },
    "c2d_resnet50_bat3d": {
        "fp32": {"ms": 107.8, "clips_s": 148.4, "peak_GiB": 11.63},
        "bf16": {"ms": 101.4, "clips_s": 157.8, "peak_GiB": 6.42},
    },
    "c2d_resnet50_nl": {
        "fp32": {"ms": 64.2, "clips_s": 249.4, "peak_GiB": 10.4},
        "bf16": {"clips_s": 312, "peak_GiB": 6.3},
    },
    "i3d_resnet50": {
        "fp32": {"ms": 54.9, "clips_s": 291.2, "peak_GiB": 8.3},
        "bf16": {"clips_s": 337, "peak_GiB": 4.8},
    },
}
# What --cpu measures, to see that the benchmark works: small clips and networks.
SMALL: dict[str, Any] = {"batch": 2, "frames": 4, "size": 64, "steps": 1, "blocks": 2, "warmup": 1}
SMALL_MODEL: dict[str, Any] = {"layers": (1, 2, 2, 1), "channels": (8, 16, 32, 64)}


def main() -> int:
    """Measure and print."""
    settings = parse()
    if not settings.cpu and not torch.cuda.is_available():
        raise UserError("no GPU found: the benchmark measures a GPU; --cpu runs a small version without one")
    device = torch.device("cpu" if settings.cpu else "cuda")
    torch.backends.cudnn.benchmark = True
    results = {name: measure(name, settings, device) for name in settings.models}
    print(json.dumps({"settings": vars(settings), "results": results} | environment(device), indent=1))
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the numbers of ``--cpu`` where none are given."""
    parser = argparse.ArgumentParser(prog="python -m video.bench", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=list(PUBLISHED), help="names in timm's registry")
    parser.add_argument("--batch", type=int, default=16, help="clips in a step")
    parser.add_argument("--frames", type=int, default=8, help="of a clip")
    parser.add_argument("--size", type=int, default=224, help="height and width")
    parser.add_argument("--steps", type=int, default=10, help="steps in a block")
    parser.add_argument("--blocks", type=int, default=8, help="blocks, whose median time is taken")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the first block")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="bf16 is autocast")
    parser.add_argument("--contiguous", action="store_true", help="not in the channels_last_3d memory format")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--cpu", action="store_true", help="small networks and clips on the CPU")
    if "--cpu" in (sys.argv if arguments is None else arguments):
        parser.set_defaults(**SMALL)
    settings = parser.parse_args(arguments)
    known = [name for name in settings.models if timm.is_model(name)]
    if known != settings.models:
        raise UserError(f"no such models: {', '.join(sorted(set(settings.models) - set(known)))}")
    return settings


def measure(name: str, settings: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Milliseconds, clips a second and peak memory of ``name``'s training step, and the published numbers."""
    step = training_step(name, settings, device)
    for _ in range(settings.warmup):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(settings.blocks):
        begun = clock(device)
        for _ in range(settings.steps):
            step()
        times.append((clock(device) - begun) / settings.steps)
    seconds = statistics.median(times)
    result: dict[str, Any] = {"ms": 1e3 * seconds, "clips_s": settings.batch / seconds}
    if device.type == "cuda":
        result["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return result | {"published": PUBLISHED.get(name, {})}


def training_step(name: str, settings: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """A function that trains ``name`` for a step, always on the same clips."""
    memory_format = torch.contiguous_format if settings.contiguous else torch.channels_last_3d
    model = timm.create_model(name, **(SMALL_MODEL if settings.cpu else {}))
    model = model.to(device, memory_format=memory_format).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    clips = torch.randn(settings.batch, 3, settings.frames, settings.size, settings.size, device=device)
    clips = clips.contiguous(memory_format=memory_format)
    targets = torch.randint(0, model.num_classes, (settings.batch,), device=device)
    network = torch.compile(model) if settings.compile else model
    bf16 = settings.precision == "bf16"

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = nn.functional.cross_entropy(network(clips), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def clock(device: torch.device) -> float:
    """Seconds, after the device has caught up."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def environment(device: torch.device) -> dict[str, str]:
    """What the numbers are of."""
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    return {
        "device": where,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    run_main(main)
