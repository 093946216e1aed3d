"""Peak memory and time of ResNet-1001's training step with and without gradient checkpointing by stage.

    python benchmarks/resnet1001_memory.py [--batch 4] [--model resnet1001_fbn]

Each variant has a process of its own. Memory is, on a GPU, the allocator's peak, else the largest resident set
less what it had before the first step; time is the median step's, on a GPU of the wall, else of one thread's processor.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from torch import nn

import cifar.models  # noqa: F401  (registers the models)
from common.environment import environment


def main() -> None:
    """Measure both variants, print and write; or, as the child process, measure one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet1001_fbn")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/resnet1001_memory.json"))
    parser.add_argument("--variant", choices=("plain", "checkpointing"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(measure(arguments)))
        return
    results = {}
    for variant in ("plain", "checkpointing"):
        command = [sys.executable, *sys.argv, f"--variant={variant}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[variant] = json.loads(done.stdout)
        print(f"{variant}: {results[variant]['gib']:.2f} GiB, {results[variant]['seconds']:.2f} s a step")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    settings = {"model": arguments.model, "batch": arguments.batch, "size": 32, "precision": "fp32"}
    content = {"results": results, "device": device} | settings | environment()
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """One variant's peak memory (GiB) and time of a step (s)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model(arguments.model).to(device).train()
    model.set_grad_checkpointing(arguments.variant == "checkpointing")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(arguments.batch, 3, 32, 32, device=device)
    targets = torch.arange(arguments.batch, device=device) % 10
    before, times = memory(device), []
    for _ in range(arguments.steps):
        begun = clock(device)
        nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(clock(device) - begun)
    return {"gib": (memory(device) - before) / 2**30, "seconds": statistics.median(times)}


def memory(device: torch.device) -> int:
    """Bytes at the peak so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB


def clock(device: torch.device) -> float:
    """Seconds: wall-clock time after the device has caught up, or this process's own processor time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
