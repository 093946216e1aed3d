"""Draw what a video classifier attends to, in each frame of a clip and along time.

    python video/visualize.py RUN VIDEO...                     a run's newest checkpoint
    python video/visualize.py FILE VIDEO... --config video/recipes/c2d_3dbat.yaml     published weights

Takes the clip in the middle of each video. Writes a PNG a module and frame, and index.html, which holds all of them,
into the folder attention/ of the run (or of --out).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import video.models  # noqa: F401  (registers the models)
from common.config import Positional
from common.data.source import BadSample
from common.data.video.clips import ClipNormalize, shorter
from common.data.video.crops import centre_box, cut
from common.data.video.decode import Decoder
from common.data.video.sampling import clip_frames, test_offsets
from common.errors import ConfigError, UserError, run_main
from common.evaluation import check_exists, class_names, parse_with_run
from common.models.build import build_model
from common.report.attention import draw_attention
from common.weights import load_weights
from video.train import Config

WORDS = Positional("checkpoint", "A run's folder, a checkpoint or a file of weights, then videos.", many=True)


@dataclass
class VisualizeConfig(Config):
    """Draw what a video classifier attends to."""

    top: int = 3
    """Classes that are named, the likeliest first."""
    pixels: tuple[tuple[float, float], ...] = ((0.5, 0.5),)
    """Places to look from, as shares of height and width, such as [[0.5,0.5],[0.2,0.8]]."""
    num_classes: int = 400
    """Classes of the network, where no run tells."""


def main() -> int:
    """Draw as the command line says; returns the exit code."""
    config, words, run = parse_with_run(VisualizeConfig, sys.argv[1:], __doc__, WORDS)
    checkpoint, *videos = words
    check_exists(checkpoint)
    if not videos:
        raise ConfigError(f"no video after {checkpoint!r}; expected CHECKPOINT VIDEO...")
    inputs = [(path, read(path, config)) for path in videos]
    classes = class_names(run)
    model = build_model(config.model, len(classes) or config.num_classes)
    print(load_weights(model, checkpoint, strict=config.weights_strict))
    folder = (run or Path(config.out)) / "attention"
    page, *pictures = draw_attention(model, inputs, classes, folder, config.top, config.pixels)
    print(f"written: {page} and {len(pictures)} pictures beside it")
    return 0


def read(path: str, config: Config) -> Tensor:
    """The clip (3, T, size, size) in the middle of a video's file, as the network sees it.

    Raises:
        UserError: the file is not there, or cannot be decoded.
    """
    clip, decoder = config.clip, Decoder(config.data.decode_seconds, config.data.decode_threads)
    try:
        count = decoder.length(path, path)
        (offset,) = test_offsets(count, 1, clip.seq_length, clip.sample_rate)
        numbers = clip_frames(offset, count, clip.seq_length, clip.sample_rate)
        found = decoder.frames(path, numbers, path, shorter(clip.short_side))
    except (OSError, BadSample) as error:
        raise UserError(f"{path}: cannot be read as a video ({error})") from None
    frames = torch.stack([found[number] for number in numbers])
    height, width = frames.shape[-2:]
    frames = cut(frames, centre_box(height, width, clip.size)).transpose(0, 1)
    return ClipNormalize(clip.colour, config.data.read_mode, torch.device("cpu"))(frames)


if __name__ == "__main__":
    run_main(main)
