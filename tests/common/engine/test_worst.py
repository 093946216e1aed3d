"""The worst samples of an evaluation: which, under which index, and what is drawn of them."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from common.data.loader import FILLER, UNREADABLE
from common.engine.worst import THUMBNAIL, Worst


def picture(sample):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(sample["png"]))))


def test_the_worst_of_all_batches_and_their_indices():
    worst = Worst(2)
    logits = torch.eye(4)[[0, 0, 1, 2, 3, 1]] * torch.tensor([1.0, 3, 2, 1, 9, 9])[:, None]
    targets = torch.tensor([0, 1, 1, 3, UNREADABLE, FILLER])
    images = torch.rand(6, 3, 8, 8)
    for start in (0, 3):
        part = slice(start, start + 3)
        worst.add(images[part], logits[part], targets[part])
    found = worst.compute()
    assert [(sample["index"], sample["target"], sample["predicted"]) for sample in found] == [
        (1, 1, 0),
        (3, 3, 2),
    ]
    assert picture(found[0]).shape == (8, 8, 3)


def test_a_film_strip_shows_frames_of_all_clips_of_videos_of_any_size():
    worst = Worst(4, frames=3)
    for height, width in ((20, 40), (90, 60), (64, 64)):
        clips = torch.zeros(1, 2, 3, 4, height, width, dtype=torch.uint8)  # 2 clips of 4 frames
        clips[0, 0, :, 0], clips[0, 0, :, 2], clips[0, 1, :, 3] = 100, 150, 200
        worst.add(clips, torch.zeros(1, 2), torch.tensor([0]))
    strips = {sample["index"]: picture(sample) for sample in worst.compute()}
    assert {strip.shape for strip in strips.values()} == {(THUMBNAIL, 3 * THUMBNAIL, 3)}
    for strip in strips.values():
        centres = strip[THUMBNAIL // 2, [THUMBNAIL // 2 + k * THUMBNAIL for k in range(3)], 0].tolist()
        assert centres == [0, 128, 255], "in the order of time, from the first to the last"
    assert strips[0][:15].max() == 0, "black above a wide frame"
    assert strips[1][:, :10].max() == 0, "and beside a high one"
