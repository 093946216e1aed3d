"""DALI makes what the torch backend makes: the same crops, flips, colours and erased patches."""

from __future__ import annotations

import sys

import pytest
import torch

from common.data.augment import AugmentConfig
from common.data.images import DataConfig, open_images
from common.data.loader import evaluation_loader
from common.errors import ConfigError
from tests.common.data.backends import CPU, SIZE, evaluation, levels, training
from tests.common.data.forms import FORM_NAMES

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")


@pytest.mark.parametrize("interpolation, most", [("bilinear", 1), ("bicubic", 3)])
@pytest.mark.parametrize("form", FORM_NAMES)
def test_evaluation_agrees_on_every_image(forms, form, interpolation, most):
    augment = AugmentConfig(size=SIZE, interpolation=interpolation)
    off = levels(*(evaluation(forms / form, backend, augment) for backend in ("dali", "torch")), augment)
    assert off.max() <= most + 0.01
    assert off.mean() < 0.02


@pytest.mark.parametrize("crop, size", [(1.0, 32), (0.875, 224), (0.95, 65)])
def test_evaluation_agrees_at_every_crop(forms, crop, size):
    augment = AugmentConfig(size=size, crop=crop)
    off = levels(*(evaluation(forms / "recordio", b, augment) for b in ("dali", "torch")), augment)
    assert off.max() <= 1.01


@pytest.mark.parametrize("form", FORM_NAMES)
def test_training_takes_the_same_crops_and_flips(forms, form):
    augment = AugmentConfig(size=SIZE, ratio=(0.5, 2))
    off = levels(*(training(forms / form, backend, augment) for backend in ("dali", "torch")), augment)
    assert off.max() <= 1.01


def test_training_changes_colours_and_erases_alike(forms):
    augment = AugmentConfig(size=SIZE, color_jitter=0.4, erasing=0.5, interpolation="bicubic", repeats=2)
    ours, theirs = (training(forms / "recordio", backend, augment) for backend in ("dali", "torch"))
    off = levels(ours, theirs, augment)
    assert off.max() <= 6
    assert off.mean() < 0.02
    erased = torch.cat([batch.inputs for batch in ours]) == torch.cat([batch.inputs for batch in theirs])
    noise = torch.cat([batch.inputs for batch in theirs]).abs() > 2.8  # no pixel of an image is so far out
    assert noise.any()
    assert erased[noise].all()


def test_a_classifier_says_the_same_of_every_digit(digits):
    """A linear one, fitted by least squares to the torch backend's images."""
    augment = AugmentConfig(size=24, crop=1.0, scale=(0.9, 1.0), hflip=0.0)
    batches = training(digits, "torch", augment, batch=1442, steps=1)
    flat = torch.cat([b.inputs for b in batches]).mean(1).flatten(1).double()
    wanted = torch.nn.functional.one_hot(torch.cat([b.targets for b in batches]), 10).double()
    ridge = 10 * torch.eye(flat.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(flat.T @ flat + ridge, flat.T @ wanted)
    said = {}
    for backend in ("torch", "dali"):
        found = evaluation(digits, backend, augment, batch=71)
        labels = torch.cat([b.targets for b in found])
        said[backend] = (torch.cat([b.inputs for b in found]).mean(1).flatten(1).double() @ weights).argmax(1)
        assert (said[backend] == labels).float().mean() > 0.85
    assert torch.equal(said["torch"], said["dali"])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"auto": "augmix-m5-w4-d2"}, "augment.auto = augmix-m5-w4-d2: the dali"),
        ({"kind": "fbn2"}, "augment.kind = fbn2"),
    ],
)
def test_augmentation_that_it_lacks_is_an_error_and_evaluation_is_not(digits, options, words):
    augment = AugmentConfig(size=SIZE, **options)
    with pytest.raises(ConfigError, match=words):
        training(digits, "dali", augment)
    assert evaluation(digits, "dali", augment, batch=355)


def test_what_is_missing_is_an_error(digits, monkeypatch):
    config = DataConfig(path=str(digits), backend="dali", device="gpu", workers=0)
    with pytest.raises(ConfigError, match="data.device = gpu: there is no GPU"):
        open_images(config, AugmentConfig(), "val", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = open_images(config, AugmentConfig(), "val", 0)
    batches = evaluation_loader(data, 8, 8, 1, 0, config, CPU, lambda images: images)()
    with pytest.raises(ConfigError, match="data.device = gpu: this process computes on cpu"):
        next(batches)
    with pytest.raises(ValueError, match="device = gpu: only with data.backend = dali"):
        DataConfig(device="gpu")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ConfigError, match="NVIDIA DALI cannot be imported .*pip install"):
        open_images(DataConfig(path=str(digits), backend="dali"), AugmentConfig(), "val", 0)
