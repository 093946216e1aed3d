"""Small data sets in every form, and the ways to damage them."""

from __future__ import annotations

import contextlib
import random
from itertools import islice
from pathlib import Path

from common.data.digits import CLASSES, digits_samples
from common.data.folder import write_folder
from common.data.forms import FORMS, open_source
from common.data.recordio import write_recordio
from common.data.shard_writer import write_shards
from common.data.source import BadSample, DataError, Sample, Source

FORM_NAMES = tuple(FORMS)
WRITERS = {"folder": write_folder, "recordio": write_recordio, "webdataset": write_shards}


def few_digits(count: int = 12) -> list[Sample]:
    """The first digits: real JPEG files of about 1.3 kB."""
    return list(islice(digits_samples("train"), count))


def write_split(root: Path, form: str, samples: list[Sample], split: str = "train", **options: int) -> None:
    """One split and ``classes.txt``, as the writers make them."""
    root.mkdir(parents=True, exist_ok=True)
    WRITERS[form](root, split, samples, CLASSES, **options)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))


def pairs(samples: list[Sample]) -> list[tuple[bytes, int]]:
    return [(data, label) for _, data, label in samples]


def read_all(source: Source) -> list[tuple[bytes, int]]:
    return [source.read(index) for index in range(len(source))]


def readable(root: Path) -> list[tuple[bytes, int]]:
    """What of a damaged data set is still handed out; anything but the typed errors gets through to the test."""
    try:
        source = open_source(root, "train")
        source.fingerprint()
    except DataError:
        return []
    found = []
    for index in range(len(source)):
        with contextlib.suppress(BadSample):
            found.append(source.read(index))
    return found


def damage(data: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut off, cut out, put in or doubled."""
    place, other = sorted((draw.randrange(len(data)), draw.randrange(len(data))))
    return draw.choice(
        [
            data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :],
            data[:place] + draw.randbytes(1) + data[place + 1 :],
            data[:place] + draw.randbytes(8) + data[place + 8 :],
            data[:place],
            data[:place] + data[other:],
            data[:place] + draw.randbytes(draw.randrange(1, 600)) + data[place:],
            data[:other] + data[place:],
            data[:place] + bytes(other - place) + data[other:],
        ]
    )
