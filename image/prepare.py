"""Make image data sets: ``python image/prepare.py COMMAND --help``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.progress import track

from common.config import Commands
from common.data.digits import SPLITS, prepare_digits
from common.data.forms import FORMS, open_source
from common.data.prepare import convert, imagenet, verify
from common.data.prepare.progress import progress_bar
from common.data.prepare.settings import DEFAULT_QUALITY, Settings
from common.data.quarantine import describe, in_files
from common.data.source import DataError, Sample, Source, local_path
from common.errors import ConfigError, RunError, UserError, run_main

_FORMS_HELP = {
    "folder": "class folders (OUT/train/CLASS/NAME.jpg)",
    "recordio": "MXNet's RecordIO files (OUT/train.rec), as its im2rec writes them",
    "webdataset": "WebDataset shards (OUT/train-000000.tar)",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv`` by default) and return the exit code."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        raise RunError(f"{args.out}: stopped; the same command goes on where it was") from None
    except OSError as error:
        raise UserError(f"{args.out}: {error.strerror or error}") from None


def digits(args: argparse.Namespace) -> int:
    """Write the digits, or say that they are there."""
    written = prepare_digits(args.out, args.format, args.force, track=_track)
    train, val = (len(open_source(args.out, split, args.format)) for split in SPLITS)
    done = "written" if written else "there already, nothing to do"
    print(f"{args.out}: {train:,} training and {val:,} validation images as {args.format}, {done}")
    return 0


def from_any_form(args: argparse.Namespace) -> int:
    """Write a data set of any form in the form of the command's name."""
    sources = convert.find_splits(args.source, args.split, args.source_format)
    source, out = local_path(args.source).resolve(), local_path(args.out).resolve()
    if any(source / split in (out, *out.parents) for split in sources):
        raise DataError(f"{args.out} is inside a split of {args.source}; name a folder outside")
    return _convert(sources, args)


def from_imagenet(args: argparse.Namespace) -> int:
    """Write ImageNet from its archives or class folders."""
    sources = imagenet.open_imagenet(args.source)
    unknown = sorted(set(args.split) - set(sources))
    if unknown:
        raise DataError(f"split: {unknown[0]!r} is not in {args.source}; there is {', '.join(sources)}")
    return _convert({split: sources[split] for split in args.split or sources}, args)


def check(args: argparse.Namespace) -> int:
    """Verify a data set, write the report, and say in a line a split what was found."""
    with progress_bar() as progress:
        reports = verify.verify(args.path, args.split, args.source_format, _workers(args, True), progress)
    verify.write_report(reports, Path(args.out or args.path))
    problems = [problem for report in reports.values() for problem in report.problems]
    for split, report in reports.items():
        print(
            f"{split}: {report.decoded:,} of {report.samples:,} images of {report.classes:,} classes decoded "
            f"({report.smallest_class:,} to {report.largest_class:,} a class, {report.bytes / 2**20:,.0f} MiB); "
            f"checksums {report.checksums}; problems: {len(report.problems):,}"
            + (f" ({in_files(report.problems_per_shard)})" if report.problems else "")
        )
    if problems:
        first = "{where}: {reason}: {detail}".format(**problems[0])
        where = Path(args.out or args.path) / "verify.json"
        raise RunError(f"{args.path}: problems: {len(problems):,}, all in {where}; the first: {first}")
    return 0


def _convert(sources: Mapping[str, Source], args: argparse.Namespace) -> int:
    given = {field.name: getattr(args, field.name) for field in fields(Settings) if hasattr(args, field.name)}
    settings = Settings(**given)
    if not 0 <= args.max_unreadable <= 1:
        raise ConfigError(f"max-unreadable: {args.max_unreadable} is not a share, 0 to 1")
    workers = _workers(args, settings.reencodes or settings.check)
    with progress_bar() as progress:
        written = convert.convert(sources, args.out, settings, args.max_unreadable, workers, progress)
    done = "written" if written else "there already, nothing to do"
    counts = " and ".join(
        f"{len(open_source(args.out, split, settings.format)):,} {split}" for split in sources
    )
    print(f"{args.out}: {counts} images as {settings.format}, {done}")
    quarantine = Path(args.out, "quarantine.jsonl")
    if quarantine.exists():
        print(f"left out: {describe(quarantine)}")
    return 0


def _workers(args: argparse.Namespace, computes: bool) -> int:
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"workers: {args.workers} is not a number of processes")
    return args.workers or (len(os.sched_getaffinity(0)) if computes else 1)


