"""RandAugment, colours and the pipeline of the GPU: what Pillow makes, made by tensor operations and by DALI."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation

from common.data import dali
from common.data.augment import AugmentConfig
from common.data.tensor_augment import change_colours
from tests.common.data.backends import SIZE, encode, evaluation, levels, photos, training
from tests.common.data.forms import write_split

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize(
    "auto", ["rand-m9-mstd0.5-inc1", "rand-m6-n3-mstd1.0-inc1", "rand-m9-n4-mstd101-tweights"]
)
def test_rand_augment_is_that_of_the_torch_backend(tmp_path, monkeypatch, auto, device):
    """To the bit, where nothing is resized; without draws that depend on the number of processes."""
    if device == "gpu":
        use_the_gpus_pipeline(monkeypatch)
    squares = [picture.crop((10, 5, 10 + SIZE, 5 + SIZE)) for picture in photos()]
    write_split(tmp_path, "recordio", [(f"{n}", encode(picture), n) for n, picture in enumerate(squares)])
    augment = AugmentConfig(size=SIZE, auto=auto, scale=(1, 1), ratio=(1, 1), erasing=0.3)
    ours = training(tmp_path, "dali", augment, steps=10)
    off = levels(ours, training(tmp_path, "torch", augment, steps=10), augment)
    assert off.max() < 0.01
    plain = training(tmp_path, "dali", AugmentConfig(size=SIZE, scale=(1, 1), ratio=(1, 1)), steps=10)
    assert sum(not torch.equal(a, b) for x, y in zip(ours, plain) for a, b in zip(x.inputs, y.inputs)) > 60
    parts = [
        training(tmp_path, "dali", augment, steps=10, world=2, rank=rank, workers=rank) for rank in (0, 1)
    ]
    for batch, *pieces in zip(ours, *parts):
        assert torch.equal(batch.inputs, torch.cat([piece.inputs for piece in pieces]))


def test_colours_change_as_in_pillow():
    draw = random.Random(0)
    images = [picture.resize((40, 30)) for picture in photos()]
    factors = [[(which, draw.uniform(0.2, 2.5)) for which in draw.sample(range(3), 3)] for _ in images]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    changed = change_colours(pixels, torch.tensor(factors))
    for image, changes, ours in zip(images, factors, changed):
        for which, factor in changes:
            image = (adjust_brightness, adjust_contrast, adjust_saturation)[which](image, factor)
        assert abs(np.asarray(image).astype(int) - ours.permute(1, 2, 0).numpy()).max() <= 1


def use_the_gpus_pipeline(monkeypatch):
    made = dali.Decoder.__init__

    def fused(self, *args):
        made(self, *args)
        self.fused = True

    monkeypatch.setattr(dali.Decoder, "__init__", fused)


@pytest.mark.parametrize("interpolation, most", [("bilinear", 1), ("bicubic", 12)])
def test_the_gpus_pipeline_agrees_but_at_the_images_edges(forms, monkeypatch, interpolation, most):
    """On the GPU DALI also resizes and flips; here the same operators run on the CPU."""
    use_the_gpus_pipeline(monkeypatch)
    for size, crop in ((SIZE, 0.875), (65, 0.95)):
        augment = AugmentConfig(size=size, crop=crop, interpolation=interpolation)
        off = levels(*(evaluation(forms / "recordio", b, augment) for b in ("dali", "torch")), augment)
        assert off.max() <= most + 0.01
        off = levels(*(training(forms / "recordio", b, augment) for b in ("dali", "torch")), augment)
        assert off[..., 1:-1, 1:-1].max() <= most + 0.01
        assert off.max() <= 32
        assert off.mean() < 0.25
    augment = AugmentConfig(size=SIZE, color_jitter=0.4, interpolation=interpolation)
    off = levels(*(training(forms / "recordio", b, augment) for b in ("dali", "torch")), augment)
    assert off[..., 1:-1, 1:-1].max() <= 1.4**3 * most + 3, "three factors up to 1.4, three roundings"
    augment = AugmentConfig(size=SIZE, auto="rand-n1", interpolation=interpolation)
    off = levels(*(training(forms / "recordio", b, augment) for b in ("dali", "torch")), augment)
    assert off.median() < 0.01, "some operations are steep"
