"""Made-up data through the loader's contract and through a whole training."""

from __future__ import annotations

import pytest
import torch

from common.data.augment import AugmentConfig, Normalize
from common.data.images import DataConfig, open_images
from common.data.loader import FILLER, LoaderConfig, evaluation_loader, train_batches
from common.data.order import Division, Order
from tests.processes import ROOT, SMALL, last_step, run

AUGMENT, CPU = AugmentConfig(size=16), torch.device("cpu")
DATA = DataConfig(format="synthetic", synthetic=30, path="nowhere")


def test_each_sample_once_an_epoch_with_its_label() -> None:
    data = open_images(DATA, AUGMENT, "train", seed=0)
    order, division = Order(30, 0), Division(10, 1, 1, 0)
    batches = list(train_batches(data, order, division, 6, LoaderConfig(), CPU, Normalize(AUGMENT, CPU))(0))
    epochs = torch.cat([batch.targets for batch in batches]).view(2, 30)
    assert all(epoch.sort().values.tolist() == list(range(30)) for epoch in epochs)
    assert {tuple(batch.inputs.shape) for batch in batches} == {(10, 3, 16, 16)}


def test_evaluation_fills_up() -> None:
    data = open_images(DATA, AUGMENT, "val", seed=0)
    loaders = [
        evaluation_loader(data, len(data.source), 8, 2, rank, LoaderConfig(), CPU, Normalize(AUGMENT, CPU))
        for rank in range(2)
    ]
    targets = torch.cat([batch.targets for loader in loaders for batch in loader()])
    assert targets[targets != FILLER].sort().values.tolist() == list(range(30))


def test_a_training_without_any_data(tmp_path) -> None:
    options = SMALL | {"out": tmp_path / "run", "data.format": "synthetic", "data.synthetic": 192}
    done = run("image/train.py", **options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert last_step(tmp_path / "run") == 4
    assert not (ROOT / "nowhere").exists()


def test_a_number_that_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="synthetic = 0: expected at least 1"):
        DataConfig(format="synthetic", synthetic=0)
