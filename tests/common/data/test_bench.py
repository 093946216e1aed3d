"""The benchmark of the loaders runs and writes its numbers; the numbers themselves are no test."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from pathlib import Path

import pytest
from PIL import Image

from common.data import bench
from tests.common.data.forms import read_all


def test_images_are_like_photographs_and_always_the_same() -> None:
    data = bench.photo(0)
    assert data == bench.photo(0) != bench.photo(1)
    assert 50_000 < len(data) < 70_000
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (500, 375))


def test_it_runs_and_writes_json(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    numbers = {"images": 8, "batch": 4, "batches": 1, "rounds": 1, "workers": 1, "epochs": 2}
    words = [f"--{name}={number}" for name, number in numbers.items()] + ["--backends", "torch", "readers"]
    cores = os.sched_getaffinity(0)
    assert bench.main([*words, "--folder", str(tmp_path), "--out", str(tmp_path / "bench.json")]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    loaders = ["torchvision", "folder torch", "recordio torch", "webdataset torch"]
    readers = ["folder readers", "recordio readers", "webdataset readers"]
    cases = loaders + (readers if bench._is_there("readers") else [])
    assert [(rate["mode"], rate["case"]) for rate in result["rates"]] == [
        (mode, case) for mode in ("decode", "train") for case in cases
    ]
    assert all(rate["images_per_s"] > 0 and rate["images_per_cpu_s"] > 0 for rate in result["rates"])
    assert [rate["share"] for rate in result["rates"] if rate["case"] == "torchvision"] == [1, 1]
    assert {name: len(megabytes) for name, megabytes in result["memory"].items()} == dict.fromkeys(loaders, 2)
    assert result["versions"]["torch"]
    printed = capfd.readouterr().out
    assert all(case in printed for case in cases)
    assert os.listdir(tmp_path) == ["bench.json"]
    assert os.sched_getaffinity(0) == cores
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("form", ["folder", "recordio", "webdataset"])
def test_dali_decodes_the_same_centre(tmp_path: Path, form: str) -> None:
    pytest.importorskip("nvidia.dali")
    bench.make_data(tmp_path, 4)
    run = bench.Run(tmp_path, "decode", 0, 4)
    found = []
    for backend in ("torch", "dali"):
        stream = bench.ours(bench.Case("", form, backend), run)
        found.append(next(stream).float())
        stream.close()
    assert (found[0] - found[1]).abs().max() <= 3
    assert len(read_all(bench.open_source(tmp_path / form, "train"))) == 4


@pytest.mark.parametrize("form", ["folder", "recordio", "webdataset"])
def test_dalis_own_readers_give_the_same_images(tmp_path: Path, form: str) -> None:
    """Every one once an epoch, in another order; in training they are normalised alike."""
    pytest.importorskip("nvidia.dali")
    bench.make_data(tmp_path, 4)
    streams = [
        make(bench.Case("", form, "torch"), bench.Run(tmp_path, "decode", workers, 4))
        for make, workers in ((bench.ours, 0), (bench.readers, 1))
    ]
    ours = next(streams[0]).float()
    for _ in range(2):
        theirs = next(streams[1]).float()
        off = (ours[:, None] - theirs[None]).abs().flatten(2).amax(-1)
        assert ((off <= 3).sum(0) == 1).all()
        assert ((off <= 3).sum(1) == 1).all()
    training = next(bench.readers(bench.Case("", form, "readers"), bench.Run(tmp_path, "train", 1, 4)))
    assert training.shape == (4, 3, 224, 224)
    wanted = next(bench.ours(bench.Case("", form, "torch"), bench.Run(tmp_path, "train", 0, 4)))
    assert abs(training.mean() - wanted.mean()) < 0.5
    assert 0.5 < training.std() / wanted.std() < 2


def test_help_explains(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("images/cpu", "decode", "torchvision", "readers", "--rounds"))
