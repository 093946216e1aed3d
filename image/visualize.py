"""Draw what an image classifier attends to.

    python image/visualize.py RUN IMAGE...                     a run's newest checkpoint
    python image/visualize.py FILE IMAGE... --model.name resnet50_bat     published weights

Writes a PNG a module and index.html, which holds all of them, into the folder attention/ of the run (or of --out):
SAN's footprint weights, BAT's matrices and transformed grid, NOAH's class-wise maps, non-local maps, FBN's pairs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import image.models  # noqa: F401  (registers the models)
from common.config import Positional
from common.data.augment import Normalize, test_transform
from common.data.decode import decode_rgb
from common.data.source import BadSample, open_source
from common.errors import ConfigError, UserError, run_main
from common.evaluation import check_exists, class_names, parse_with_run
from common.models.build import build_model
from common.report.attention import draw_attention
from common.weights import load_weights
from image.train import Config

WORDS = Positional("checkpoint", "A run's folder, a checkpoint or a file of weights, then images.", many=True)


@dataclass
class VisualizeConfig(Config):
    """Draw what an image classifier attends to."""

    top: int = 3
    """Classes whose maps are drawn, the likeliest first."""
    pixels: tuple[tuple[float, float], ...] = ((0.5, 0.5),)
    """Places to look from, as shares of height and width, such as [[0.5,0.5],[0.2,0.8]]."""
    num_classes: int = 1000
    """Classes of the network, where no run tells."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"top = {self.top}: expected at least 1")
        if not self.pixels or not all(0 <= share <= 1 for pixel in self.pixels for share in pixel):
            raise ValueError(f"pixels = {self.pixels}: expected pairs of shares, each 0 to 1")


def main() -> int:
    """Draw as the command line says; returns the exit code."""
    config, words, run = parse_with_run(VisualizeConfig, sys.argv[1:], __doc__, WORDS)
    checkpoint, *images = words
    check_exists(checkpoint)
    if not images:
        raise ConfigError(f"no image after {checkpoint!r}; expected CHECKPOINT IMAGE...")
    inputs = [(path, read(path, config)) for path in images]
    classes = class_names(run)
    model = build_model(config.model, len(classes) or config.num_classes)
    if not classes and Path(config.data.path).is_dir():
        of_data = list(open_source(config.data.path, "val", config.data.format).classes)
        classes = of_data if len(of_data) == config.num_classes else []
    print(load_weights(model, checkpoint, strict=config.weights_strict))
    folder = (run or Path(config.out)) / "attention"
    page, *pictures = draw_attention(model, inputs, classes, folder, config.top, config.pixels)
    print(f"written: {page} and {len(pictures)} pictures beside it")
    return 0


def read(path: str, config: Config) -> Tensor:
    """What the network sees of an image's file, (3, size, size).

    Raises:
        UserError: the file is not there, or is not an image.
    """
    try:
        image = decode_rgb(Path(path).read_bytes(), path)
    except (OSError, BadSample) as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None
    return Normalize(config.augment, torch.device("cpu"))(test_transform(config.augment)(image))


if __name__ == "__main__":
    run_main(main)
