"""What holds for every form: the same samples, one contract, one-line errors."""

from __future__ import annotations

import os
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.data.digits import CLASSES, digits_samples, prepare_digits
from common.data.forms import open_source
from common.data.source import BadSample, DataError, Names
from tests.common.data.forms import FORM_NAMES, damage, few_digits, pairs, read_all, readable, write_split


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    for form in FORM_NAMES:
        prepare_digits(root / form, form)
    return root


def test_digits_are_the_same_in_every_form(digits: Path) -> None:
    for split, count in (("train", 1442), ("val", 355)):
        expected = sorted(pairs(list(digits_samples(split))))
        assert len(expected) == len(set(expected)) == count
        for form in FORM_NAMES:
            source = open_source(digits / form, split)
            assert source.classes == CLASSES
            assert sorted(read_all(source)) == expected


def test_digits_are_split_alike_in_every_class() -> None:
    keys = {split: {key for key, _, _ in digits_samples(split)} for split in ("train", "val")}
    assert not keys["train"] & keys["val"]
    assert len(keys["train"] | keys["val"]) == 1797
    labels = [label for _, _, label in digits_samples("val")]
    assert {labels.count(label) for label in range(10)} <= {34, 35, 36}


@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize("via", FORM_NAMES)
def test_round_trip(tmp_path: Path, form: str, via: str) -> None:
    samples = few_digits(40)
    write_split(tmp_path / "a", form, samples)
    first = open_source(tmp_path / "a", "train", form)
    write_split(tmp_path / "b", via, [(f"{n:06d}", *pair) for n, pair in enumerate(read_all(first))])
    second = open_source(tmp_path / "b", "train", via)
    assert sorted(read_all(second)) == sorted(pairs(samples))
    assert second.classes == first.classes
    if via != "folder":  # which sorts by class
        assert read_all(second) == read_all(first)


@pytest.mark.parametrize("form", FORM_NAMES)
def test_reads_alike_after_pickle_in_threads_and_after_fork(digits: Path, form: str) -> None:
    source = open_source(digits / form, "train")
    expected = read_all(source)
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 200_000  # no open files, no object for each sample
    order = random.Random(0).sample(range(len(source)), len(source))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(copy.read, order)) == [expected[index] for index in order]

    def in_child() -> int:
        return int([source.read(index) for index in order] != [expected[index] for index in order])

    children = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            os._exit(in_child())
        children.append(child)
    assert [source.read(index) for index in order] == [expected[index] for index in order]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def test_reads_more_shards_than_stay_open(tmp_path: Path) -> None:
    samples = few_digits(150)
    write_split(tmp_path, "webdataset", samples, max_samples=1)
    source = open_source(tmp_path, "train")
    before = len(os.listdir("/proc/self/fd"))
    reads = ThreadPoolExecutor(3).map(source.read, [*range(150), *reversed(range(150))])
    assert list(reads) == pairs(samples) + pairs(samples)[::-1]
    assert len(os.listdir("/proc/self/fd")) - before <= 3 * 64


@pytest.mark.parametrize("form", FORM_NAMES)
def test_fingerprint_tells_data_apart(tmp_path: Path, form: str) -> None:
    samples = few_digits()
    changed = {
        "same": samples,
        "fewer": samples[:-1],
        "another image": [*samples[:-1], (samples[-1][0], samples[0][1], samples[-1][2])],
        "another key" if form == "folder" else "another order": [
            (f"{n:04d}", data, label) for n, (_, data, label) in enumerate(reversed(samples))
        ],
    }
    prints = {}
    for name, content in {"first": samples, **changed}.items():
        write_split(tmp_path / name, form, content)
        prints[name] = open_source(tmp_path / name, "train").fingerprint()
    assert prints.pop("same") == prints["first"]
    assert len(set(prints.values())) == len(prints)
    assert all(len(value) == 64 and int(value, 16) >= 0 for value in prints.values())


def test_where_names_the_place(tmp_path: Path) -> None:
    for form in FORM_NAMES:
        write_split(tmp_path / form, form, few_digits())
    sources = [open_source(tmp_path / form, "train") for form in FORM_NAMES]
    assert [source.shard(3) for source in sources] == ["train/1", "train.rec", "train-000000.tar"]
    places = [source.where(3) for source in sources]
    assert places[0] == "1/0011.jpg"  # sorted by class: 0/0000, 0/0010, 1/0001, 1/0011
    assert places[1].startswith("train.rec record 3 at byte ")
    assert places[2] == "train-000000.tar: 0003.jpg"


