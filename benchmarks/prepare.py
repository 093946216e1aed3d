"""What preparing data costs over copying it: `python benchmarks/prepare.py`.

The same files are copied plainly, read one after the other and appended to one file that is synced at the end, and
written in each form by one process with their bytes kept and all checksums computed. Class folders are compared with a
copy of the tree. The runs alternate; a share is the median over rounds. Before each run the source is put out of the
page cache, as with data larger than memory; "cached" is the same with the source in memory, where no disk is read.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.data.prepare.convert import convert, find_splits
from common.data.prepare.settings import Settings
from common.environment import environment
from common.files import sync_all

CLASSES = 20


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--kilobytes", type=int, default=110, help="of an image; ImageNet's mean is 110")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prepare.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        root = Path(name)
        total = make_images(root / "source", arguments.images, arguments.kilobytes << 10)
        result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()}
        for name, cold in (("disk", True), ("cached", False)):
            result[name] = measure(root / "source", root / "out", total, arguments.rounds, cold)
    print(result)
    settings = {"images": arguments.images, "kilobytes": arguments.kilobytes, "rounds": arguments.rounds}
    arguments.out.write_text(json.dumps(result | settings | {"workers": 1} | environment(), indent=1) + "\n")


def measure(source: Path, out: Path, total: int, rounds: int, cold: bool) -> dict[str, dict[str, float]]:
    """Median rates in MB/s, and the shares of the copies' rates."""
    runs: dict[str, Callable[[], object]] = {
        "copy": partial(copy, source, out),
        "recordio": partial(prepare, source, out, "recordio"),
        "webdataset": partial(prepare, source, out, "webdataset"),
        "copy of the tree": partial(copy_files, source, out),
        "folder": partial(prepare, source, out, "folder"),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        # Every run follows every other one: what a run leaves the disk to do costs the next one time.
        names = list(runs)[number % len(runs) :] + list(runs)[: number % len(runs)]
        for name in names:
            os.sync()
            if cold:
                forget(source)
            begun = time.perf_counter()
            runs[name]()
            rates[name].append(total / (time.perf_counter() - begun) / 1e6)
            shutil.rmtree(out)
    baseline = {"recordio": "copy", "webdataset": "copy", "folder": "copy of the tree"}
    shares = {form: [a / b for a, b in zip(rates[form], rates[plain])] for form, plain in baseline.items()}
    return {
        "MB_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "share_of_copy": {name: round(statistics.median(values), 3) for name, values in shares.items()},
    }


def forget(source: Path) -> None:
    """Put files out of the page cache."""
    for path in source.glob("*/*/*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def make_images(root: Path, number: int, size: int) -> int:
    """Class folders of files that look like JPEGs, of half to one and a half times ``size``; returns their bytes."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(size // 2, size * 3 // 2, number)
    for index, length in enumerate(sizes.tolist()):
        folder = root / "train" / f"n{index % CLASSES:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:06d}.jpg").write_bytes(b"\xff\xd8\xff" + rng.bytes(length - 3))
    return int(sizes.sum())


def copy(source: Path, out: Path) -> None:
    """All files, in order, into one."""
    out.mkdir()
    with open(out / "all", "wb") as file:
        for path in sorted(source.glob("*/*/*")):
            file.write(path.read_bytes())
        file.flush()
        os.fsync(file.fileno())


def copy_files(source: Path, out: Path) -> None:
    """All files, each into its own."""
    shutil.copytree(source, out)
    sync_all(path for path in out.rglob("*"))


def prepare(source: Path, out: Path, form: str) -> None:
    """The form, in one process."""
    convert(find_splits(source), out, Settings(form))


if __name__ == "__main__":
    main()
