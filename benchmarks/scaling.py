"""Weak scaling on CPU processes, and what DDP costs: `python benchmarks/scaling.py`.

Every process trains on batches of its own, by the project's engine, with one thread. In each round run, one after the
other, a process alone; two that know nothing of each other, which is all that the machine can give; and the same two as
DDP. The medians of the rounds' ratios are what counts: wall-clock time on a machine that is shared. The processors'
time for a sample is told beside it, which other load changes less. At the end checkpoints of ResNet-50 with BAT are
written, as the engine writes them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from loop import CLASSES, SMALL, trainer

from common.engine import checkpoint
from common.engine.checkpoint import CheckpointConfig
from common.engine.writer import Writer
from common.environment import environment
from common.models.build import ModelConfig, build_model


@dataclass
class Work:
    """What a process does."""

    network: ModelConfig
    batch: int
    size: int
    environment: dict[str, str] = field(default_factory=dict)


def main() -> None:
    """Measure, print and write."""
    arguments = _parser().parse_args()
    network = ModelConfig(arguments.model, json.loads(arguments.args))
    one = Work(network, arguments.batch, arguments.size)
    groups = {
        "alone": Group([one]),
        "two_runs": Group([one, one]),
        "ddp": Group([Work(network, arguments.batch, arguments.size, environment=e) for e in ranks(2)]),
    }
    for group in groups.values():
        group.run(arguments.steps)
    rounds = []
    for _ in range(arguments.rounds):
        load = os.getloadavg()[0]
        rounds.append({name: group.run(arguments.steps) for name, group in groups.items()} | {"load": load})
    for group in groups.values():
        group.close()
    with tempfile.TemporaryDirectory(dir=arguments.out.parent) as folder:
        result = summary(rounds) | {"checkpoint": checkpoints(arguments.checkpoints, Path(folder))}
    print(json.dumps(result, indent=1))
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    device = f"CPU, {os.cpu_count()} cores, shared"
    content = result | {"rounds": rounds, "settings": settings, "device": device} | environment()
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and quartiles of what DDP keeps of two runs' speed."""

    def ratios(over: str, under: str, key: str = "samples_per_s") -> list[float]:
        return [r[over][key] / r[under][key] for r in rounds]

    names = [name for name in rounds[0] if name != "load"]
    return {
        "samples_per_s": {n: statistics.median(r[n]["samples_per_s"] for r in rounds) for n in names},
        "cpu_ms_per_sample": {n: statistics.median(r[n]["cpu_ms_per_sample"] for r in rounds) for n in names},
        "two_runs_of_twice_alone": statistics.median(ratios("two_runs", "alone")) / 2,
        "ddp_of_twice_alone": statistics.median(ratios("ddp", "alone")) / 2,
        "ddp_of_two_runs": statistics.median(ratios("ddp", "two_runs")),
        "ddp_of_two_runs_quartiles": statistics.quantiles(ratios("ddp", "two_runs"), n=4)[::2],
        "ddp_cpu_of_two_runs": statistics.median(ratios("ddp", "two_runs", "cpu_ms_per_sample")),
        "load_median": statistics.median(r["load"] for r in rounds),
    }


def checkpoints(repeats: int, folder: Path) -> dict[str, float]:
    """Writing a checkpoint of ResNet-50 with BAT and its momentum to a disk, in one process; medians."""
    model = build_model(ModelConfig("resnet50_bat"), 1000)
    content = {
        "model.safetensors": model.state_dict(),
        "optimizer.pt": {
            name: {"momentum_buffer": torch.randn_like(p)} for name, p in model.named_parameters()
        },
    }
    writer, seconds, pauses = Writer(folder, CheckpointConfig(asynchronous=True)), [], []
    for step in range(repeats):
        begun = time.perf_counter()
        writer.save(step, content, None)
        pauses.append(time.perf_counter() - begun)
        writer.wait()
        seconds.append(time.perf_counter() - begun)
    writer.close()
    newest = checkpoint.newest(folder)
    assert newest is not None
    megabytes = sum(file.stat().st_size for file in newest.iterdir()) / 1e6
    wall = statistics.median(seconds)
    return {
        "MB": megabytes,
        "seconds": wall,
        "MB_per_s": megabytes / wall,
        "asynchronous_pause_s": statistics.median(pauses),
    }


class Group:
    """Processes that work at the same time, and wait in between."""

    def __init__(self, works: list[Work]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.samples = sum(work.batch for work in works)
        self.pipes: list[Connection] = []
        self.processes = []
        for work in works:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(theirs, work), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def run(self, steps: int) -> dict[str, float]:
        """Let all take ``steps`` steps; returns samples a second, and the processors' milliseconds a sample."""
        begun = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(steps)
        cpu = sum(pipe.recv() for pipe in self.pipes)
        samples = steps * self.samples
        return {
            "samples_per_s": samples / (time.perf_counter() - begun),
            "cpu_ms_per_sample": 1e3 * cpu / samples,
        }

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self.pipes, self.processes):
            pipe.send(0)
            process.join(30)


def serve(pipe: Connection, work: Work) -> None:
    """A process: take as many steps as the pipe says and answer with the processor's seconds, until it says 0."""
    os.environ |= work.environment
    torch.set_num_threads(1)
    world = int(work.environment.get("WORLD_SIZE", 1))
    torch.manual_seed(os.getpid())
    images = torch.randn(4, work.batch, 3, work.size, work.size)
    targets = torch.randint(0, CLASSES, (4, work.batch))
    with tempfile.TemporaryDirectory() as own:
        run = trainer(images, targets, own, work.network, world)
        pipe.send(None)
        while steps := pipe.recv():
            begun = time.process_time()
            run(steps)
            pipe.send(time.process_time() - begun)


def ranks(world: int) -> list[dict[str, str]]:
    """The environments that a launcher would give the processes of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        {key: str(value) for key, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        for rank in range(world)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18_bat")
    parser.add_argument("--args", default=json.dumps(SMALL), help="the model's arguments, JSON")
    parser.add_argument("--batch", type=int, default=64, help="of a process")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--steps", type=int, default=4, help="in a round, of each process")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--checkpoints", type=int, default=5, help="how many to write")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.json"))
    return parser


if __name__ == "__main__":
    main()
