"""Data sets from any form to any other: the same samples, the same bytes, whatever happens on the way."""

from __future__ import annotations

import io
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.forms import open_source
from common.data.prepare import convert as convert_module
from common.data.prepare.convert import convert, find_splits
from common.data.prepare.encode import encode, resize_shorter
from common.data.prepare.settings import Settings
from common.data.recordio import unframe, unpack
from common.data.source import BadSample, DataError
from common.errors import ConfigError, RunError
from tests.common.data.forms import FORM_NAMES, few_digits, read_all, write_split

SMALL = {"folder": {}, "recordio": {"parts": 3}, "webdataset": {"shard_samples": 5}}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for split, begin in (("train", 0), ("val", 13)):
        write_split(tmp_path / "source", "folder", few_digits(26)[begin : begin + 13], split)
    return tmp_path / "source"


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def named(root: Path, split: str, form: str) -> Counter[tuple[str, bytes, int]]:
    source = open_source(root, split, form)
    return Counter((source.name(index), *source.read(index)) for index in range(len(source)))


@pytest.mark.parametrize("after", FORM_NAMES)
@pytest.mark.parametrize("before", FORM_NAMES)
def test_round_trip_keeps_bytes_labels_and_names(
    source: Path, tmp_path: Path, before: str, after: str
) -> None:
    shuffled = Settings(before, shuffle=3, **SMALL[before])
    assert convert(find_splits(source), tmp_path / "there", shuffled)
    assert convert(find_splits(tmp_path / "there"), tmp_path / "back", Settings(after, **SMALL[after]))
    for split in ("train", "val"):
        assert named(tmp_path / "back", split, after) == named(source, split, "folder")
    assert sorted(os.listdir(tmp_path)) == ["back", "source", "there"]


def test_shuffled_order_is_a_function_of_the_seed(source: Path, tmp_path: Path) -> None:
    orders = {}
    for name, seed in (("a", None), ("b", 1), ("c", 1), ("d", 2)):
        convert(find_splits(source), tmp_path / name, Settings("recordio", shuffle=seed))
        orders[name] = read_all(open_source(tmp_path / name, "train"))
    assert orders["a"] == read_all(open_source(source, "train"))
    assert orders["b"] == orders["c"] != orders["d"]
    assert sorted(orders["b"]) == sorted(orders["d"]) == sorted(orders["a"])


@pytest.mark.parametrize("form", FORM_NAMES)
def test_one_and_two_workers_write_the_same_bytes(source: Path, tmp_path: Path, form: str) -> None:
    settings = Settings(form, resize=48, quality=90, shuffle=1, **SMALL[form])
    for workers in (1, 2):
        assert convert(find_splits(source), tmp_path / str(workers), settings, workers=workers)
    one = contents(tmp_path / "1")
    assert one == contents(tmp_path / "2")
    assert len(one) > 5
    image = Image.open(io.BytesIO(open_source(tmp_path / "2", "val", form).read(0)[0]))
    assert image.size == (48, 48)


@pytest.mark.parametrize("form", FORM_NAMES)
def test_killed_anywhere_it_goes_on_without_touching_what_is_finished(
    source: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "UNIT_FILES", 5)
    settings, sources = Settings(form, **SMALL[form]), find_splits(source)
    convert(sources, tmp_path / "whole", settings)
    whole, kills, out = contents(tmp_path / "whole"), 0, tmp_path / "out"
    partial = tmp_path / ".out.partial"
    finished: dict[str, int] = {}
    while not out.exists():
        # Each run is killed a little later than the one before, counted in changes to the disk's names.
        child = os.fork()
        if child == 0:
            _die_at(kills + 1)
            convert(sources, out, settings)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        there = out if out.exists() else partial / "data"
        now = {name: (there / name).stat().st_mtime_ns for name in contents(there)} if there.exists() else {}
        assert {name: now.get(name) for name in finished} == finished
        finished = {name: now[name] for name in _finished_files(partial, form)} if partial.exists() else {}
        kills += 1
        assert kills < 60
    assert kills > 4
    assert contents(out) == whole
    assert not convert(sources, out, settings)
    convert(sources, tmp_path / "again", settings)  # nothing of the killed runs is left over
    assert sorted(name for name in os.listdir(tmp_path) if "partial" not in name) == [
        "again", "out", "source", "whole",
    ]  # fmt: skip


