"""What training on 8 to 1,024 GPUs would come to: `python benchmarks/scaling_model.py`. A model, not a measurement.

It starts from one GPU's measured step (benchmarks/results/published_h200.json: the published programs) and from the
measured writing of checkpoints (benchmarks/results/scaling.json), and adds what is assumed. Each assumption is an
option; all are printed with the result. Data parallel (DDP), the same batch on each GPU.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.config import parse
from common.errors import ConfigError, run_main

RESULTS = Path(__file__).parent / "results"
GPUS = tuple(2**k for k in range(3, 11))


@dataclass
class Assumptions:
    """What the model starts from. Numbers that are 0 are taken from the measured files."""

    model: str = "resnet50_bat/b128/bf16/channels_last"
    """Which measured step: a key of benchmarks/results/published_h200.json."""
    step_ms: float = 0.0
    """One GPU's time of a training step."""
    batch: int = 0
    """Samples of a step on a GPU."""
    parameters: int = 0
    """Of the network."""
    gpus_per_node: int = 8
    """GPUs that share a node's network."""
    node_GB_s: float = 300.0
    """Rate of an all-reduce within a node (bus bandwidth: NVLink)."""
    network_GB_s: float = 40.0
    """Rate of an all-reduce between nodes (bus bandwidth: all network cards of a node together)."""
    latency_us: float = 20.0
    """Of one hop of an all-reduce; a bucket takes 2·log2(nodes or GPUs) of them."""
    bucket_MB: float = 25.0
    """Gradients are reduced in buckets of this size (DDP's default)."""
    overlap: float = 0.8
    """Share of the backward pass (two thirds of a step) behind which reductions hide; the last bucket's never does."""
    jitter: float = 0.02
    """Deviation of a step's time, relative; all wait for the slowest, about √(2·ln GPUs) deviations late."""
    samples: int = 1_281_167
    """Training samples (ImageNet's)."""
    epochs: float = 100
    """Passes over them."""
    sample_kB: float = 110.0
    """Mean size of a sample on the disk (ImageNet's JPEGs as published)."""
    loading_per_GPU: float = 0.0
    """Samples that are read and decoded for a GPU in a second (DALI on the GPU, 8 threads)."""
    storage_GB_s: float = 100.0
    """What the storage gives all nodes together."""
    shard_MB: float = 200.0
    """Size of a shard."""
    state_copies: float = 2.0
    """Checkpoint's size in copies of the float32 weights: 2 with momentum, 3 with AdamW, 1 more with EMA."""
    write_MB_s: float = 0.0
    """Rate at which a checkpoint is encoded, checksummed, written and synced, by one process."""
    to_host_GB_s: float = 20.0
    """Rate at which the state is copied to the host: all that training waits for with asynchronous checkpoints."""
    checkpoint_minutes: float = 10.0
    """Between checkpoints."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "model" and value < 0:
                raise ValueError(f"{name} = {value}: expected 0 or more")


def main() -> None:
    """Print the assumptions and the table."""
    assumed = complete(parse(Assumptions, description=__doc__)[0])
    print("A MODEL, NOT A MEASUREMENT. It assumes:")
    print("  " + ", ".join(f"{name} {value}" for name, value in asdict(assumed).items()))
    rows = [predict(assumed, gpus) for gpus in GPUS]
    print("\n" + table(rows))


def complete(assumed: Assumptions) -> Assumptions:
    """The assumptions with the measured numbers where there is a 0."""
    published = json.loads((RESULTS / "published_h200.json").read_text())
    measured = published["models"].get(assumed.model)
    given = assumed.step_ms and assumed.batch and assumed.parameters
    if measured is None and not given:
        raise ConfigError(
            f"model = {assumed.model!r}: not measured; give --step_ms, --batch and --parameters, or one of "
            + ", ".join(published["models"])
        )
    measured = measured or {"samples": "images", "ms": 0, "batch": 0, "parameters": 0}
    assumed.step_ms = assumed.step_ms or measured["ms"]
    assumed.batch = assumed.batch or measured["batch"]
    assumed.parameters = assumed.parameters or measured["parameters"]
    assumed.loading_per_GPU = assumed.loading_per_GPU or published["loading"][f"{measured['samples']}_per_s"]
    written = json.loads((RESULTS / "scaling.json").read_text())["checkpoint"]
    assumed.write_MB_s = assumed.write_MB_s or round(written["MB_per_s"], 1)
    return assumed


def predict(a: Assumptions, gpus: int) -> dict[str, Any]:
    """What ``gpus`` GPUs would come to."""
    compute = a.step_ms / 1e3
    gradients = 4 * a.parameters
    reducing = exposed_reduction(a, gpus, compute)
    step = compute * (1 + a.jitter * math.sqrt(2 * math.log(gpus))) + reducing
    wanted = gpus * a.batch / step
    limit = min(gpus * a.loading_per_GPU, a.storage_GB_s * 1e6 / a.sample_kB)
    rate = min(wanted, limit)
    state_MB = a.state_copies * gradients / 1e6
    write, pause = state_MB / a.write_MB_s, state_MB / 1e3 / a.to_host_GB_s
    interval = 60 * a.checkpoint_minutes
    shards = math.ceil(a.samples * a.sample_kB / 1e3 / a.shard_MB)
    return {
        "GPUs": gpus,
        "batch": gpus * a.batch,
        "samples/s": round(rate),
        "of one GPU's": f"{rate / (gpus * a.batch / compute):.0%}",
        "limit": "data" if wanted > limit else "network" if reducing > 0.1 * compute else "compute",
        "hours": round(a.epochs * a.samples / rate / 3600, 2),
        "data GB/s": round(rate * a.sample_kB / 1e6, 2),
        "shards/GPU": round(shards / gpus, 1),
        "checkpoint s": round(write, 2),
        "its share": f"{write / (interval + write):.2%}",
        "asynchronous": f"{pause / (interval + pause):.3%}",
    }


def exposed_reduction(a: Assumptions, gpus: int, compute: float) -> float:
    """Seconds of a step in which the GPUs only reduce gradients (a ring within nodes, and between them)."""
    nodes = math.ceil(gpus / a.gpus_per_node)
    local = min(gpus, a.gpus_per_node)
    gradients = 4 * a.parameters
    buckets = math.ceil(gradients / (a.bucket_MB * 1e6))
    seconds = 2 * (local - 1) / local * gradients / (a.node_GB_s * 1e9)
    if nodes > 1:
        seconds = max(seconds, 2 * (nodes - 1) / nodes * gradients / (a.network_GB_s * 1e9))
    seconds += buckets * 2 * math.log2(gpus) * a.latency_us / 1e6
    last = seconds / buckets
    return last + max(0.0, seconds - last - a.overlap * 2 / 3 * compute)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    head = list(rows[0])
    lines = [head, ["--:"] * len(head), *([str(row[key]) for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run_main(main)
