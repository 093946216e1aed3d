"""Make video data sets: ``python video/prepare.py COMMAND --help``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.progress import track

from common.config import Commands
from common.data.prepare.progress import progress_bar
from common.data.source import DataError, local_path, read_classes
from common.data.video.decode import Decoder
from common.data.video.digits import CLASSES, prepare_moving_digits
from common.data.video.lists import ClipList, read_list, write_classes, write_list
from common.data.video.pack import ClipSettings, write_clip_shards
from common.data.video.probe import (
    Candidate,
    Probe,
    check_list,
    class_folders,
    extract_all,
    folder_candidates,
    frames_folder,
    kinetics_candidates,
    list_of,
    probe_all,
    read_annotations,
)
from common.data.video.shards import open_clips
from common.errors import ConfigError, RunError, UserError, run_main
from common.files import atomic_write


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv`` by default) and return the exit code."""
    args = _parser().parse_args(argv)
    if getattr(args, "workers", 1) < 1:
        raise ConfigError(f"workers: {args.workers} is not a number of processes")
    try:
        return args.run(args)
    except KeyboardInterrupt:
        raise RunError("stopped") from None
    except OSError as error:
        raise UserError(f"{error.filename or 'file system'}: {error.strerror or error}") from None


def digits(args: argparse.Namespace) -> int:
    """Make the moving digits, or say that they are there."""
    out = local_path(args.out)
    written = "written" if prepare_moving_digits(out) else "there already, nothing to do"
    train, val = (len(read_list(out / f"{split}.txt", out, len(CLASSES))) for split in ("train", "val"))
    print(f"{out}: {train:,} training and {val:,} validation videos of {len(CLASSES)} motions, {written}")
    return 0


def from_folders(args: argparse.Namespace) -> int:
    """Write list files of ``SRC/SPLIT/CLASS/*.mp4``."""
    source, out = local_path(args.source), local_path(args.out or args.source)
    if not source.is_dir():
        raise DataError(f"{str(source)!r} is not an existing folder")
    splits = args.split or [name for name in ("train", "val", "test") if (source / name).is_dir()]
    if not splits:
        raise DataError(f"{source}: no folder train, val or test; name the folders by --split")
    classes = class_folders(source / splits[0])
    for split in splits[1:]:
        unknown = sorted(set(class_folders(source / split)) - set(classes))
        if unknown:
            raise DataError(f"{source / split}: class {unknown[0]!r} is not among the classes of {splits[0]}")
    problems = 0
    for split in splits:
        candidates = folder_candidates(source / split, classes, _namer(source, out))
        problems += _write(out, split, candidates, args)
    write_classes(out, classes)
    return _conclude(problems, out)


def from_kinetics(args: argparse.Namespace) -> int:
    """Write one list file of a Kinetics annotation file and a folder of videos."""
    table, folder, out = Path(args.table), local_path(args.folder), local_path(args.out)
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is not an existing folder")
    if (out / "classes.txt").exists():  # of another split
        classes = read_classes(out)
    else:
        classes = tuple(sorted({row["label"] for _, row in read_annotations(table)}))
    candidates = kinetics_candidates(table, folder, classes, _namer(folder, out))
    out.mkdir(parents=True, exist_ok=True)
    write_classes(out, classes)
    return _conclude(_write(out, args.split, candidates, args), out)


def check(args: argparse.Namespace) -> int:
    """Compare a list with its files, write the report, and name the first problem."""
    clips = _open_list(args)
    probes = _tracked(
        check_list(clips, args.read_mode, _decoder(args), args.quick, args.workers), len(clips), "check"
    )
    report = clips.path.with_name(f"{clips.path.stem}_check.jsonl")
    bad = _report(report, probes)
    print(f"{clips.path}: {len(clips):,} clips examined; problems: {len(bad):,}")
    if bad:
        raise RunError(
            f"{bad[0].where}: {bad[0].reason}: {bad[0].detail}; all {len(bad):,} problems are in {report}"
        )
    return 0


