"""Evaluate a video classifier on the validation list, over several views of every video.

    python video/eval.py RUN                                 a run's newest checkpoint, 10 segments × 3 crops
    python video/eval.py RUN/checkpoints/STEP --views 25x10  one of its checkpoints
    python video/eval.py FILE --config video/recipes/c2d_3dbat.yaml --data.path DATA     published weights

Every video is decoded once, and the logits of its views are averaged. Prints top-1, top-5, loss and the mean of the
classes' accuracies; writes them as JSON with a picture of the confusion matrix, and eval.html, a page with the frames
of the worst videos. With a run, all settings are those of the run, and options given here override them. The files go
to the run's folder, or to --out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator

import video.models  # noqa: F401  (registers the models)
from common.data.loader import evaluation_loader
from common.data.quarantine import describe
from common.data.video.clips import ClipNormalize, Videos, open_videos
from common.data.video.crops import OffsetRule
from common.data.video.views import VIEWS, ViewAverage, ViewSet
from common.engine.evaluate import evaluate
from common.engine.setup import start_accelerator
from common.engine.worst import Worst
from common.errors import run_main
from common.evaluation import new_quarantine, parse_checkpoint, show, write
from common.files import atomic_write
from common.models.build import build_model
from common.report.page import write_evaluation
from common.weights import load_weights
from video.train import Config


@dataclass
class EvalConfig(Config):
    """Evaluate a video classifier."""

    views: Literal["10x3", "25x10", "1x1"] = "10x3"
    """Segments × crops: 10x3 takes three squares as high as the frame (a square frame is one), 25x10 four corners and
    the centre and their mirror images, 1x1 the centre."""
    crop_offsets: OffsetRule = "published"
    """Where the three squares of 10x3 are: published at 0, ⅓, ⅔ of the room and one pixel, common at 0, ½, 1."""
    view_batch: int = 10
    """Views that go through the network at a time: less takes less memory."""
    save_scores: str | None = None
    """File for the scores: an .npz with logits (videos, classes), labels and paths."""

    def __post_init__(self) -> None:
        if self.view_batch < 1:
            raise ValueError(f"view_batch = {self.view_batch}: expected at least 1")


def main() -> int:
    """Evaluate as the command line says; returns the exit code."""
    config, checkpoint, _ = parse_checkpoint(EvalConfig, sys.argv[1:], __doc__)
    accelerator = start_accelerator(config, training=False)
    device, world, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    videos = open_videos(config.data, "val")
    classes, folder = videos.classes, Path(config.out)
    model = build_model(config.model, len(classes))
    loaded = load_weights(model, checkpoint, strict=config.weights_strict)
    normalize = ClipNormalize(config.clip.colour, config.data.read_mode, device)
    boxes = VIEWS[config.views].boxes(config.clip.size, config.crop_offsets)
    network = ViewAverage(model.to(device), boxes, normalize, config.view_batch)
    rows = ViewSet(videos, VIEWS[config.views].segments, config.clip)
    batches = evaluation_loader(
        rows, len(videos), 1, world, rank, config.data, device, finish=lambda frames: frames
    )
    unreadable, worst = new_quarantine(folder, accelerator), Worst(frames=8)
    result = evaluate(
        network,
        batches(),
        len(classes),
        device,
        autocast=accelerator.autocast,
        on_unreadable=lambda samples: unreadable.add(samples, training=False),
        worst=worst,
    )
    assert result is not None
    result |= {"classes": classes, "worst": worst.compute()}
    if config.save_scores:
        save_scores(Path(config.save_scores), network, videos, accelerator)
    if accelerator.is_main_process:
        print(loaded)
        show(result, classes)
        if result["unreadable"]:
            print(f"{describe(unreadable.path)}; they count as wrong")
        write(result | {"checkpoint": checkpoint, "views": config.views}, folder)
        page = write_evaluation(result, folder / "eval.html", videos.clips.name, unreadable.path)
        print(f"the worst videos: {page}")
    accelerator.end_training()
    return 0


def save_scores(path: Path, network: ViewAverage, videos: Videos, accelerator: Accelerator) -> None:
    """Write the logits of all videos, in the list's order. All ranks call this."""
    own = torch.cat(network.scores).float().cpu().numpy()
    parts = [own]
    if dist.is_initialized():
        parts = [own] * accelerator.num_processes
        dist.all_gather_object(parts, own)
    if not accelerator.is_main_process:
        return
    # Rank r has had the videos r, r + world, …, and fillers behind the last.
    scores = np.stack(parts, 1).reshape(-1, own.shape[1])[: len(videos)]
    paths = np.array([videos.clips.name(index) for index in range(len(videos))])
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        np.savez_compressed(file, logits=scores, labels=videos.clips.labels, paths=paths)
    print(f"scores: {path}")


if __name__ == "__main__":
    run_main(main)
