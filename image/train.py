"""Train an image classifier: `accelerate launch image/train.py --config image/recipes/RECIPE.yaml`.

Without arguments it trains a small BAT network on scikit-learn's handwritten digits.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

import image.models  # noqa: F401  (registers the models)
from common.config import parse
from common.data.augment import AugmentConfig, Normalize
from common.data.digits import prepare_digits
from common.data.images import DataConfig, open_images
from common.data.loader import evaluation_loader, train_batches
from common.data.order import Division, Order
from common.data.views import refuse_unknown
from common.engine.config import EngineConfig
from common.engine.setup import start_accelerator
from common.engine.trainer import Data, total_steps
from common.errors import run_main
from common.models.build import ModelConfig, build_model, refuse_misfit
from common.report.summary import Expectation
from common.training import run_training

DIGITS = Path(__file__).parent / "recipes" / "digits.yaml"


@dataclass
class Config(EngineConfig):
    """Train an image classifier. Without --config the recipe is image/recipes/digits.yaml."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    expect: Expectation = field(default_factory=Expectation)


def main() -> int:
    """Train as the command line says; returns the exit code."""
    config, _ = parse(Config, default_recipe=DIGITS, description=__doc__)
    if config.data.backend == "dali":
        refuse_unknown(config.augment)
    accelerator = start_accelerator(config)
    prepare_default_data(config.data, accelerator)
    data = open_data(config, accelerator)
    model = build_model(config.model, len(data.classes))
    refuse_misfit(model, config.augment.size, "augment.size")
    return run_training(config, accelerator, model, data, config.expect)


def open_data(config: Config, accelerator: Accelerator) -> Data:
    """The two splits, in the order and the parts that this process sees."""
    train, device = config.train, accelerator.device
    world, rank = accelerator.num_processes, accelerator.process_index
    training = open_images(config.data, config.augment, "train", train.seed, train.epochs)
    validation = open_images(config.data, config.augment, "val", train.seed)
    order = Order(len(training.source), train.seed, config.augment.repeats)
    division = Division(train.batch_size, train.accumulation, world, rank)
    finish = Normalize(config.augment, device)
    return Data(
        samples=len(training.source),
        classes=training.source.classes,
        train=train_batches(
            training, order, division, total_steps(train, len(training.source)), config.data, device, finish
        ),
        val=evaluation_loader(
            validation,
            len(validation.source),
            -(-train.eval_batch_size // world),
            world,
            rank,
            config.data,
            device,
            finish,
        ),
        fingerprint=f"{training.source.fingerprint()} {validation.source.fingerprint()}",
        max_unreadable=config.data.max_unreadable,
    )


def prepare_default_data(data: DataConfig, accelerator: Accelerator) -> None:
    """Make the embedded digits where the default recipe looks for them, so that training needs no other step."""
    with accelerator.local_main_process_first():
        if data.format != "synthetic" and data.path == DataConfig.path and not Path(data.path).exists():
            print(f"making the embedded digits in {data.path}", file=sys.stderr)
            prepare_digits(Path(data.path), "folder")


if __name__ == "__main__":
    run_main(main)
