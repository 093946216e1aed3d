"""Make data sets of small images: ``python cifar/prepare.py cifar10 cifar-10-python.tar.gz data/cifar10``."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from cifar.archives import OFFICIAL, Images, read_official
from common.config import Commands
from common.data.arrays import write_arrays
from common.data.digits import CLASSES, SPLITS, digits_images
from common.data.memory import MemoryConfig, load_memory
from common.data.recordio import write_recordio
from common.data.shard_writer import write_shards
from common.data.source import DataError, Sample, local_path
from common.errors import UserError, run_main
from common.files import atomic_folder, atomic_write

FORMATS = ("memory", "recordio", "webdataset")
Splits = dict[str, Images]


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv`` by default) and return the exit code."""
    args = _parser().parse_args(argv)
    out = local_path(args.out)
    try:
        _check_free(out)
        splits, classes = args.read(args)
        write(out, args.format, splits, classes)
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from None
    counts = " and ".join(f"{len(split.labels):,} {name}" for name, split in splits.items())
    print(f"{out}: {counts} images of {len(classes)} classes as {args.format}, written")
    return 0


def write(out: Path, format: str, splits: Splits, classes: tuple[str, ...]) -> None:
    """Write a data set into the folder ``out``, which appears when all of it is written.

    Inside RecordIO files and shards the images are PNGs: no pixel changes.

    Raises:
        FileExistsError: ``out`` is there, and not empty.
    """
    with atomic_folder(out) as folder:
        for name, split in splits.items():
            if format == "memory":
                write_arrays(folder, name, *split, classes)
            else:
                writer = {"recordio": write_recordio, "webdataset": write_shards}[format]
                writer(folder, name, _encoded(split), classes)
        with atomic_write(folder / "classes.txt") as file:
            file.write("".join(f"{name}\n" for name in classes).encode())


def digits(size: int) -> tuple[Splits, tuple[str, ...]]:
    """scikit-learn's handwritten digits, ``size`` × ``size`` pixels."""
    splits = {}
    for split in SPLITS:
        rows = [
            (np.asarray(image).transpose(2, 0, 1), label) for _, image, label in digits_images(split, size)
        ]
        splits[split] = Images(*map(np.stack, zip(*rows)))
    return splits, CLASSES


def _encoded(split: Images) -> Iterator[Sample]:
    for number, (image, label) in enumerate(zip(split.images, split.labels.tolist())):
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(file, "PNG")
        yield f"{number:06d}", file.getvalue(), label


def _class_folders(args: argparse.Namespace) -> tuple[Splits, tuple[str, ...]]:
    splits = {}
    for split, name in (("train", "train"), ("val", args.val)):
        data = load_memory(MemoryConfig(path=args.source, format="folder"), name, args.size, training=False)
        if data.unreadable:
            bad = data.unreadable[0]
            raise DataError(
                f"{args.source}: {len(data.unreadable)} images of {name} cannot be read, the first: "
                f"{bad.where} ({bad.reason}: {bad.detail}); mend or remove them"
            )
        splits[split] = Images(data.images.numpy(), data.targets.numpy())
    return splits, data.classes


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is there already; remove it or name another folder")


def _size(word: str) -> int:
    size = int(word)
    if not 8 <= size <= 256:
        raise argparse.ArgumentTypeError(f"size {size}: expected 8 to 256 pixels")
    return size


def _parser() -> argparse.ArgumentParser:
    parser = Commands(prog="cifar/prepare.py", description="Make data sets of small images.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in OFFICIAL:
        about = (
            f"{name} from the official archive, python or binary version, or the folder it was extracted to"
        )
        command = commands.add_parser(name, help=about, description=f"Write {about}.")
        command.add_argument("source", metavar="SOURCE", type=Path, help="archive or folder")
        command.set_defaults(read=lambda args, name=name: read_official(name, args.source))
    about = "class folders: SOURCE/train/CLASS/*.png and SOURCE/val/CLASS/*.png"
    command = commands.add_parser("folder", help=about, description=f"Write {about}.")
    command.add_argument("source", metavar="SOURCE", help="folder with the splits")
    command.add_argument("--val", default="val", help="folder of the validation split; default: %(default)s")
    command.set_defaults(read=_class_folders)
    about = "1,797 real handwritten digits, embedded in scikit-learn: no download"
    command = commands.add_parser("digits", help=about, description=f"Write {about}.")
    command.set_defaults(read=lambda args: digits(args.size))
    for name, command in commands.choices.items():
        command.add_argument(
            "out", metavar="OUT", help="folder to make; it appears when everything is written"
        )
        if name not in OFFICIAL:
            about = "side of the images, pixels: larger ones are resized and cropped; default: %(default)s"
            command.add_argument("--size", type=_size, default=32, help=about)
        command.add_argument(
            "--format",
            choices=FORMATS,
            default="memory",
            help="arrays that are mapped into memory, or PNGs in RecordIO files or WebDataset shards; "
            "default: %(default)s",
        )
    return parser


if __name__ == "__main__":
    run_main(main)