def _die_at(calls: int) -> None:
    left = [calls]

    def dying(function):
        def call(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in ("mkdir", "rename", "replace"):
        setattr(os, name, dying(getattr(os, name)))


def _finished_files(partial: Path, form: str) -> Iterator[str]:
    progress = partial / "progress.jsonl"
    for line in progress.read_text().splitlines() if progress.exists() else []:
        name = json.loads(line)["shard"]["name"]
        yield from (
            [line[66:] for line in (partial / name).read_text().splitlines()] if form == "folder" else [name]
        )


def test_goes_on_only_with_the_same_settings_and_source(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        _die_at(12)
        convert(find_splits(source), out, Settings("recordio", resize=40))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with pytest.raises(DataError, match="begun with resize 40, not 30; go on with the same, or remove"):
        convert(find_splits(source), out, Settings("recordio", resize=30))
    write_split(tmp_path / "other", "folder", few_digits(20))
    with pytest.raises(DataError, match="begun with another source; go on with the same, or remove"):
        convert(find_splits(tmp_path / "other"), out, Settings("recordio", resize=40))
    assert convert(find_splits(source), out, Settings("recordio", resize=40))
    with pytest.raises(DataError, match="there already, made with .*resize 40, not None"):
        convert(find_splits(source), out, Settings("recordio"))
    with pytest.raises(DataError, match="there already, made with another source"):
        convert(find_splits(tmp_path / "other"), out, Settings("recordio", resize=40))


def test_a_finished_shard_that_is_gone_is_named(source: Path, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        _die_at(10)
        convert(find_splits(source), tmp_path / "out", Settings("webdataset", shard_samples=3))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (tmp_path / ".out.partial/data/train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar is missing or damaged; remove the folder"):
        convert(find_splits(source), tmp_path / "out", Settings("webdataset", shard_samples=3))


def test_unusable_samples_are_listed_and_left_out(source: Path, tmp_path: Path) -> None:
    files = sorted((source / "train").rglob("*.jpg"))
    files[2].write_text("not an image")
    files[5].write_bytes(files[5].read_bytes()[:600])
    files[-1].unlink()
    files[-1].symlink_to("nowhere")
    good = _readable(source, check=False)
    assert len(good) == 11
    for form in FORM_NAMES:
        out = tmp_path / form
        assert convert(find_splits(source), out, Settings(form, **SMALL[form]), max_unreadable=0.2)
        assert sorted(read_all(open_source(out, "train", form))) == sorted(good)
        listed = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
        assert [entry["reason"] for entry in listed] == ["not an image", "unreadable"]
        assert listed[0]["where"] == str(files[2].relative_to(source / "train"))
        assert [entry["shard"] for entry in listed] == [f"train/{files[n].parent.name}" for n in (2, -1)]
        assert json.loads((out / "train.json").read_text())["unusable"] == 2
    with pytest.raises(
        RunError, match="3 unusable samples in split 'train', more than --max-unreadable allows"
    ):
        convert(
            find_splits(source), tmp_path / "checked", Settings("recordio", check=True), max_unreadable=0.2
        )
    assert convert(
        find_splits(source), tmp_path / "checked", Settings("recordio", check=True), max_unreadable=0.3
    )
    assert read_all(open_source(tmp_path / "checked", "train")) == _readable(source, check=True)


def _readable(root: Path, check: bool) -> list[tuple[bytes, int]]:
    found = []
    source = open_source(root, "train")
    for index in range(len(source)):
        try:
            image, label = source.read(index)
            found.append((encode(image, "", Settings("folder", check=check)), label))
        except BadSample:
            pass
    return found


def test_files_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    a, b, c = (data for _, data, _ in few_digits(3))
    for name, data in (("x y.jpg", a), ("x.y.jpg", b), ("x_y_2.jpg", c)):
        (tmp_path / "in/train/one").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in/train/one" / name).write_bytes(data)
    convert(find_splits(tmp_path / "in"), tmp_path / "out", Settings("folder"))
    assert contents(tmp_path / "out/train/one") == {"x_y.jpg": a, "x_y_2.jpg": b, "x_y_2_2.jpg": c}


@pytest.mark.parametrize("classes", ["../a", "a/b", ".hidden", "tab\tname"])
def test_class_names_never_lead_out_of_the_folder(tmp_path: Path, classes: str) -> None:
    write_split(tmp_path / "in", "recordio", few_digits(3))
    (tmp_path / "in/classes.txt").write_text("\n".join([classes, *"123456789"]) + "\n")
    with pytest.raises(DataError, match="class name"):
        convert(find_splits(tmp_path / "in"), tmp_path / "out", Settings("folder"))
    assert os.listdir(tmp_path) == ["in"]


def test_class_folders_would_number_these_anew(tmp_path: Path) -> None:
    write_split(tmp_path / "in", "recordio", few_digits(3))
    (tmp_path / "in/classes.txt").write_text("\n".join(reversed("0123456789")) + "\n")
    with pytest.raises(DataError, match="numbered by the alphabet, these classes are not"):
        convert(find_splits(tmp_path / "in"), tmp_path / "out", Settings("folder"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "zip"}, "format: 'zip'"),
        ({"quality": 0}, "quality: 0 is not between 1 and 100"),
        ({"resize": -3}, "resize: -3"),
        ({"parts": 0}, "parts: 0"),
        ({"shuffle": -1}, "shuffle: -1"),
    ],
)
def test_settings_out_of_range(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Settings(**{"format": "recordio"} | options)


def test_more_parts_than_samples(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="14 parts of the 13 samples of 'train'"):
        convert(find_splits(source), tmp_path / "out", Settings("recordio", parts=14))


@pytest.mark.parametrize(
    "size", [(500, 375), (375, 500), (20, 30), (640, 480), (333, 1000), (481, 481), (1, 7)]
)
def test_resize_is_bilinear_between_four_pixels(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    side = 100 if size != (640, 480) else 480
    resized = np.asarray(resize_shorter(Image.fromarray(pixels), side))
    height, width = (length * side // min(size) for length in (size[1], size[0]))
    assert resized.shape == (height, width, 3)

    def at(length: int, old: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        place = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        return low, np.minimum(low + 1, old - 1), place - low

    (y0, y1, v), (x0, x1, u) = at(height, size[1]), at(width, size[0])
    u, v, real = u[:, None], v[:, None, None], pixels.astype(float)
    upper = real[y0][:, x0] * (1 - u) + real[y0][:, x1] * u
    lower = real[y1][:, x0] * (1 - u) + real[y1][:, x1] * u
    assert np.abs(resized - (upper * (1 - v) + lower * v)).max() <= 1


def test_quality_is_im2recs() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    file, expected = io.BytesIO(), io.BytesIO()
    image.save(file, "PNG")
    image.save(expected, "JPEG", quality=90)
    data = file.getvalue()
    assert encode(data, "", Settings("folder", quality=90)) == expected.getvalue()
    assert encode(data, "", Settings("folder")) == data
    unsized = Image.open(io.BytesIO(encode(data, "", Settings("folder", resize=30))))
    image.save(expected := io.BytesIO(), "JPEG", quality=95)
    assert unsized.quantization == Image.open(expected).quantization


def test_lists_and_indexes_are_im2recs(source: Path, tmp_path: Path) -> None:
    convert(find_splits(source), tmp_path / "out", Settings("recordio", parts=3, shuffle=5))
    joined = (tmp_path / "out/train.idx").read_text().split()
    whole = b"".join((tmp_path / f"out/train_{part}.rec").read_bytes() for part in range(3))
    offsets = [*map(int, joined[1::2]), len(whole)]
    lines = [
        line.split("\t")
        for part in range(3)
        for line in (tmp_path / f"out/train_{part}.lst").read_text().splitlines()
    ]
    assert [line[0] for line in lines] == joined[::2] == [str(number) for number in range(13)]
    for (number, label, path), begin, end in zip(lines, offsets, offsets[1:]):
        record = unpack(unframe(whole[begin:end]))
        assert (record.id, record.labels) == (int(number), (float(label),))
        assert (source / "train" / path).read_bytes() == record.image


def test_dali_reads_parts_by_their_joined_index(source: Path, tmp_path: Path) -> None:
    convert(find_splits(source), tmp_path / "out", Settings("recordio", parts=3, shuffle=5))
    paths = [str(tmp_path / f"out/train_{part}.rec") for part in range(3)]
    read = _by_dali("mxnet", path=paths, index_path=[str(tmp_path / "out/train.idx")])
    assert [(image, int(label[0])) for image, label in read] == read_all(
        open_source(tmp_path / "out", "train")
    )


def test_dali_reads_shards(source: Path, tmp_path: Path) -> None:
    convert(find_splits(source), tmp_path / "out", Settings("webdataset", shard_samples=5, shuffle=5))
    shards = sorted((tmp_path / "out").glob("train-*.tar"))
    read = _by_dali(
        "webdataset",
        paths=[str(shard) for shard in shards],
        index_paths=[str(shard.with_suffix(".idx")) for shard in shards],
        ext=["jpg", "cls"],
    )
    assert len(shards) == 3
    assert [(image, int(label.tobytes())) for image, label in read] == read_all(
        open_source(tmp_path / "out", "train")
    )


def test_dali_reads_class_folders(source: Path, tmp_path: Path) -> None:
    convert(find_splits(source), tmp_path / "out", Settings("folder"))
    read = _by_dali("file", file_root=str(tmp_path / "out/train"))
    assert [(image, int(label[0])) for image, label in read] == read_all(
        open_source(tmp_path / "out", "train")
    )


def _by_dali(reader: str, **options: object) -> list[tuple[bytes, np.ndarray]]:
    dali = pytest.importorskip("nvidia.dali")

    @dali.pipeline_def(batch_size=13, num_threads=1, device_id=None)
    def pipeline():
        return tuple(getattr(dali.fn.readers, reader)(**options, dont_use_mmap=True))

    pipe = pipeline()
    pipe.build()
    images, labels = pipe.run()
    return [(np.asarray(images[n]).tobytes(), np.asarray(labels[n])) for n in range(13)]
