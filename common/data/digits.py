"""Real data without a download: the 1,797 handwritten digits that come with scikit-learn, as JPEG files."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from common.data.folder import write_folder
from common.data.forms import FORMS, open_source
from common.data.recordio import write_recordio
from common.data.shard_writer import write_shards
from common.data.source import DataError, Sample, local_path
from common.files import atomic_folder, atomic_write

CLASSES = tuple("0123456789")
SPLITS = {"train": 1442, "val": 355}
"""Number of samples in each."""
SHARD_SAMPLES = 256
"""Small shards, so that several processes and workers have one each."""

_OURS = r"classes\.txt|(train|val)(|\.rec|\.lst|\.idx|\.json|-\d{6}\.tar|-\d{6}\.idx)"

Track = Callable[[Iterable[Sample], str], Iterable[Sample]]


def digits_samples(split: str) -> Iterator[Sample]:
    """The digits of a split as (key, JPEG, label), 64×64 RGB, saved at quality 90; see :func:`digits_images`."""
    for key, image, label in digits_images(split, 64):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        yield key, file.getvalue(), label


def digits_images(split: str, size: int) -> Iterator[tuple[str, Image.Image, int]]:
    """The digits of a split as (key, RGB image, label); every fifth of each class is in ``val``.

    The 8×8 images with values 0–16 are scaled to 0–255 and enlarged to ``size`` × ``size`` (bicubic). A key is the
    image's number in scikit-learn's order, in which classes alternate.
    """
    from sklearn.datasets import load_digits  # half a second, only here

    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    digits = load_digits()
    seen = [0] * len(CLASSES)
    for number, (image, label) in enumerate(zip(digits.images, digits.target.tolist())):
        seen[label] += 1
        if (seen[label] % 5 == 0) == (split == "val"):
            grey = Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8))
            large = grey.resize((size, size), Image.Resampling.BICUBIC)
            yield f"{number:04d}", large.convert("RGB"), label


def prepare_digits(out: str | Path, form: str, force: bool = False, track: Track | None = None) -> bool:
    """Write both splits of the digits into the folder ``out``, which appears when all of it is written.

    Args:
        out: a folder that is missing or empty, or holds the digits already.
        form: ``folder``, ``recordio`` or ``webdataset``.
        force: write them again in the place of digits that are there, in whatever form; never of other files.
        track: wraps the samples of a split, to show progress.

    Returns:
        False if the digits were there in this form, and nothing was done.

    Raises:
        DataError: ``form`` is unknown, or ``out`` holds something else.
    """
    out = local_path(out).resolve()
    if form not in FORMS:
        raise DataError(f"format: {form!r} is not one of {', '.join(FORMS)}")
    there = _form_there(out)
    if there == form and not force:
        return False
    _check_free(out, there, force)
    write = {"folder": write_folder, "recordio": write_recordio, "webdataset": _write_small_shards}[form]
    try:
        with atomic_folder(out, replace=force) as folder:
            for split in SPLITS:
                samples = digits_samples(split)
                write(folder, split, track(samples, split) if track else samples, CLASSES)
            with atomic_write(folder / "classes.txt") as file:
                file.write("".join(f"{name}\n" for name in CLASSES).encode())
    except FileExistsError as error:
        if _form_there(out) == form:  # another process was faster
            return False
        raise DataError(f"{error.filename} is in the way of {out}") from None
    return True


def _write_small_shards(root: Path, split: str, samples: Iterable[Sample], classes: tuple[str, ...]) -> None:
    write_shards(root, split, samples, classes, max_samples=SHARD_SAMPLES)


def _form_there(out: Path) -> str | None:
    """The form in which ``out`` holds the digits and nothing else, or None."""
    if not out.is_dir() or not all(re.fullmatch(_OURS, name) for name in os.listdir(out)):
        return None
    for form in FORMS:
        with contextlib.suppress(DataError):
            sources = {split: open_source(out, split, form) for split in SPLITS}
            if all(
                source.classes == CLASSES and len(source) == SPLITS[split]
                for split, source in sources.items()
            ):
                return form
    return None


def _check_free(out: Path, there: str | None, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; expected a folder to write to")
    if out == Path.cwd() or out.is_mount():
        raise DataError(f"{out} is the current folder or a mount point; name a folder to make inside it")
    if there and not force:
        raise DataError(f"{out} holds the digits as {there}; name another folder, or replace them by --force")
    if not there and out.exists() and any(out.iterdir()):
        raise DataError(
            f"{out} is not empty and does not hold the whole digits; remove it or name another folder"
        )
