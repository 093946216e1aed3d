"""Train a classifier of small images: `accelerate launch cifar/train.py --config cifar/recipes/RECIPE.yaml`.

Without arguments it trains a small FBN network on scikit-learn's handwritten digits.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

import cifar.models  # noqa: F401  (registers the models)
from cifar.prepare import digits, write
from common.config import parse
from common.data.memory import (
    CropConfig,
    MemoryConfig,
    MemorySet,
    evaluation_batches,
    load_memory,
    train_batches,
)
from common.data.order import Division, Order
from common.data.source import DataError
from common.engine.config import EngineConfig
from common.engine.setup import start_accelerator
from common.engine.trainer import Data, total_steps
from common.errors import run_main
from common.models.build import ModelConfig, build_model
from common.report.summary import Expectation
from common.training import run_training

DIGITS = Path(__file__).parent / "recipes" / "digits.yaml"


@dataclass
class Config(EngineConfig):
    """Train a classifier of small images. Without --config the recipe is cifar/recipes/digits.yaml."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: MemoryConfig = field(default_factory=MemoryConfig)
    augment: CropConfig = field(default_factory=CropConfig)
    expect: Expectation = field(default_factory=Expectation)


def main() -> int:
    """Train as the command line says; returns the exit code."""
    config, _ = parse(Config, default_recipe=DIGITS, description=__doc__)
    accelerator = start_accelerator(config)
    prepare_default_data(config, accelerator)
    data = open_data(config, accelerator)
    model = build_model(config.model, len(data.classes))
    return run_training(config, accelerator, model, data, config.expect)


def open_data(config: Config, accelerator: Accelerator) -> Data:
    """The two splits on the device, in the order and the parts that this process sees."""
    train, world, rank = config.train, accelerator.num_processes, accelerator.process_index
    training = load_memory(config.data, config.data.train, config.augment.size, training=True)
    validation = open_validation(config, training.classes)
    fingerprint = f"{training.fingerprint()} {validation.fingerprint()}"
    training, validation = (split.to(accelerator.device) for split in (training, validation))
    order = Order(len(training), train.seed)
    division = Division(train.batch_size, train.accumulation, world, rank)
    steps, eval_batch_size = total_steps(train, len(training)), -(-train.eval_batch_size // world)
    return Data(
        samples=len(training),
        classes=training.classes,
        train=train_batches(training, config.augment, order, division, steps),
        val=evaluation_batches(validation, config.augment, eval_batch_size, world, rank),
        fingerprint=fingerprint,
        max_unreadable=config.data.max_unreadable,
    )


def open_validation(config: Config, classes: tuple[str, ...] | None = None) -> MemorySet:
    """The split that is evaluated on; its classes must be among ``classes``, where those are known."""
    data = load_memory(config.data, config.data.val, config.augment.size, training=False)
    if classes is not None and data.classes != classes[: len(data.classes)]:
        raise DataError(f"{config.data.path}: {config.data.val} has other classes than {config.data.train}")
    return data


def prepare_default_data(config: Config, accelerator: Accelerator) -> None:
    """Make the embedded digits where the default recipe looks for them, so that training needs no other step."""
    path = Path(config.data.path)
    with accelerator.local_main_process_first():
        if config.data.path == MemoryConfig.path and not path.exists():
            print(f"making the embedded digits in {path}", file=sys.stderr)
            with contextlib.suppress(FileExistsError):  # another run was faster
                write(path, "memory", *digits(CropConfig.size))


if __name__ == "__main__":
    run_main(main)
