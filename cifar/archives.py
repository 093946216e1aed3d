"""The official CIFAR archives, python and binary version: checked, and read without running anything in them."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.data.source import DataError

SAMPLES = {"train": 50_000, "val": 10_000}
PIXELS = 3 * 32 * 32


class Images(NamedTuple):
    """One split: images (N, 3, H, W) uint8 and class indices (N,) int64."""

    images: np.ndarray
    labels: np.ndarray


@dataclass
class Official:
    """What cs.toronto.edu/~kriz/cifar.html offers of one data set; the binary files' names without ``.bin``."""

    md5: dict[str, str]
    train: tuple[str, ...]
    test: str
    python_classes: tuple[str, str]
    """File and key of the class names in the python version."""
    binary_classes: str
    label_key: str
    label_bytes: int
    """Of a binary record; the last one is the label."""


OFFICIAL = {
    "cifar10": Official(
        md5={
            "c58f30108f718f92721af3b95e74349a": "python",
            "c32a1d4ab5d03f1284b67883e8d87530": "binary",
            "70270af85842c9e89bb428ec9976c926": "MATLAB",
        },
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        python_classes=("batches.meta", "label_names"),
        binary_classes="batches.meta.txt",
        label_key="labels",
        label_bytes=1,
    ),
    "cifar100": Official(
        md5={
            "eb9058c3a382ffc7106e4002c42a8d85": "python",
            "03b5dce01913d631647c71ecec9e9cb8": "binary",
            "6a4bfa1dcd5c9453dda6bb54194911f4": "MATLAB",
        },
        train=("train",),
        test="test",
        python_classes=("meta", "fine_label_names"),
        binary_classes="fine_label_names.txt",
        label_key="fine_labels",
        label_bytes=2,
    ),
}


def read_official(name: str, path: Path) -> tuple[dict[str, Images], tuple[str, ...]]:
    """The splits ``train`` and ``val`` (the official test images) of ``cifar10`` or ``cifar100``, and the classes.

    Args:
        path: the archive as it was downloaded, or the folder that it was extracted to.

    Raises:
        DataError: the checksum is not an official one, a file is missing, cut off or not what it should be.
    """
    official = OFFICIAL[name]
    python = {*official.train, official.test, official.python_classes[0]}
    binary = {*(f"{file}.bin" for file in (*official.train, official.test)), official.binary_classes}
    files = (
        _read_folder(path, python | binary) if path.is_dir() else _read_archive(name, path, python | binary)
    )
    if python <= files.keys():
        return _read_python(official, files, path)
    if binary <= files.keys():
        return _read_binary(official, files, path)
    nearer = max(python, binary, key=lambda wanted: len(wanted & files.keys()))
    raise DataError(f"{path}: not the files of {name}: {', '.join(sorted(nearer - files.keys()))} missing")


