"""ImageNet from archives in the official layout, and archives that are not what they are called."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from common.data.forms import open_source
from common.data.prepare import imagenet
from common.data.prepare.convert import convert
from common.data.prepare.imagenet import DEVKIT, TRAIN, VAL, open_imagenet
from common.data.prepare.settings import Settings
from common.data.source import DataError
from tests.common.data.archives import (
    IDS,
    TRUTH,
    WNIDS,
    devkit,
    tar_of,
    train_images,
    val_images,
    write_archives,
)
from tests.common.data.forms import FORM_NAMES, read_all


@pytest.mark.parametrize("form", FORM_NAMES)
def test_archives_become_every_form(tmp_path: Path, form: str) -> None:
    sources = open_imagenet(write_archives(tmp_path / "in"))
    convert(sources, tmp_path / "out", Settings(form))
    train, val = (open_source(tmp_path / "out", split, form) for split in ("train", "val"))
    assert train.classes == val.classes == WNIDS
    names = {train.name(index): train.read(index) for index in range(len(train))}
    assert names == {
        name.removesuffix(".JPEG"): (data, label)
        for label, (_, files) in enumerate(train_images().items())
        for name, data in files.items()
    }
    wnid_of = {number: wnid for wnid, number in IDS.items()}
    truth = [WNIDS.index(wnid_of[number]) for number in TRUTH]
    pairs = list(zip(val_images().values(), truth))
    assert sorted(read_all(val)) == sorted(pairs)
    if form != "folder":
        assert read_all(val) == pairs
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_class_folders_give_the_same_as_archives(tmp_path: Path) -> None:
    convert(open_imagenet(write_archives(tmp_path / "in")), tmp_path / "folders", Settings("folder"))
    sources = open_imagenet(tmp_path / "folders")
    assert {split: len(source) for split, source in sources.items()} == {"train": 12, "val": 5}
    (tmp_path / "folders/train/dog").mkdir()
    with pytest.raises(DataError, match="class folder 'dog' is not a WordNet id"):
        open_imagenet(tmp_path / "folders")


def test_training_archive_alone(tmp_path: Path) -> None:
    root = write_archives(tmp_path / "in")
    for name in (VAL, DEVKIT):
        (root / name).unlink()
    assert list(open_imagenet(root)) == ["train"]


BAD_NAMES = [
    "../n01440764_1.JPEG",
    "/etc/n01440764_1.JPEG",
    "n02105855_1.JPEG",
    "n01440764_1.JPEG/../../x",
    "x.sh",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_not_imagenets(tmp_path: Path, name: str) -> None:
    root = write_archives(tmp_path / "in")
    (root / TRAIN).write_bytes(tar_of({"n01440764.tar": tar_of({name: b"\xff\xd8\xff"})}))
    with pytest.raises(DataError, match="is none of ImageNet's"):
        open_imagenet(root)
    assert os.listdir(tmp_path) == ["in"]


def _damage(root: Path, what: str) -> None:
    train, val, kit = root / TRAIN, root / VAL, root / DEVKIT
    damages = {
        "nothing there": lambda: [path.unlink() for path in (train, val, kit)],
        "no devkit": kit.unlink,
        "train is cut off": lambda: train.write_bytes(train.read_bytes()[: 10 * 512]),
        "train is text": lambda: train.write_bytes(b"hello " * 1000),
        "train is empty": lambda: train.write_bytes(tar_of({})),
        "a class tar is cut off": lambda: train.write_bytes(
            tar_of({"n01440764.tar": tar_of(train_images()["n01440764"])[:2000]})
        ),
        "a class tar is no tar": lambda: train.write_bytes(tar_of({"n01440764.tar": b"x" * 4096})),
        "a class is missing": lambda: train.write_bytes(
            tar_of({f"{wnid}.tar": tar_of(files) for wnid, files in list(train_images().items())[:2]})
        ),
        "an image is missing": lambda: val.write_bytes(tar_of(dict(list(val_images().items())[:4]))),
        "a label too many": lambda: kit.write_bytes(devkit([*TRUTH, 1])),
        "an unknown label": lambda: kit.write_bytes(devkit([*TRUTH[:4], 4])),
        "devkit is cut off": lambda: kit.write_bytes(kit.read_bytes()[:-20]),
        "devkit is no gzip": lambda: kit.write_bytes(b"hello"),
        "devkit is no tar": lambda: kit.write_bytes(gzip.compress(b"hello" * 1000)),
        "devkit has no meta.mat": lambda: kit.write_bytes(
            tar_of({"data/ILSVRC2012_validation_ground_truth.txt": b"1\n"}, "w:gz")
        ),
        "meta.mat is text": lambda: kit.write_bytes(
            tar_of(
                {"data/ILSVRC2012_validation_ground_truth.txt": b"1\n", "data/meta.mat": b"text" * 99}, "w:gz"
            )
        ),
        "devkit is a bomb": lambda: kit.write_bytes(gzip.compress(bytes(3 << 20))),
    }
    damages[what]()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nothing there", "expected ILSVRC2012_img_train.tar"),
        ("no devkit", "devkit_t12.tar.gz is missing; the labels"),
        ("train is cut off", "is cut off"),
        ("train is text", "no tar header at byte 0"),
        ("train is empty", "is empty"),
        ("a class tar is cut off", "is cut off"),
        ("a class tar is no tar", "no tar header at byte 512"),
        ("a class is missing", "differ in 1 classes, the first n03000134"),
        ("an image is missing", "4 images for 5 labels"),
        ("a label too many", "5 images for 6 labels"),
        ("an unknown label", "no synset of data/meta.mat has the id 4"),
        ("devkit is cut off", "is damaged"),
        ("devkit is no gzip", "is damaged"),
        ("devkit is no tar", "is damaged"),
        ("devkit has no meta.mat", "data/meta.mat is not in it"),
        ("meta.mat is text", "is not a table of synsets"),
        ("devkit is a bomb", "unpacks to more than"),
    ],
)
def test_archives_that_cannot_be_used(
    tmp_path: Path, what: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagenet, "_MAX_DEVKIT", 1 << 20)
    root = write_archives(tmp_path / "in")
    _damage(root, what)
    with pytest.raises(DataError) as error:
        open_imagenet(root)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
