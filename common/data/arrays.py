"""The memory form: ``{split}.npy`` (N, 3, H, W) uint8 and ``{split}.labels.npy`` (N,) int64, mapped into memory.

Beside them stand ``{split}.json``, with shape, classes and the SHA-256 of both files, and ``classes.txt``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.data.source import DataError, read_classes, refuse_existing
from common.files import atomic_write


def write_arrays(
    root: Path, split: str, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> None:
    """Write one split; the manifest comes last.

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N,) class indices.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels) or not len(images):
        raise ValueError(
            f"images {images.dtype} {images.shape}, labels {labels.shape}: expected (N, 3, H, W) uint8, (N,)"
        )
    if not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(f"labels {labels.min()} to {labels.max()}: expected 0 to {len(classes) - 1}")
    files = {f"{split}.npy": images, f"{split}.labels.npy": labels.astype(np.int64)}
    refuse_existing(root / f"{split}.npy")
    for name, array in files.items():
        with atomic_write(root / name) as file:
            np.save(file, array, allow_pickle=False)
    manifest = {
        "split": split,
        "shape": list(images.shape),
        "classes": list(classes),
        "sha256": {name: _sha256(root / name) for name in files},
    }
    with atomic_write(root / f"{split}.json") as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")


def open_arrays(root: Path, split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]] | None:
    """Images (mapped, not read), labels and class names of a split; None if it is not there in this form.

    Raises:
        DataError: a file is missing, cut off or not what was written.
    """
    path = root / f"{split}.npy"
    if not path.is_file():
        return None
    classes = read_classes(root)
    try:
        manifest = json.loads((root / f"{split}.json").read_bytes())
        for name, checksum in manifest["sha256"].items():
            if _sha256(root / name) != checksum:
                raise DataError(f"{root / name} is damaged: its SHA-256 is not that of {split}.json")
        # Copy on write: torch wants writable memory, and the file stays as it is.
        images = np.load(path, mmap_mode="c", allow_pickle=False)
        labels = np.load(root / f"{split}.labels.npy", allow_pickle=False)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{root}: split {split!r} is damaged ({error})") from None
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[1] == 3
    if not fits or labels.dtype != np.int64 or labels.shape != images.shape[:1]:
        raise DataError(f"{path}: expected (N, 3, H, W) uint8 images and (N,) int64 labels")
    if manifest["classes"] != list(classes) or not 0 <= labels.min() <= labels.max() < len(classes):
        raise DataError(f"{root / 'classes.txt'} does not fit the labels of split {split!r}")
    return images, labels, classes


def _sha256(path: Path) -> str:
    return hashlib.sha256(np.memmap(path, np.uint8, "r").data).hexdigest()
