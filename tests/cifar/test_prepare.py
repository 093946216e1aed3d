"""``cifar/prepare.py``: official archives as they were published (in small), refused ones, and every form."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from cifar import archives, prepare
from cifar.archives import OFFICIAL, PIXELS
from common.data.memory import MemoryConfig, load_memory
from common.errors import UserError
from tests.processes import error_line, run

COUNTS = {"train": 10, "val": 4}
NAMES = {"cifar10": [f"animal{i}" for i in range(10)], "cifar100": [f"thing{i}" for i in range(100)]}


def content(name, split):
    """Pixels (n, 3072) and labels of a made-up small CIFAR."""
    random = np.random.default_rng([split == "val", len(name)])
    count = COUNTS[split]
    return random.integers(0, 256, (count, PIXELS), np.uint8), random.integers(
        0, len(NAMES[name]), count
    ).tolist()


def parts(name):
    """File name → pixels and labels of all the files of a data set."""
    official = OFFICIAL[name]
    pixels, labels = content(name, "train")
    share = len(labels) // len(official.train)
    cuts = {
        file: (pixels[i * share :][:share], labels[i * share :][:share])
        for i, file in enumerate(official.train)
    }
    return cuts | {official.test: content(name, "val")}


def python2_array(array):
    """The pickle instructions with which Python 2's NumPy wrote an array of bytes."""
    rows, columns, raw = *array.shape, array.tobytes()
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = (
        b"(K\x01M" + struct.pack("<H", rows) + b"M" + struct.pack("<H", columns) + b"\x86" + dtype + b"\x89"
    )
    data = b"T" + struct.pack("<i", len(raw)) + raw
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R" + state + data + b"tb"
    )


def python2_batch(pixels, labels, key):
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    name = b"U" + bytes([len(key)]) + key.encode()
    return b"\x80\x02}(U\x04data" + python2_array(pixels) + name + numbers + b"u."


def python_files(name, batch=python2_batch):
    official = OFFICIAL[name]
    file, key = official.python_classes
    files = {path: batch(*rows, official.label_key) for path, rows in parts(name).items()}
    return files | {file: pickle.dumps({key: NAMES[name]}, protocol=2)}


def python3_batch(pixels, labels, key):
    return pickle.dumps({"data": pixels, key: labels, "filenames": ["a.png"]}, protocol=2)


def binary_files(name):
    official, files = OFFICIAL[name], {}
    for path, (pixels, labels) in parts(name).items():
        coarse = b"\x07" * (official.label_bytes - 1)  # only CIFAR-100 has it
        files[f"{path}.bin"] = b"".join(coarse + bytes([n]) + p.tobytes() for n, p in zip(labels, pixels))
    return files | {official.binary_classes: "\n".join(NAMES[name]).encode() + b"\n\n"}


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"cifar-batches/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(archives, "SAMPLES", COUNTS)


@pytest.fixture
def official(monkeypatch):
    """Write an archive, and have its checksum count as the official one of ``name``."""

    def make(path, name, files, kind="python"):
        write_archive(path, files)
        monkeypatch.setitem(OFFICIAL[name].md5, hashlib.md5(path.read_bytes()).hexdigest(), kind)
        return path

    return make


def call(*argv):
    return prepare.main([str(word) for word in argv])


def assert_is(name, out, classes=None):
    for split in COUNTS:
        data = load_memory(MemoryConfig(path=str(out), workers=0), split, 32, False)
        pixels, labels = content(name, split)
        assert np.array_equal(data.images.numpy().reshape(-1, PIXELS), pixels)
        assert data.targets.tolist() == labels
        assert list(data.classes) == (classes or NAMES[name])


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("make", [python_files, binary_files])
def test_official_archives_and_the_folders_they_are_extracted_to(tmp_path, official, name, make, capsys):
    archive = official(tmp_path / "archive.tar.gz", name, make(name))
    assert call(name, archive, tmp_path / "a") == 0
    assert "10 train and 4 val images" in capsys.readouterr().out
    assert_is(name, tmp_path / "a")
    folder = tmp_path / "extracted" / "cifar-batches"
    folder.mkdir(parents=True)
    for path, data in make(name).items():
        (folder / path).write_bytes(data)
    for number, source in enumerate((folder, folder.parent)):
        assert call(name, source, tmp_path / f"b{number}") == 0
        assert_is(name, tmp_path / f"b{number}")


def test_pickles_of_python_3_are_read_too(tmp_path, official):
    archive = official(tmp_path / "archive.tar.gz", "cifar10", python_files("cifar10", python3_batch))
    call("cifar10", archive, tmp_path / "out")
    assert_is("cifar10", tmp_path / "out")


@pytest.mark.parametrize("form", prepare.FORMATS)
def test_all_forms_hold_the_same_pixels(tmp_path, official, form):
    archive = official(tmp_path / "archive.tar.gz", "cifar10", binary_files("cifar10"))
    call("cifar10", archive, tmp_path / "out", "--format", form)
    assert_is("cifar10", tmp_path / "out")
    listing = tmp_path / "out" / "train.lst"
    assert form != "recordio" or ".png" in listing.read_text()


class Touch:
    def __reduce__(self):
        return (open, ("pwned", "w"))


