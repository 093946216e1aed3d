"""Make image data sets: ``python image/prepare.py digits OUT``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import NoReturn

from rich.console import Console
from rich.progress import track

from common.data.digits import SPLITS, prepare_digits
from common.data.source import FORMS, Sample, open_source
from common.errors import ConfigError, UserError, run_main


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv`` by default) and return the exit code."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except OSError as error:
        raise UserError(f"{args.out}: {error.strerror or error}") from None


def digits(args: argparse.Namespace) -> int:
    """Write the digits, or say that they are there."""
    written = prepare_digits(args.out, args.format, args.force, track=_progress)
    train, val = (len(open_source(args.out, split, args.format)) for split in SPLITS)
    done = "written" if written else "there already, nothing to do"
    print(f"{args.out}: {train:,} training and {val:,} validation images as {args.format}, {done}")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="image/prepare.py", description="Make image data sets for training and evaluation.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
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
    return parser


def _progress(samples: Iterable[Sample], split: str) -> Iterable[Sample]:
    console = Console(stderr=True)
    return track(list(samples), split, console=console, transient=True, disable=not console.is_terminal)


if __name__ == "__main__":
    run_main(main)
