"""Examining many videos in several processes, and the list files that come of it."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.data.prepare.workers import Workers
from common.data.source import BadSample, DataError
from common.data.video.decode import Decoder, first_number, write_frames
from common.data.video.lists import Clip, ClipList

VIDEO_ENDINGS = (
    ".mp4",
    ".mkv",
    ".webm",
    ".avi",
    ".mov",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".ts",
    ".flv",
    ".wmv",
    ".3gp",
)


class Probe(NamedTuple):
    """What was found of a video: its number of frames, or 0 and what is wrong."""

    where: str
    frames: int
    reason: str = ""
    detail: str = ""

    def report(self) -> dict[str, str]:
        """A line of a report."""
        return {"where": self.where, "reason": self.reason, "detail": self.detail}


@dataclass
class Candidate:
    """A video that a list may get: the path in the list, its file (None: missing), its label."""

    name: str
    file: Path | None
    label: int


def probe_all(candidates: Sequence[Candidate], decoder: Decoder, workers: int) -> Iterator[Probe]:
    """Count the frames of every video, in order, from its packets."""
    with Workers(workers, _count, decoder) as pool:
        yield from pool.map(candidates)


def list_of(candidates: Sequence[Candidate], probes: Sequence[Probe]) -> list[Clip]:
    """The lines of a list: the candidates that can be read."""
    pairs = zip(candidates, probes)
    return [(candidate.name, probe.frames, candidate.label) for candidate, probe in pairs if not probe.reason]


def check_list(
    clips: ClipList, read_mode: str, decoder: Decoder, quick: bool, workers: int
) -> Iterator[Probe]:
    """Compare every clip of a list with its file, in order: decode all of it, or with ``quick`` count its packets."""
    with Workers(workers, _check, (clips, read_mode, decoder, quick)) as pool:
        yield from pool.map(range(len(clips)))


def extract_all(clips: ClipList, out: Path, decoder: Decoder, workers: int) -> Iterator[Probe]:
    """Write the frames of every video of a list into a folder of its name, without ending, in ``out``."""
    with Workers(workers, _extract, (clips, out, decoder)) as pool:
        yield from pool.map(range(len(clips)))


def frames_folder(name: str) -> str:
    """The folder of a video's frames: its path in the list without the ending."""
    return str(Path(name).with_suffix("")).lstrip("/")


def class_folders(root: Path) -> tuple[str, ...]:
    """The names of the class folders in ``root``, sorted.

    Raises:
        DataError: there are none.
    """
    if not root.is_dir():
        raise DataError(f"{str(root)!r} is not an existing folder")
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise DataError(f"{root}: no class folders; expected {root.name}/CLASS/*.mp4")
    return tuple(names)


def folder_candidates(root: Path, classes: Sequence[str], name: Callable[[Path], str]) -> list[Candidate]:
    """The videos below the class folders of ``root``, by class and path; ``name`` gives a path in the list."""
    found = []
    for label, title in enumerate(classes):
        files = sorted(path for path in (root / title).rglob("*") if path.suffix.lower() in VIDEO_ENDINGS)
        found += [Candidate(name(path), path, label) for path in files]
    return found


def kinetics_candidates(
    table: Path, folder: Path, classes: Sequence[str], name: Callable[[Path], str]
) -> list[Candidate]:
    """The videos of an annotation CSV (columns label, youtube_id, time_start, time_end), those found and those missing.

    A file is called ID_000010_000020.mp4 (start and end in seconds) or ID.mp4, anywhere below ``folder``.

    Raises:
        DataError: a row that cannot be used: one line with file and line number.
    """
    files = {path.stem: path for path in sorted(_videos(folder))}
    labels, found = {title: label for label, title in enumerate(classes)}, []
    for line, row in read_annotations(table):
        if row["label"] not in labels:
            raise DataError(f"{table}:{line}: label {row['label']!r} is not among the {len(classes)} classes")
        try:
            start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
        except ValueError:
            raise DataError(f"{table}:{line}: time_start and time_end: expected seconds") from None
        stems = (f"{row['youtube_id']}_{start:06d}_{end:06d}", row["youtube_id"])
        file = next((files[stem] for stem in stems if stem in files), None)
        found.append(Candidate(name(file) if file else stems[0], file, labels[row["label"]]))
    return found


def read_annotations(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a Kinetics annotation file, with their line numbers.

    Raises:
        DataError: the file is missing or has other columns.
    """
    needed = {"label", "youtube_id", "time_start", "time_end"}
    try:
        with open(table, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not needed <= set(reader.fieldnames or ()):
                raise DataError(f"{table}: expected the columns {', '.join(sorted(needed))}")
            for row in reader:
                if any(row[key] is None for key in needed):
                    raise DataError(f"{table}:{reader.line_num}: too few columns")
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _videos(folder: Path) -> Iterable[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names if name.lower().endswith(VIDEO_ENDINGS))


def _count(decoder: Decoder, candidate: Candidate) -> Probe:
    if candidate.file is None:
        return Probe(candidate.name, 0, "missing", "no file of this name")
    try:
        return Probe(candidate.name, decoder.length(candidate.file, candidate.name))
    except BadSample as bad:
        return Probe(candidate.name, 0, bad.reason, bad.detail)


def _check(how: tuple[ClipList, str, Decoder, bool], index: int) -> Probe:
    clips, read_mode, decoder, quick = how
    where, said = clips.where(index), int(clips.frames[index])
    try:
        if read_mode == "img":
            frames = _folder_length(clips.root / clips.name(index), where)
        else:
            file = clips.file(index)
            frames = decoder.length(file, where) if quick else decoder.check(file, where)
    except BadSample as bad:
        return Probe(where, 0, bad.reason, bad.detail)
    if frames != said:
        return Probe(where, frames, "wrong frame count", f"the list says {said}, there are {frames}")
    return Probe(where, frames)


def _folder_length(folder: Path, where: str) -> int:
    first, number = first_number(folder, where), 0
    while (folder / f"img_{first + number:05d}.jpg").exists():
        number += 1
    return number


def _extract(how: tuple[ClipList, Path, Decoder], index: int) -> Probe:
    clips, out, decoder = how
    where, folder = clips.where(index), out / frames_folder(clips.name(index))
    try:
        return Probe(where, write_frames(clips.file(index), folder, decoder, where))
    except BadSample as bad:
        return Probe(where, 0, bad.reason, bad.detail)
