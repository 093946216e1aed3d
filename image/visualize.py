"""Draw what an image classifier attends to.

    python image/visualize.py RUN IMAGE...                     a run's newest checkpoint
    python image/visualize.py FILE IMAGE... --model.name resnet50_bat     published weights

Writes a PNG a module and index.html, which holds all of them, into the folder attention/ of the run (or of --out):
SAN's footprint weights, BAT's matrices and transformed grid, NOAH's class-wise maps, non-local maps, FBN's pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import image.models  # noqa: F401  (registers the models)
from common.data.augment import Normalize, test_transform
from common.data.decode import decode_rgb
from common.data.forms import open_source
from common.data.source import BadSample
from common.errors import UserError, run_main
from common.report.visualize import PictureConfig, visualize
from image.train import Config


# Config comes first: else jsonargparse does not find what its settings are made of.
@dataclass
class VisualizeConfig(Config, PictureConfig):
    """Draw what an image classifier attends to."""


def main() -> int:
    """Draw as the command line says; returns the exit code."""
    return visualize(VisualizeConfig, __doc__, "image", read, names)


def names(config: VisualizeConfig) -> list[str]:
    """Of the classes, where the data that the settings name is there and has as many as the network."""
    if not Path(config.data.path).is_dir():
        return []
    classes = list(open_source(config.data.path, "val", config.data.format).classes)
    return classes if len(classes) == config.num_classes else []


def read(path: str, config: Config) -> Tensor:
    """What the network sees of an image's file, (3, size, size).

    Raises:
        UserError: the file is not there, or is not an image.
    """
    try:
        image = decode_rgb(Path(path).read_bytes(), path)
    except (OSError, BadSample) as error:
        raise UserError(
            f"{path}: cannot be read as an image ({getattr(error, 'strerror', None) or error})"
        ) from None
    return Normalize(config.augment, torch.device("cpu"))(test_transform(config.augment)(image))


if __name__ == "__main__":
    run_main(main)