class _Plain(pickle.Unpickler):
    """Reads dicts, lists, strings, numbers and NumPy arrays of numbers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return lambda kind, shape, code: np.ndarray((0,), np.uint8)
        if (module, name) == ("numpy", "ndarray"):
            return None  # only named as an argument of _reconstruct
        if (module, name) == ("numpy", "dtype"):
            return lambda code, *_: np.dtype(_number(code))
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, _: text.encode("latin1")
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _number(code: str) -> str:
    if code.lstrip("<>|=") not in ("u1", "i1", "i4", "i8", "f4", "f8"):
        raise pickle.UnpicklingError(f"an array of {code!r}")
    return code


def _unpickle(data: bytes, where: str) -> dict[str, Any]:
    try:
        content = _Plain(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # whatever a damaged pickle makes the machine stumble over
        raise DataError(
            f"{where}: refused or damaged, not a file of CIFAR's python version ({error})"
        ) from None
    if not isinstance(content, dict):
        raise DataError(f"{where}: holds a {type(content).__name__}, expected a dictionary")
    return content


def _read_python(
    official: Official, files: dict[str, bytes], path: Path
) -> tuple[dict[str, Images], tuple[str, ...]]:
    splits = {}
    for split, names in (("train", official.train), ("val", (official.test,))):
        parts = []
        for name in names:
            batch = _unpickle(files[name], f"{path}: {name}")
            pixels, labels = batch.get("data"), batch.get(official.label_key)
            if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or not isinstance(labels, list):
                raise DataError(f"{path}: {name}: expected uint8 'data' and a list {official.label_key!r}")
            parts.append((pixels, np.array(labels)))
        splits[split] = _join(parts, split, path)
    file, key = official.python_classes
    classes = _unpickle(files[file], f"{path}: {file}").get(key)
    return splits, _class_names(classes, splits, f"{path}: {file}")


def _read_binary(
    official: Official, files: dict[str, bytes], path: Path
) -> tuple[dict[str, Images], tuple[str, ...]]:
    splits, width = {}, official.label_bytes + PIXELS
    for split, names in (("train", official.train), ("val", (official.test,))):
        parts = []
        for name in names:
            data = files[f"{name}.bin"]
            if len(data) % width:
                raise DataError(
                    f"{path}: {name}.bin: {len(data)} bytes are not whole records of {width}: cut off?"
                )
            records = np.frombuffer(data, np.uint8).reshape(-1, width)
            parts.append((records[:, official.label_bytes :], records[:, official.label_bytes - 1]))
        splits[split] = _join(parts, split, path)
    classes = files[official.binary_classes].decode("ascii", "replace").split()
    return splits, _class_names(classes, splits, f"{path}: {official.binary_classes}")


def _join(parts: Sequence[tuple[np.ndarray, np.ndarray]], split: str, path: Path) -> Images:
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts))
    found, wanted = (pixels.shape, labels.shape), ((SAMPLES[split], PIXELS), (SAMPLES[split],))
    if found != wanted:
        raise DataError(
            f"{path}: {split}: found {found[0]} pixels and {found[1]} labels, expected {wanted[0]}"
        )
    return Images(pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64))


def _class_names(names: Any, splits: dict[str, Images], where: str) -> tuple[str, ...]:
    largest = max(int(split.labels.max()) for split in splits.values())
    smallest = min(int(split.labels.min()) for split in splits.values())
    if not isinstance(names, list) or smallest < 0 or largest >= len(names):
        raise DataError(f"{where}: {names!r:.60} does not name the classes {smallest} to {largest}")
    return tuple(map(str, names))


def _read_folder(path: Path, wanted: set[str]) -> dict[str, bytes]:
    inner = [
        folder for folder in sorted(path.iterdir()) if folder.is_dir() and folder.name.startswith("cifar-")
    ]
    folder = inner[0] if len(inner) == 1 else path
    return {name: (folder / name).read_bytes() for name in sorted(wanted) if (folder / name).is_file()}


def _read_archive(name: str, path: Path, wanted: set[str]) -> dict[str, bytes]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected the archive or the folder it was extracted to")
    with open(path, "rb") as file:
        checksum = hashlib.md5(usedforsecurity=False)
        while block := file.read(1 << 20):
            checksum.update(block)
    _check(name, path, checksum.hexdigest())
    with tarfile.open(path, "r:gz") as tar:
        members = ((member.name.rpartition("/")[2], member) for member in tar if member.isfile())
        return {base: tar.extractfile(member).read() for base, member in members if base in wanted}  # type: ignore[union-attr]


def _check(name: str, path: Path, checksum: str) -> None:
    for other, official in OFFICIAL.items():
        version = official.md5.get(checksum)
        if version and (other != name or version == "MATLAB"):
            raise DataError(
                f"{path} is the {version} version of {other}; expected the python or binary one of {name}"
            )
    if checksum not in OFFICIAL[name].md5:
        right = ", ".join(f"{kind} {md5}" for md5, kind in OFFICIAL[name].md5.items() if kind != "MATLAB")
        size = path.stat().st_size
        raise DataError(
            f"{path} ({size} bytes) has MD5 {checksum}, an official archive of {name} has {right}: "
            "it is cut off, damaged or another file; download it again"
        )