@pytest.mark.parametrize(
    "evil",
    [
        pickle.dumps(Touch(), protocol=2),
        pickle.dumps({"data": Touch()}, protocol=2),
        b"cos\nsystem\n(S'touch pwned'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        pickle.dumps({"data": np.array([Touch()], dtype=object)}, protocol=2),
        pickle.dumps([1], protocol=2),
        python2_batch(*content("cifar10", "train"), "labels")[:-50],
        b"",
    ],
)
def test_pickles_run_nothing(tmp_path, official, monkeypatch, evil):
    monkeypatch.chdir(tmp_path)
    archive = official(tmp_path / "a.tar.gz", "cifar10", python_files("cifar10") | {"data_batch_3": evil})
    with pytest.raises(UserError, match="data_batch_3") as raised:
        call("cifar10", archive, "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out").exists()


def test_wrong_archives_are_one_line(tmp_path, official, monkeypatch):
    files = python_files("cifar10")
    unknown = write_archive(tmp_path / "unknown.tar.gz", files | {"data_batch_1": b"other"})
    right = official(tmp_path / "right.tar.gz", "cifar10", files)
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(right.read_bytes()[:-1000])
    matlab = official(tmp_path / "matlab.tar.gz", "cifar10", {"x.mat": b""}, "MATLAB")
    fewer = {path: data for path, data in files.items() if path != "test_batch"}
    lacking = official(tmp_path / "lacking.tar.gz", "cifar10", fewer)
    odd = binary_files("cifar10") | {"data_batch_2.bin": b"x" * 5000}
    cut_binary = official(tmp_path / "odd.tar.gz", "cifar10", odd, "binary")
    short = binary_files("cifar10") | {"test_batch.bin": b"\0" * 3073}
    too_few = official(tmp_path / "short.tar.gz", "cifar10", short, "binary")
    labels = binary_files("cifar10") | {"test_batch.bin": b"\x0b" + bytes(3072) + bytes(3 * 3073)}
    label = official(tmp_path / "label.tar.gz", "cifar10", labels, "binary")
    (tmp_path / "empty").mkdir()
    for name, source, words in (
        ("cifar10", unknown, "cut off, damaged or another file"),
        ("cifar10", cut, "c58f30108f718f92721af3b95e74349a"),
        ("cifar100", right, "is the python version of cifar10"),
        ("cifar10", matlab, "is the MATLAB version of cifar10; expected the python or binary one"),
        ("cifar10", lacking, "test_batch missing"),
        ("cifar10", cut_binary, "data_batch_2.bin: 5000 bytes are not whole records of 3073"),
        ("cifar10", too_few, "val: found"),
        ("cifar10", label, "does not name the classes 0 to 11"),
        ("cifar10", tmp_path / "empty", "not the files of cifar10"),
        ("cifar10", tmp_path / "nowhere", "does not exist"),
    ):
        with pytest.raises(UserError, match=words) as raised:
            call(name, source, tmp_path / "out")
        assert raised.value.exit_code == 2
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "out").exists()


def test_official_checksums():
    """As cs.toronto.edu/~kriz/cifar.html gives them; of the python versions torchvision knows them as well."""
    from torchvision.datasets import CIFAR10, CIFAR100

    for name, theirs in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
        assert OFFICIAL[name].md5[theirs.tgz_md5] == "python"
        assert list(OFFICIAL[name].train) == [file for file, _ in theirs.train_list]
        assert OFFICIAL[name].python_classes == (theirs.meta["filename"], theirs.meta["key"])


def test_class_folders(tmp_path, monkeypatch):
    pixels, labels = content("cifar10", "train")
    for split in ("train", "test"):
        for number, (image, label) in enumerate(zip(pixels, labels)):
            path = tmp_path / "in" / split / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.reshape(3, 32, 32).transpose(1, 2, 0).copy()).save(path)
    call("folder", tmp_path / "in", tmp_path / "out", "--val", "test")
    data = load_memory(MemoryConfig(path=str(tmp_path / "out")), "val", 32, False)
    order = sorted(range(10), key=lambda i: (str(labels[i]), str(i)))
    assert np.array_equal(data.images.numpy().reshape(-1, PIXELS), pixels[order])
    (tmp_path / "in" / "test" / str(labels[0]) / "broken.png").write_bytes(b"GIF8")
    with pytest.raises(UserError, match="1 images of test cannot be read, the first: .*broken.png"):
        call("folder", tmp_path / "in", tmp_path / "other", "--val", "test")


def test_digits_as_a_user_makes_them(tmp_path):
    done = run("cifar/prepare.py", "digits", tmp_path / "digits", "--size", "16")
    assert (
        done.stdout
        == f"{tmp_path / 'digits'}: 1,442 train and 355 val images of 10 classes as memory, written\n"
    )
    data = load_memory(MemoryConfig(path=str(tmp_path / "digits")), "val", 16, False)
    assert (len(data), data.images.shape[1:], data.classes) == (355, (3, 16, 16), tuple("0123456789"))
    again = run("cifar/prepare.py", "digits", tmp_path / "digits")
    assert again.returncode == 2
    assert "is there already; remove it or name another folder" in error_line(again)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["cifar10", "source"], "required: OUT"),
        (["cifar11", "a", "b"], "invalid choice: 'cifar11'"),
        (["digits", "out", "--format", "zip"], "invalid choice: 'zip'"),
        (["digits", "out", "--size", "4"], "size 4: expected 8 to"),
        (["digits", "pipe:cat"], "not a local folder"),
        (["folder", "nowhere", "out"], "not an existing folder"),
        (["digits", "/proc/out"], "/proc"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as raised:
        call(*argv)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())