def _parser() -> argparse.ArgumentParser:
    parser = Commands(
        prog="image/prepare.py", description="Make image data sets for training and evaluation."
    )
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=Commands
    )
    _add_digits(commands)
    for form, about in _FORMS_HELP.items():
        about = f"{about}, from a data set in any form"
        command = commands.add_parser(form, help=about, description=f"Write {about}.")
        command.add_argument("source", metavar="SRC", help="folder of a data set, which is left as it is")
        _add_source_format(command)
        _add_conversion(command, form)
        command.set_defaults(run=from_any_form, format=form)
    _add_imagenet(commands)
    _add_verify(commands)
    return parser


def _add_digits(commands: argparse._SubParsersAction) -> None:
    about = "1,797 real handwritten digits (64×64, RGB), embedded in scikit-learn: no download"
    command = commands.add_parser("digits", help=about, description=f"Write {about}.")
    command.add_argument("out", metavar="OUT", help="folder to make; it appears when everything is written")
    command.add_argument(
        "--format",
        choices=tuple(FORMS),
        default="folder",
        help="class folders (OUT/train/3/0003.jpg), RecordIO files (OUT/train.rec) or WebDataset shards "
        "(OUT/train-000000.tar); default: %(default)s",
    )
    command.add_argument("--force", action="store_true", help="write the digits again over digits in OUT")
    command.set_defaults(run=digits)


def _add_imagenet(commands: argparse._SubParsersAction) -> None:
    about = "ImageNet (ILSVRC 2012) in any form, from the official archives or class folders"
    command = commands.add_parser("imagenet", help=about, description=f"Write {about}.")
    archives = f"{imagenet.TRAIN}, {imagenet.VAL} and {imagenet.DEVKIT}"
    command.add_argument(
        "source", metavar="SRC", help=f"folder with {archives}, or with class folders in train and val"
    )
    command.add_argument("--format", choices=tuple(FORMS), default="recordio", help="default: %(default)s")
    _add_conversion(command)
    command.set_defaults(run=from_imagenet)


def _add_verify(commands: argparse._SubParsersAction) -> None:
    about = "every checksum, decode every image, count every class"
    command = commands.add_parser("verify", help=f"compare {about}", description=f"Compare {about}.")
    command.add_argument("path", metavar="PATH", help="folder of a data set in any form")
    command.add_argument("--out", metavar="FOLDER", help="where verify.json and verify.png go; default: PATH")
    _add_source_format(command)
    _add_splits_and_workers(command, "the machine's cores")
    command.set_defaults(run=check)


def _add_source_format(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--source-format",
        choices=("auto", *FORMS),
        default="auto",
        help="the form that is read, where there are several",
    )


def _add_splits_and_workers(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME",
        help="may be given several times; default: train and val, those that are there",
    )
    command.add_argument("--workers", type=int, metavar="N", help=f"processes; default: {default}")


def _add_conversion(command: argparse.ArgumentParser, form: str | None = None) -> None:
    add = command.add_argument
    add("out", metavar="OUT", help="folder to make; it appears when everything is written")
    _add_splits_and_workers(command, "1 where bytes are kept, else the machine's cores")
    add(
        "--resize",
        type=int,
        metavar="SIDE",
        help="make the shorter side so long, enlarging too, as im2rec does",
    )
    add(
        "--quality",
        type=int,
        metavar="Q",
        help=f"compress as JPEG of this quality, 1 to 100; with --resize alone {DEFAULT_QUALITY}; "
        "with neither the bytes are kept as they are",
    )
    add(
        "--check",
        action="store_true",
        help="decode also images whose bytes are kept, and leave out broken ones",
    )
    add("--shuffle", type=int, metavar="SEED", help="write in a random order; default: the order of SRC")
    add(
        "--max-unreadable",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="stop above it; default: %(default)s",
    )
    if form in (None, "recordio"):
        add(
            "--parts",
            type=int,
            default=1,
            metavar="N",
            help="files a split, RecordIO only; default: %(default)s",
        )
    if form in (None, "webdataset"):
        add("--shard-size", type=int, default=256, metavar="MB", dest="shard_mb", help="default: %(default)s")
        add("--shard-samples", type=int, default=10_000, metavar="N", help="default: %(default)s")


def _track(samples: Iterable[Sample], split: str) -> Iterable[Sample]:
    console = Console(stderr=True)
    return track(list(samples), split, console=console, transient=True, disable=not console.is_terminal)


if __name__ == "__main__":
    run_main(main)