def frames(args: argparse.Namespace) -> int:
    """Write the frames of a list's videos as JPEG files, and a list of the folders."""
    clips, out = _open_list(args), local_path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    probes = _tracked(extract_all(clips, out, _decoder(args), args.workers), len(clips), "frames")
    labels = clips.labels.tolist()
    rows = [
        (frames_folder(clips.name(i)), probe.frames, labels[i])
        for i, probe in enumerate(probes)
        if not probe.reason
    ]
    write_list(out / clips.path.name, rows)
    classes = clips.path.parent / "classes.txt"
    if classes.is_file():
        write_classes(out, read_classes(classes.parent))
    bad = _report(out / f"{clips.path.stem}_report.jsonl", probes)
    print(f"{out / clips.path.name}: {len(rows):,} folders of frames, for --data.read_mode img")
    return _conclude(len(bad), out)


def shards(args: argparse.Namespace) -> int:
    """Write lists' videos as WebDataset shards, with their lists."""
    paths = [Path(path) for path in args.lists]
    if len({path.parent for path in paths}) > 1 or len({path.stem for path in paths}) < len(paths):
        raise DataError(
            "lists: expected lists of different names in one folder, such as train.txt and val.txt"
        )
    if missing := [path for path in paths if not path.is_file()]:
        raise DataError(f"{str(missing[0])!r} is not an existing list")
    classes = read_classes(paths[0].parent)
    root = local_path(args.root) if args.root else paths[0].parent
    lists = {path.stem: open_clips(path, root, classes) for path in paths}
    given = {
        field.name: getattr(args, field.name) for field in fields(ClipSettings) if hasattr(args, field.name)
    }
    with progress_bar() as bar:
        written = write_clip_shards(
            lists, classes, args.out, ClipSettings(**given), args.max_unreadable, args.workers, bar
        )
    out = local_path(args.out)
    counts = " and ".join(
        f"{len(open_clips(out / f'{split}.txt', out, classes)):,} {split}" for split in lists
    )
    print(f"{out}: {counts} videos in shards, {'written' if written else 'there already, nothing to do'}")
    left_out = out / "quarantine.jsonl"
    if left_out.exists():
        print(
            f"left out, as they could not be used: {len(left_out.read_bytes().splitlines()):,}, see {left_out}"
        )
    return 0


def _write(out: Path, split: str, candidates: list[Candidate], args: argparse.Namespace) -> int:
    """Write a split's list and report; returns the number of videos that are missing or unreadable."""
    if not candidates:
        raise DataError(f"{split}: no videos found; expected files such as {split}/CLASS/NAME.mp4")
    probes = _tracked(probe_all(candidates, _decoder(args), args.workers), len(candidates), split)
    clips = list_of(candidates, probes)
    if not clips:
        first = f"; the first: {probes[0].where}: {probes[0].reason}" if probes else ""
        raise DataError(f"{split}: none of {len(candidates):,} videos can be used{first}")
    out.mkdir(parents=True, exist_ok=True)
    write_list(out / f"{split}.txt", clips)
    bad = _report(out / f"{split}_report.jsonl", probes)
    missing = sum(probe.reason == "missing" for probe in bad)
    print(
        f"{out / f'{split}.txt'}: {len(clips):,} of {len(candidates):,} videos; "
        f"missing: {missing:,}, unreadable: {len(bad) - missing:,}"
    )
    return len(bad)


def _conclude(problems: int, out: Path) -> int:
    if problems:
        print(f"what was left out is named in {out}/*_report.jsonl")
    return 0


def _report(path: Path, probes: list[Probe]) -> list[Probe]:
    """Write what is wrong, a line a video; returns it."""
    bad = [probe for probe in probes if probe.reason]
    with atomic_write(path) as file:
        file.writelines(json.dumps(probe.report()).encode() + b"\n" for probe in bad)
    return bad


def _namer(source: Path, out: Path) -> Callable[[Path], str]:
    """How lists in ``out`` name files of ``source``: relative to it where they are the same, else absolute."""
    inside = source.resolve() == out.resolve()
    return lambda path: str(path.relative_to(source)) if inside else os.path.abspath(path)


def _open_list(args: argparse.Namespace) -> ClipList:
    path = Path(args.list)
    root = local_path(args.root) if args.root else path.parent
    if not (path.parent / "classes.txt").is_file():
        return read_list(path, root)
    form = "list" if getattr(args, "read_mode", "video") == "img" else "auto"
    return open_clips(path, root, read_classes(path.parent), form)


