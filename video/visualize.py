"""Draw what a video classifier attends to, in each frame of a clip and along time.

    python video/visualize.py RUN VIDEO...                     a run's newest checkpoint
    python video/visualize.py FILE VIDEO... --config video/recipes/c2d_3dbat.yaml     published weights

Takes the clip in the middle of each video. Writes a PNG a module and frame, and index.html, which holds all of them,
into the folder attention/ of the run (or of --out).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import video.models  # noqa: F401  (registers the models)
from common.data.source import BadSample
from common.data.video.clips import ClipNormalize, shorter
from common.data.video.crops import centre_box, cut
from common.data.video.decode import Decoder
from common.data.video.sampling import clip_frames, test_offsets
from common.errors import UserError, run_main
from common.report.visualize import PictureConfig, visualize
from video.train import Config


# Config comes first: else jsonargparse does not find what its settings are made of.
@dataclass
class VisualizeConfig(Config, PictureConfig):
    """Draw what a video classifier attends to."""

    num_classes: int = 400
    """Classes of the network, where no run tells."""


def main() -> int:
    """Draw as the command line says; returns the exit code."""
    return visualize(VisualizeConfig, __doc__, "video", read)


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
        raise UserError(
            f"{path}: cannot be read as a video ({getattr(error, 'strerror', None) or error})"
        ) from None
    frames = torch.stack([found[number] for number in numbers])
    height, width = frames.shape[-2:]
    frames = cut(frames, centre_box(height, width, clip.size)).transpose(0, 1)
    return ClipNormalize(clip.colour, config.data.read_mode, torch.device("cpu"))(frames)


if __name__ == "__main__":
    run_main(main)
