"""How many images a second come out of every form and backend: `python -m common.data.bench`.

Against torchvision's ImageFolder, torch's DataLoader and the same transforms, in one run. The runs alternate, and each
starts its own worker processes; a number is the median over rounds, a share the median of the rounds' shares, with
their quartiles.

images/s    by the clock, with worker processes and main process bound to as many cores as there are workers
images/cpu  a second of processor time, of all processes together: other programs on the machine disturb it less

decode      the image is decoded at its full size, and its centre kept
train       a random crop, resized, mirrored and normalised: what a network is trained with

torchvision  the baseline
torch, dali  the training's own loader, by its backends
readers      a pipeline of DALI's own: its reader of the form, its shuffling in a buffer, its random crop, its resizing;
             nothing to resume it by. With as many threads as there are workers, and no processes

Images are synthetic JPEGs of 500×375 pixels and about 60 kB, read from memory (the page cache).
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import MaybePILToTensor
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from common.data.augment import AugmentConfig, Normalize
from common.data.dali import DaliSet, Encoded, open_dali
from common.data.forms import FORMS, open_source
from common.data.images import DataConfig, ImageSet, open_images
from common.data.loader import LoaderConfig, train_batches
from common.data.order import Division, Draw, Order
from common.data.prepare.convert import convert, find_splits
from common.data.prepare.settings import Settings
from common.data.views import View
from common.data.workers import start_server
from common.environment import environment, processor
from common.errors import run_main
from common.files import atomic_write

BASELINE, READERS = "torchvision", "readers"
CLASSES, WIDTH, HEIGHT, SIDE = 4, 500, 375, 224
WHOLE_IMAGE = transforms.Compose([transforms.CenterCrop(SIDE), MaybePILToTensor()])
WHOLE_TENSOR = transforms.Compose([transforms.CenterCrop(SIDE), torch.clone])  # lest it keep all of the image
_CPU = torch.device("cpu")


@dataclass
class Case:
    """A way to read the images."""

    name: str
    form: str
    backend: str
    """``torch``, ``dali``, ``readers``, or ``torchvision`` for the baseline."""


@dataclass
class Run:
    """What is read in which way."""

    root: Path
    mode: str
    workers: int
    batch: int


class WholeImages(DaliSet):
    """Images decoded by DALI at their full size, of which the centre is kept."""

    def inputs(self, data: bytes, where: str, draw: Draw) -> Encoded:
        """The encoded image and its centre."""
        top, left = round((HEIGHT - SIDE) / 2), round((WIDTH - SIDE) / 2)
        return Encoded(data, View((0, 0, HEIGHT, WIDTH), (HEIGHT, WIDTH), (top, left)))


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    args = _parser().parse_args(argv)
    cases = [Case(BASELINE, "folder", BASELINE)]
    cases += [
        Case(f"{form} {backend}", form, backend)
        for backend in args.backends
        if _is_there(backend)
        for form in FORMS
    ]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        size = make_data(root, args.images)
        result = {
            "images": args.images,
            "kilobytes": round(size / args.images / 1e3, 1),
            "batch": args.batch,
            "rates": measure(cases, root, args),
            "memory": {
                case.name: memory(case, root, args.batch, args.epochs)
                for case in cases
                if case.backend != READERS  # which have no worker processes
            },
        }
    print(table(result))
    if args.out:
        about = {"processor": processor(), "load": os.getloadavg()} | environment("nvidia-dali-cuda130")
        with atomic_write(args.out) as file:
            file.write(json.dumps(result | about, indent=1).encode() + b"\n")
    return 0


def measure(cases: list[Case], root: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rates of every case, mode and number of workers."""
    found: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
    for turn in range(args.rounds):
        for mode in args.modes:
            for workers in args.workers:
                run = Run(root, mode, workers, args.batch)
                first = turn % len(cases)  # every case follows every other one
                for case in cases[first:] + cases[:first]:
                    print(
                        f"round {turn + 1}: {mode}, {workers} workers, {case.name}",
                        end="\x1b[K\r",
                        file=sys.stderr,
                    )
                    found.setdefault((mode, workers, case.name), []).append(rates(case, run, args.batches))
    print(end="\x1b[K", file=sys.stderr)
    return [
        {"mode": mode, "workers": workers, "case": name}
        | summary(np.array(pairs), np.array(found[mode, workers, BASELINE]))
        for (mode, workers, name), pairs in found.items()
    ]


