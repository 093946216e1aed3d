"""What the training loop costs over a bare PyTorch loop: `python benchmarks/loop.py`.

Both loops train the same network on the same batches, alternating in blocks of steps. Measured is the processor's
time of one thread, which other processes on the machine do not disturb; on a GPU the wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import image.models  # noqa: F401  (registers the models)
from common.data.loader import Batch
from common.engine.config import EngineConfig, TrainConfig
from common.engine.log import LogConfig
from common.engine.setup import start_accelerator
from common.engine.trainer import Data, Trainer
from common.environment import environment
from common.models.build import ModelConfig, build_model

CLASSES = 10
SMALL = {"layers": [1, 1, 1, 1], "channels": [32, 48, 64, 96], "bat_size": 4, "nl_mod": [1, 1, 1000]}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--steps", type=int, default=10, help="steps in a block")
    parser.add_argument("--blocks", type=int, default=12, help="blocks of each loop")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loop.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    images = torch.randn(4, arguments.batch, 3, arguments.size, arguments.size)
    targets = torch.randint(0, CLASSES, (4, arguments.batch))
    with tempfile.TemporaryDirectory() as folder:
        loops = {"bare": bare(images, targets), "trainer": trainer(images, targets, folder)}
        for loop in loops.values():
            loop(arguments.steps)
        blocks: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(arguments.blocks):
            for name, loop in loops.items():
                begun = clock()
                loop(arguments.steps)
                blocks[name].append((clock() - begun) / arguments.steps)
    seconds = {name: statistics.median(values) for name, values in blocks.items()}
    overhead = statistics.median(t / b for b, t in zip(blocks["bare"], blocks["trainer"])) - 1
    result = {"ms_per_step": {name: 1e3 * value for name, value in seconds.items()}, "overhead": overhead}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    settings = {"batch": arguments.batch, "size": arguments.size, "model": "resnet18_bat", "args": SMALL}
    print(f"{device}: {result['ms_per_step']}, overhead {overhead:.2%}")
    arguments.out.write_text(
        json.dumps(result | settings | {"device": device} | environment(), indent=1) + "\n"
    )


def clock() -> float:
    """Seconds: wall-clock time after the device has caught up, or this process's own processor time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def bare(images: Tensor, targets: Tensor) -> Callable[[int], None]:
    """The loop that one would write by hand."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(ModelConfig("resnet18_bat", SMALL), CLASSES).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    batches = [(x.to(device), y.to(device)) for x, y in zip(images, targets)]

    def run(steps: int) -> None:
        for step in range(steps):
            inputs, labels = batches[step % len(batches)]
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def trainer(
    images: Tensor, targets: Tensor, folder: str, network: ModelConfig | None = None, world: int = 1
) -> Callable[[int], None]:
    """The same work by the engine, with its log entries; in each of ``world`` processes on batches of its own."""
    train = TrainConfig(epochs=10**6, batch_size=images.shape[1] * world)
    config = EngineConfig(out=folder, train=train, log=LogConfig(every=20))
    accelerator = start_accelerator(config)
    batches = [Batch(x.to(accelerator.device), y.to(accelerator.device)) for x, y in zip(images, targets)]

    def endless(step: int) -> Iterator[Batch]:
        while True:
            yield batches[step % len(batches)]
            step += 1

    data = Data(10**6, tuple("0123456789"), endless, lambda: iter(()), "benchmark", 0.01)
    model = build_model(network or ModelConfig("resnet18_bat", SMALL), CLASSES)
    engine = Trainer(config, accelerator, model, data)
    engine.begin()
    stream = endless(0)
    engine.model.train()

    def run(steps: int) -> None:
        for _ in range(steps):
            engine.update(stream)
            if engine.log_due:
                engine.report()
            engine.save_or_stop_if_asked()

    return run


if __name__ == "__main__":
    main()
