"""DALI's batches are the same from the middle of a run, after a kill and on any number of processes."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from common.data.augment import AugmentConfig
from common.data.digits import prepare_digits
from common.data.loader import FILLER
from tests.common.data.backends import SIZE, evaluation, same, samples, training
from tests.common.data.forms import FORM_NAMES
from tests.processes import error_line, interrupt, metrics, run, settings, train

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")


@pytest.mark.parametrize("form", FORM_NAMES)
def test_the_middle_of_a_run_and_other_workers_are_the_same_run(forms, form):
    augment = AugmentConfig(size=SIZE, color_jitter=0.4, erasing=0.5)
    whole = training(forms / form, "dali", augment)
    assert all(map(same, whole[3:], training(forms / form, "dali", augment, start=3)))
    if form == "recordio":
        assert all(map(same, whole[3:], training(forms / form, "dali", augment, start=3, workers=2)))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_see_parts_of_the_same_batches(forms, world):
    augment = AugmentConfig(size=SIZE)
    whole = training(forms / "webdataset", "dali", augment)
    parts = [training(forms / "webdataset", "dali", augment, world=world, rank=r) for r in range(world)]
    for batch, *pieces in zip(whole, *parts):
        assert torch.equal(batch.inputs, torch.cat([piece.inputs for piece in pieces]))
    labels = sorted(label for _, _, label in samples())
    epochs = torch.cat([batch.targets for batch in whole]).view(2, -1).tolist()
    assert [sorted(epoch) for epoch in epochs] == [labels, labels], "every sample once in each of two epochs"


def test_micro_batches_of_other_sizes_are_parts_of_the_same_batches(forms):
    augment = AugmentConfig(size=SIZE)
    whole = torch.cat([batch.inputs for batch in training(forms / "webdataset", "dali", augment)])
    parts = training(forms / "webdataset", "dali", augment, parts=3)
    assert [len(part.targets) for part in parts[:3]] == [2, 2, 4]
    assert torch.equal(whole, torch.cat([part.inputs for part in parts]))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_sample_once_on_any_number_of_processes(forms, world):
    augment = AugmentConfig(size=SIZE)
    parts = [evaluation(forms / "recordio", "dali", augment, 5, 0, world, rank) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    seen = torch.cat([batch.targets for part in zip(*parts) for batch in part])
    assert seen[seen != FILLER].tolist() == [label for _, _, label in samples()]
    assert (seen != FILLER).nonzero().max() == len(samples()) - 1


def test_the_main_processs_generators_are_left_alone(digits):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    training(digits, "dali", AugmentConfig(size=SIZE, erasing=0.5), steps=1)
    assert torch.equal(before, torch.get_rng_state())


OPTIONS = {
    "data__backend": "dali",
    "augment__auto": "null",
    "augment__color_jitter": 0.4,
    "augment__erasing": 0.3,
}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["recordio", "webdataset"])
def test_a_killed_training_goes_on_exactly(tmp_path, form):
    data = tmp_path / "digits"
    prepare_digits(data, form)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, data, **OPTIONS)
    assert interrupt(killed, data, 7, signal.SIGKILL, **OPTIONS) == -signal.SIGKILL
    assert interrupt(killed, data, 20, signal.SIGTERM, **OPTIONS) == 75
    train(killed, data, **OPTIONS)
    for split in ("train", "val"):
        assert metrics(killed, split) == metrics(whole, split)


@pytest.mark.slow
def test_both_backends_give_a_trained_network_the_same_accuracy(digits, tmp_path):
    """The demo's recipe, trained by DALI with two processes, evaluated by both."""
    folder = tmp_path / "run"
    options = {"out": folder, "data.path": digits, "train.epochs": 4, "data.backend": "dali"}
    done = run("image/train.py", processes=2, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for backend in ("dali", "torch"):
        done = run("image/eval.py", folder, data__backend=backend)
        assert done.returncode == 0, done.stderr[-3000:]
        found[backend] = json.loads((folder / "eval.json").read_text())
    assert found["dali"]["top1"] > 60
    assert found["dali"]["confusion"] == found["torch"]["confusion"]


@pytest.mark.slow
def test_another_backend_is_another_run(digits, tmp_path):
    assert interrupt(tmp_path / "run", digits, 5, signal.SIGTERM, **OPTIONS) == 75
    done = run(
        "image/train.py", **settings(tmp_path / "run", digits, **(OPTIONS | {"data__backend": "torch"}))
    )
    assert "data.backend: dali → torch" in error_line(done)