def summary(pairs: np.ndarray, baseline: np.ndarray) -> dict[str, Any]:
    """Medians of (rounds, 2) rates and of their shares of the baseline's, and the shares' quartiles."""
    rates, shares = np.median(pairs, 0), pairs / baseline
    low, middle, high = np.quantile(shares, (0.25, 0.5, 0.75), 0).round(3).tolist()
    return {
        "images_per_s": round(float(rates[0]), 1),
        "images_per_cpu_s": round(float(rates[1]), 1),
        "share": middle[0],
        "share_quartiles": [low[0], high[0]],
        "share_cpu": middle[1],
        "share_cpu_quartiles": [low[1], high[1]],
    }


def rates(case: Case, run: Run, batches: int) -> tuple[float, float]:
    """Images a second by the clock and of processor time, once all is running."""
    with bound_to(run.workers), running(case, run) as stream:
        list(islice(stream, 2 + 2 * run.workers))
        begun, used = time.perf_counter(), processor_time()
        count = sum(len(batch) for batch in islice(stream, batches))
        seconds, processor_seconds = time.perf_counter() - begun, processor_time() - used
    return count / seconds, count / processor_seconds


def memory(case: Case, root: Path, batch: int, epochs: int) -> list[float]:
    """Megabytes that one worker process has for itself, at the end of each epoch."""
    found = []
    with bound_to(2), running(case, Run(root, "train", 1, batch)) as stream:
        steps = len(open_source(root / case.form, "train")) // batch
        for _ in range(epochs):
            list(islice(stream, steps))
            (worker,) = multiprocessing.active_children()
            found.append(round(private_memory(worker.pid or 0) / 1e6, 1))
    return found


@contextmanager
def running(case: Case, run: Run) -> Iterator[Iterator[Tensor]]:
    """The case's endless batches; its worker processes have the cores of this one, and end with the block."""
    stream = {BASELINE: baseline, READERS: readers}.get(case.backend, ours)(case, run)
    next(stream)
    for child in multiprocessing.active_children():
        os.sched_setaffinity(child.pid or 0, os.sched_getaffinity(0))
    try:
        yield stream
    finally:
        stream.close()  # type: ignore[attr-defined]
        gc.collect()
        for child in multiprocessing.active_children():
            child.join(10)


def baseline(case: Case, run: Run) -> Iterator[Tensor]:
    """What one would write with torchvision."""
    augment = AugmentConfig(size=SIDE)
    training = [
        transforms.RandomResizedCrop(SIDE, augment.scale, augment.ratio),
        transforms.RandomHorizontalFlip(augment.hflip),
        transforms.ToTensor(),
        transforms.Normalize(augment.mean, augment.std),
    ]
    transform = transforms.Compose(training) if run.mode == "train" else WHOLE_IMAGE
    loader = DataLoader(
        ImageFolder(run.root / case.form / "train", transform),
        run.batch,
        shuffle=True,
        drop_last=True,
        num_workers=run.workers,
        persistent_workers=True,
        multiprocessing_context=start_server(),
    )
    while True:
        for images, _ in loader:
            yield images


def ours(case: Case, run: Run) -> Iterator[Tensor]:
    """The training's own loader."""
    data = DataConfig(path=str(run.root / case.form), format=case.form, backend=case.backend)  # type: ignore[arg-type]
    augment = AugmentConfig(size=SIDE)
    images = open_images(data, augment, "train", seed=0) if run.mode == "train" else whole_images(case, run)
    finish: Callable[[Tensor], Tensor] = (
        Normalize(augment, _CPU) if run.mode == "train" else lambda batch: batch
    )
    order, division = Order(len(images.source), seed=0), Division(run.batch)
    start = train_batches(images, order, division, 10**9, LoaderConfig(run.workers), _CPU, finish)
    for batch in start(0):
        yield batch.inputs


def readers(case: Case, run: Run) -> Iterator[Tensor]:
    """What one would write with DALI alone."""
    from nvidia.dali import Pipeline, fn

    augment = AugmentConfig(size=SIDE)
    name, options = reader(run.root / case.form, case.form)
    pipe = Pipeline(run.batch, run.workers, None, seed=0, exec_dynamic=True)
    with pipe:
        data, labels = getattr(fn.readers, name)(**options, random_shuffle=True)
        if run.mode == "train":
            images = fn.decoders.image_random_crop(
                data, random_area=augment.scale, random_aspect_ratio=augment.ratio
            )
            images = fn.crop_mirror_normalize(
                fn.resize(images, size=(SIDE, SIDE)),
                mean=[255 * mean for mean in augment.mean],
                std=[255 * std for std in augment.std],
                mirror=fn.random.coin_flip(probability=augment.hflip),
                output_layout="CHW",
            )
        else:
            images = fn.transpose(fn.crop(fn.decoders.image(data), crop=(SIDE, SIDE)), perm=[2, 0, 1])
        pipe.set_outputs(images, labels)
    pipe.build()
    while True:
        images, _ = pipe.run()
        yield torch.from_dlpack(images.as_tensor())


