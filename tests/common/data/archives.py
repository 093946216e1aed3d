"""ImageNet's archives as they are handed out, with a few tiny images."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

WNIDS = ("n01440764", "n02105855", "n03000134")
IDS = {"n03000134": 1, "n01440764": 2, "n02105855": 3}
"""ILSVRC's own numbers are not in the order of the WordNet ids."""
TRUTH = [2, 1, 3, 3, 2]


def jpeg(seed: int, size: tuple[int, int] = (30, 20)) -> bytes:
    small = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def tar_of(files: Mapping[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def train_images(per_class: int = 4) -> dict[str, dict[str, bytes]]:
    """WordNet id → name → JPEG. One class folder is in no order, as in the official archive."""
    return {
        wnid: {f"{wnid}_{9 - n}.JPEG": jpeg(100 * label + n) for n in range(per_class)}
        for label, wnid in enumerate(WNIDS)
    }


def val_images() -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{n + 1:08d}.JPEG": jpeg(1000 + n) for n in range(len(TRUTH))}


def devkit(truth: list[int] = TRUTH) -> bytes:
    rows = [(number, wnid, "words", "gloss", 0) for wnid, number in IDS.items()]
    rows.append((4, "n00001740", "entity", "all of it", 3))  # no leaf, so no class
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")
    table = np.array(rows, dtype=[(name, object) for name in names])
    meta = io.BytesIO()
    savemat(meta, {"synsets": table.reshape(-1, 1)})
    folder = "ILSVRC2012_devkit_t12"
    text = "".join(f"{number}\n" for number in truth).encode()
    files = {
        f"{folder}/readme.txt": b"hello",
        f"{folder}/data/meta.mat": meta.getvalue(),
        f"{folder}/data/ILSVRC2012_validation_ground_truth.txt": text,
    }
    return tar_of(files, "w:gz")


def write_archives(root: Path) -> Path:
    root.mkdir(parents=True)
    inner = {f"{wnid}.tar": tar_of(files) for wnid, files in reversed(train_images().items())}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of(dict(reversed(val_images().items()))))
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit())
    return root
