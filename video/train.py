"""Train a video classifier: `accelerate launch video/train.py --config video/recipes/RECIPE.yaml`.

Without arguments it trains a small C2D with 3-D BAT on scikit-learn's handwritten digits, which move.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

import video.models  # noqa: F401  (registers the models)
from common.config import parse
from common.data.loader import evaluation_loader, train_batches
from common.data.order import Division, Order
from common.data.source import digest
from common.data.video.clips import ClipConfig, ClipNormalize, ClipSet, VideoDataConfig, open_videos
from common.data.video.digits import prepare_moving_digits
from common.engine.config import EngineConfig
from common.engine.setup import start_accelerator
from common.engine.trainer import Data, total_steps
from common.errors import run_main
from common.inflate import load_inflated
from common.models.build import ModelConfig, build_model
from common.report.summary import Expectation
from common.training import run_training
from video.segments import average_segments

DIGITS = Path(__file__).parent / "recipes" / "digits.yaml"


@dataclass
class Config(EngineConfig):
    """Train a video classifier. Without --config the recipe is video/recipes/digits.yaml."""

    weights_2d: str | None = None
    """File of an image network's weights to start from, its kernels inflated along time."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(name="c2d_resnet50_bat3d"))
    data: VideoDataConfig = field(default_factory=VideoDataConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    expect: Expectation = field(default_factory=Expectation)


def main() -> int:
    """Train as the command line says; returns the exit code."""
    config, _ = parse(Config, default_recipe=DIGITS, description=__doc__)
    accelerator = start_accelerator(config)
    prepare_default_data(config.data, accelerator)
    data = open_data(config, accelerator)
    model = build_model(config.model, len(data.classes))
    if config.weights_2d:
        report = load_inflated(model, config.weights_2d, strict=config.weights_strict)
        accelerator.print(f"weights from {config.weights_2d}: {report}")
    return run_training(
        config, accelerator, average_segments(model, config.clip.num_segments), data, config.expect
    )


def open_data(config: Config, accelerator: Accelerator) -> Data:
    """The two splits, in the order and the parts that this process sees."""
    train, device = config.train, accelerator.device
    world, rank = accelerator.num_processes, accelerator.process_index
    training, validation = (open_videos(config.data, split) for split in ("train", "val"))
    order = Order(len(training), train.seed)
    division = Division(train.batch_size, train.accumulation, world, rank)
    finish = ClipNormalize(config.clip.colour, config.data.read_mode, device)
    return Data(
        samples=len(training),
        classes=training.classes,
        train=train_batches(
            ClipSet(training, config.clip, train.seed, training=True),
            order,
            division,
            total_steps(train, len(training)),
            config.data,
            device,
            finish,
        ),
        val=evaluation_loader(
            ClipSet(validation, config.clip, train.seed, training=False),
            len(validation),
            -(-train.eval_batch_size // world),
            world,
            rank,
            config.data,
            device,
            finish,
        ),
        fingerprint=digest(
            "\n".join(training.classes), training.clips.fingerprint(), validation.clips.fingerprint()
        ),
        max_unreadable=config.data.max_unreadable,
    )


def prepare_default_data(data: VideoDataConfig, accelerator: Accelerator) -> None:
    """Make the moving digits where the default recipe looks for them, so that training needs no other step."""
    with accelerator.local_main_process_first():
        if data.path == VideoDataConfig.path and not Path(data.path).exists():
            print(f"making the moving digits in {data.path}", file=sys.stderr)
            prepare_moving_digits(Path(data.path))


if __name__ == "__main__":
    run_main(main)