@pytest.mark.parametrize(
    ("path", "split", "format", "words"),
    [
        ("nowhere", "train", "auto", "'{root}/nowhere' is not an existing folder"),
        (
            "folder",
            "test",
            "auto",
            "no data of split 'test'.*test/CLASS.*test.rec.*there is classes.txt, train",
        ),
        ("recordio", "train", "folder", "no folder data of split 'train'.*there is classes.txt, train.idx"),
        ("folder", "train", "zip", "format: 'zip' is not one of auto, folder, recordio, webdataset"),
        ("folder", "../x", "auto", "split: '../x' is not a name"),
        ("both", "train", "auto", "there as folder and recordio; name one as the format"),
        ("empty", "train", "auto", "there is nothing"),
        ("folder/train", "train", "auto", "there is 0, 1, 2"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, path: str, split: str, format: str, words: str) -> None:
    write_split(tmp_path / "folder", "folder", few_digits())
    write_split(tmp_path / "recordio", "recordio", few_digits())
    write_split(tmp_path / "both", "recordio", few_digits())
    write_split(tmp_path / "both", "folder", few_digits())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=words.replace("{root}", str(tmp_path))) as raised:
        open_source(tmp_path / path, split, format)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["pipe:cat x", "ftp://host/x", "gs://bucket/x", "file:///x", "http:/x"])
def test_urls_are_refused(path: str) -> None:
    with pytest.raises(DataError, match="only local folders"):
        open_source(path, "train")


@pytest.mark.parametrize("content", [None, b"", b"0\n\n1\n", b"0\n0\n", b"\xff\xfe\n"])
def test_class_names_are_checked(tmp_path: Path, content: bytes | None) -> None:
    write_split(tmp_path, "recordio", few_digits())
    (tmp_path / "classes.txt").unlink()
    if content is not None:
        (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match="one class name a line"):
        open_source(tmp_path, "train")


def test_folder_classes_are_those_of_training(tmp_path: Path) -> None:
    write_split(tmp_path, "folder", few_digits(20))
    for name in ("3", "7"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "a.jpg").write_bytes(b"x")
    source = open_source(tmp_path, "val")
    assert source.classes == CLASSES
    assert [source.read(index)[1] for index in range(2)] == [3, 7]
    (tmp_path / "val" / "cat").mkdir()
    with pytest.raises(DataError, match="class 'cat' is not among the classes of"):
        open_source(tmp_path, "val")


def test_folder_names_what_is_not_an_image(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    for name in ("b.JPEG", "a.png", ".hidden.jpg", "notes.txt"):
        (folder / name).write_bytes(b"x")
    (folder / "d.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "c.jpg")
    source = open_source(tmp_path, "train")
    assert [source.where(index) for index in range(4)] == [
        "cat/a.png",
        "cat/b.JPEG",
        "cat/c.jpg",
        "cat/d.jpg",
    ]
    assert len(source) == 4
    for index, detail in ((2, "not a regular file"), (3, "No such file")):
        with pytest.raises(BadSample, match=detail):
            source.read(index)
    (folder / "kittens").mkdir()
    with pytest.raises(DataError, match="kittens is a folder inside a class folder"):
        open_source(tmp_path, "train")


def test_folder_without_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="no class folders; expected val/CLASS"):
        open_source(tmp_path, "val")
    (tmp_path / "val" / "cat").mkdir()
    with pytest.raises(DataError, match="holds no samples"):
        open_source(tmp_path, "val")


@pytest.mark.parametrize("form", FORM_NAMES)
def test_writers_refuse_what_is_there_and_bad_samples(tmp_path: Path, form: str) -> None:
    samples = few_digits()
    write_split(tmp_path / "a", form, samples)
    with pytest.raises(DataError, match="is there already"):
        write_split(tmp_path / "a", form, samples)
    with pytest.raises((ValueError, IndexError)):
        write_split(tmp_path / "b", form, [*samples[:3], ("0009", samples[0][1], 10)])
    assert os.listdir(tmp_path / "b") == []


@pytest.mark.parametrize("form", ["recordio", "webdataset"])
def test_any_damage_gives_only_typed_errors(tmp_path: Path, form: str) -> None:
    write_split(tmp_path, form, few_digits(6), **({"max_samples": 4} if form == "webdataset" else {}))
    originals = {path: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".lst"}
    draw = random.Random(7)
    whole = 0
    for _ in range(500):
        path = draw.choice(sorted(originals))
        damaged = damage(originals[path], draw)
        path.write_bytes(damaged)
        whole += len(readable(tmp_path)) == 6
        path.write_bytes(originals[path])
    assert len(readable(tmp_path)) == 6
    assert 0 < whole < 400  # image bytes carry no checksum, everything else is noticed


def test_names_are_kept_in_two_buffers() -> None:
    names = [b"", b"a", b"bcd", b"", b"e"]
    assert [Names(names)[index] for index in range(5)] == names