def reader(root: Path, form: str) -> tuple[str, dict[str, Any]]:
    """DALI's reader of a form, and where it finds the training split."""
    if form == "folder":
        return "file", {"file_root": str(root / "train")}
    if form == "recordio":
        return "mxnet", {"path": [str(root / "train.rec")], "index_path": [str(root / "train.idx")]}
    shards = sorted(root.glob("train-*.tar"))
    indexes = [str(shard.with_suffix(".idx")) for shard in shards]
    return "webdataset", {"paths": [*map(str, shards)], "index_paths": indexes, "ext": ["jpg", "cls"]}


def whole_images(case: Case, run: Run) -> ImageSet:
    """Images of which the centre is kept."""
    source = open_source(run.root / case.form, "train", case.form)
    if case.backend == "torch":
        return ImageSet(source, WHOLE_TENSOR, 0, SIDE, training=True, tensors=True)
    made = open_dali(source, "cpu", AugmentConfig(size=SIDE), True, 0)
    return WholeImages(**{name: getattr(made, name) for name in made.__dataclass_fields__})


def make_data(root: Path, count: int) -> int:
    """The images in every form, in folders of its name; returns the bytes of all."""
    total = 0
    for number in range(count):
        folder = root / "folder" / "train" / f"class{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        total += (folder / f"{number:05d}.jpg").write_bytes(photo(number))
    for form in FORMS:
        if form != "folder":
            convert(find_splits(root / "folder"), root / form, Settings(form))
    return total


def photo(seed: int) -> bytes:
    """A JPEG with the spectrum of a photograph: noise that falls with the frequency."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = np.inf
    waves = draw.normal(size=(3, *frequency.shape, 2)) @ [1, 1j] / frequency**1.4
    planes = np.fft.irfft2(waves, (HEIGHT, WIDTH))
    light, *colour = planes / planes.std((1, 2), keepdims=True)
    pixels = np.stack([50 * light + 15 * colour[0], 50 * light, 50 * light + 15 * colour[1]], axis=-1) + 128
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


@contextmanager
def bound_to(cores: int) -> Iterator[None]:
    """Within it, this process runs on the first so many of its cores."""
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    _bind(set(sorted(before)[:cores]))
    torch.set_num_threads(1)  # several would wait for each other busily, where workers want the cores
    try:
        yield
    finally:
        _bind(before)
        torch.set_num_threads(threads)


def _bind(cores: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), cores)


def processor_time() -> float:
    """Seconds of processor time that this process and its workers have used, in all threads that are there."""
    nanoseconds = 0
    for process in ("self", *(child.pid for child in multiprocessing.active_children())):
        for thread in Path(f"/proc/{process}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                nanoseconds += int((thread / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9


def private_memory(process: int) -> int:
    """Bytes that only this process has, without the batches it is passing on, which lie in shared memory."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {words[0]: int(words[1]) for words in map(str.split, lines)}
    own = kilobytes["Private_Clean:"] + kilobytes["Private_Dirty:"] - kilobytes["Pss_Shmem:"]
    return own << 10


def table(result: dict[str, Any]) -> str:
    """The numbers for the terminal."""
    lines = [
        f"{'':25} {'workers':>7} {'images/s':>9} {'share':>6} {'images/cpu s':>13} {'share':>6} quartiles"
    ]
    line = (
        "{mode:6} {case:18} {workers:7} {images_per_s:9} {share:6.2f} {images_per_cpu_s:13} {share_cpu:6.2f} "
    )
    lines += [
        line.format(**entry) + " to ".join(f"{share:.2f}" for share in entry["share_cpu_quartiles"])
        for entry in result["rates"]
    ]
    lines.append("memory of a worker after each epoch, MB")
    lines += [f"       {name:18} {' '.join(map(str, values))}" for name, values in result["memory"].items()]
    return "\n".join(lines)


def _is_there(backend: str) -> bool:
    if backend in ("dali", READERS):
        try:
            import nvidia.dali  # noqa: F401
        except ImportError:
            print(f"DALI is not installed: {backend} left out", file=sys.stderr)
            return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m common.data.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=256, help="how many are made")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=24, help="that are timed in a run")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each case")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="worker processes, and cores")
    parser.add_argument("--modes", nargs="+", default=["decode", "train"], choices=["decode", "train"])
    backends = ["torch", "dali", READERS]
    parser.add_argument("--backends", nargs="+", default=backends, choices=backends)
    parser.add_argument("--epochs", type=int, default=40, help="over which a worker's memory is watched")
    parser.add_argument(
        "--folder", type=Path, help="where the images are made; the system's temporary folder"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


if __name__ == "__main__":
    run_main(main)