def _decoder(args: argparse.Namespace) -> Decoder:
    return Decoder(args.seconds)


def _tracked(probes: Iterable[Probe], total: int, title: str) -> list[Probe]:
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return list(track(probes, title, total, console=console, transient=True, disable=hidden))


def _parser() -> argparse.ArgumentParser:
    parser = Commands(
        prog="video/prepare.py", description="Make video data sets for training and evaluation."
    )
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=Commands
    )

    def add(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        command.set_defaults(run=run)
        return command

    command = add("digits", digits, "make real handwritten digits that move, from scikit-learn: no download")
    command.add_argument("out", metavar="OUT", help="folder to make; it appears when everything is written")

    command = add("list", from_folders, "write lists of the videos in class folders: SRC/SPLIT/CLASS/*.mp4")
    command.add_argument("source", metavar="SRC", help="folder of the splits")
    command.add_argument("--out", metavar="OUT", help="folder of the lists; default: SRC")
    about = "may be given several times; default: train, val and test, those that are there"
    command.add_argument("--split", action="append", metavar="NAME", help=about)
    _add_reading(command)

    command = add(
        "kinetics", from_kinetics, "write the list of a Kinetics annotation file and a folder of videos"
    )
    command.add_argument("table", metavar="CSV", help="columns label, youtube_id, time_start, time_end")
    command.add_argument("folder", metavar="FOLDER", help="ID_000010_000020.mp4 or ID.mp4, at any depth")
    command.add_argument(
        "out", metavar="OUT", help="folder of the lists; its classes.txt is used if it is there"
    )
    command.add_argument("--split", required=True, metavar="NAME", help="name of the list, train or val")
    _add_reading(command)

    command = add("check", check, "compare a list with its files: decode all of them, count frames")
    command.add_argument("list", metavar="LIST")
    command.add_argument("--root", help="folder that its paths are relative to; default: the list's")
    command.add_argument(
        "--read-mode", choices=("video", "img"), default="video", help="default: %(default)s"
    )
    command.add_argument("--quick", action="store_true", help="count packets, decode nothing")
    _add_reading(command)

    command = add("frames", frames, "write a list's videos as folders of frames, img_00001.jpg, …")
    command.add_argument("list", metavar="LIST")
    command.add_argument("out", metavar="OUT", help="folder of the folders and of their list")
    command.add_argument("--root", help="folder that the list's paths are relative to; default: the list's")
    _add_reading(command)

    command = add(
        "shards", shards, "write lists' videos as WebDataset shards, for reading from few large files"
    )
    command.add_argument("lists", nargs="+", metavar="LIST", help="lists in one folder with classes.txt")
    command.add_argument("out", metavar="OUT", help="folder to make; it appears when everything is written")
    command.add_argument("--root", help="folder that the lists' paths are relative to; default: the lists'")
    _add_packing(command)
    _add_reading(command)
    return parser


def _add_packing(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    about = "encode anew as H.264, the shorter side so many pixels (256, 340); default: the bytes are kept"
    add("--short-side", type=int, metavar="PIXELS", dest="resize", help=about)
    about = "x264's quality where videos are encoded anew, 0 to 51, less is better; default: %(default)s"
    add("--crf", type=int, default=20, metavar="Q", help=about)
    about = "decode also videos whose bytes are kept, and leave out broken ones"
    add("--check", action="store_true", help=about)
    add("--shuffle", type=int, metavar="SEED", help="write in a random order; default: the lists' order")
    about = "stop above it; default: %(default)s"
    add("--max-unreadable", type=float, default=0.01, metavar="SHARE", help=about)
    add("--shard-size", type=int, default=256, metavar="MB", dest="shard_mb", help="default: %(default)s")
    add("--shard-samples", type=int, default=10_000, metavar="N", help="default: %(default)s")


def _add_reading(command: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    command.add_argument(
        "--workers", type=int, default=cores, metavar="N", help="processes; default: the cores"
    )
    about = "time limit of one video, seconds; default: %(default)s"
    command.add_argument("--seconds", type=float, default=60.0, metavar="S", help=about)


if __name__ == "__main__":
    run_main(main)
