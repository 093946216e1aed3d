"""``verify`` finds what is wrong with a data set, and nothing where nothing is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from common.data.prepare.convert import convert, find_splits
from common.data.prepare.settings import Settings
from common.data.prepare.verify import verify, write_report
from common.data.source import DataError
from tests.common.data.forms import FORM_NAMES, few_digits, write_split

FILE = {"folder": "train/3/*.jpg", "recordio": "train_1.rec", "webdataset": "train-000001.tar"}


def make(tmp_path: Path, form: str, spoilt: bool = False) -> Path:
    write_split(tmp_path / "in", "folder", few_digits(24))
    if spoilt:  # a JPEG's beginning, and no picture behind it
        first = min((tmp_path / "in/train/3").iterdir())
        first.write_bytes(first.read_bytes()[:500])
    settings = Settings(form, parts=3, shard_samples=8)
    convert(find_splits(tmp_path / "in"), tmp_path / "out", settings)
    return tmp_path / "out"


@pytest.mark.parametrize("workers", [1, 2])
def test_whole_data_has_no_problems(tmp_path: Path, workers: int) -> None:
    out = make(tmp_path, "webdataset")
    report = verify(out, workers=workers)["train"]
    assert (report.samples, report.decoded, report.problems, report.checksums) == (24, 24, [], "compared")
    assert report.per_class == {str(n): 3 if n < 4 else 2 for n in range(10)} | {
        name: count for name, count in report.per_class.items() if int(name) > 3
    }
    assert sum(report.per_class.values()) == 24
    assert (report.smallest_class, report.largest_class) == (
        min(report.per_class.values()),
        max(report.per_class.values()),
    )
    write_report({"train": report}, tmp_path)
    assert json.loads((tmp_path / "verify.json").read_text())["train"]["per_class"] == report.per_class
    assert Image.open(tmp_path / "verify.png").size[0] > 300


def test_data_of_others_without_a_manifest(tmp_path: Path) -> None:
    write_split(tmp_path / "in", "folder", few_digits(24))
    report = verify(tmp_path / "in")["train"]
    assert (report.decoded, report.problems, report.checksums) == (24, [], "none: there is no manifest")


@pytest.mark.parametrize("form", FORM_NAMES)
def test_a_flipped_byte(tmp_path: Path, form: str) -> None:
    out = make(tmp_path, form)
    file = min(out.glob(FILE[form]))
    data = bytearray(file.read_bytes())
    data[-700] ^= 1
    file.write_bytes(data)
    reasons = {(problem["where"], problem["reason"]) for problem in verify(out)["train"].problems}
    where = str(file.relative_to(out / "train")) if form == "folder" else file.name
    assert (where, "checksum") in reasons


@pytest.mark.parametrize("form", FORM_NAMES)
def test_a_missing_sample(tmp_path: Path, form: str) -> None:
    out = make(tmp_path, form)
    file = min(out.glob(FILE[form]))
    if form == "folder":
        file.unlink()
    else:  # gone from the index, so that no reader would miss it
        idx = file.with_suffix(".idx")
        lines = idx.read_text().splitlines(keepends=True)
        del lines[2]
        idx.write_text("".join(lines).replace("v1.2 8", "v1.2 7"))
    problems = verify(out)["train"].problems
    assert len(problems) >= 1
    if form == "folder":
        assert [(problem["where"], problem["reason"]) for problem in problems] == [
            ("train.json", "samples"),
            (f"train/3/{file.name}", "missing"),
        ]


def test_a_missing_last_part(tmp_path: Path) -> None:
    out = make(tmp_path, "recordio")
    for kind in ("rec", "idx", "lst"):
        (out / f"train_2.{kind}").unlink()
    reasons = [(problem["where"], problem["reason"]) for problem in verify(out)["train"].problems]
    assert ("train_2.rec", "missing") in reasons
    assert ("train.json", "samples") in reasons


@pytest.mark.parametrize("form", FORM_NAMES)
def test_an_image_that_cannot_be_decoded(tmp_path: Path, form: str) -> None:
    report = verify(make(tmp_path, form, spoilt=True))["train"]
    assert report.decoded == 23
    assert [problem["reason"] for problem in report.problems] == ["truncated"]
    assert report.per_class["3"] == min(report.per_class["3"], 2)
    file = "train/3" if form == "folder" else FILE[form]
    assert report.problems_per_shard == {file: 1}


def test_what_cannot_be_opened_is_a_problem_too(tmp_path: Path) -> None:
    out = make(tmp_path, "webdataset")
    (out / "train-000001.tar").unlink()
    (problem,) = verify(out)["train"].problems
    assert problem["reason"] == "cannot be opened"
    assert "train-000001.tar is missing" in problem["detail"]
    (out / "train.json").write_text("{}")
    (problem,) = verify(out)["train"].problems
    assert "not a manifest" in problem["detail"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data of split 'train'"):
        verify(tmp_path)
    with pytest.raises(DataError, match="not an existing folder"):
        verify(tmp_path / "nowhere")
