"""Proof that a data set is whole: every checksum, every sample decoded, every class counted."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.data.decode import decode_rgb
from common.data.forms import find_form, forms_there, open_source
from common.data.prepare.feed import Progress
from common.data.prepare.workers import Workers
from common.data.quarantine import count
from common.data.source import BadSample, DataError, Source, local_path
from common.files import atomic_write, sha256

_BATCH = 32

Problem = dict[str, str]


@dataclass
class SplitReport:
    """What was found of a split: ``listed`` is the manifest's number of samples, ``per_class`` what was decoded,
    ``problems_per_shard`` the number of problems of each shard or class folder that has any.
    """

    format: str = ""
    listed: int | None = None
    samples: int = 0
    decoded: int = 0
    bytes: int = 0
    classes: int = 0
    checksums: str = "none: there is no manifest"
    per_class: dict[str, int] = field(default_factory=dict)
    smallest_class: int = 0
    largest_class: int = 0
    problems: list[Problem] = field(default_factory=list)
    problems_per_shard: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Context:
    root: Path
    sources: Mapping[str, Source]
    checksums: Mapping[str, Mapping[str, str]]
    """Of each split and file of it."""


_Task = tuple[str, str | list[int]]
_Found = tuple[list[int], int, list[Problem]]
"""Labels of what could be decoded, bytes read, problems."""


def verify(
    path: str | Path,
    splits: Sequence[str] = (),
    format: str = "auto",
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, SplitReport]:
    """Read, decode and checksum everything of a data set in any form.

    Args:
        path: its folder.
        splits: their names; ``train`` and ``val`` as far as they are there by default.
        format: the form, where there are several.
        workers: processes to do it with.
        progress: told how far it is.

    Returns:
        A report a split, with every problem: no exception is raised for what is wrong inside the data.

    Raises:
        DataError: there is no data set.
    """
    root = local_path(path)
    if not root.is_dir():
        raise DataError(f"data: {str(root)!r} is not an existing folder")
    names = splits or [
        name for name in ("train", "val") if forms_there(root, name) or _manifest_path(root, name)
    ]
    if not names:
        open_source(root, "train", format)  # says what is there instead
    reports = {split: SplitReport() for split in names}
    sources: dict[str, Source] = {}
    checksums: dict[str, dict[str, str]] = {}
    for split, report in reports.items():
        try:
            checksums[split] = _checksums(root, split, report)
            sources[split] = open_source(root, split, format)
            report.format = find_form(root, split, format)
        except (DataError, OSError) as error:
            report.problems.append(_problem(split, "cannot be opened", str(error), split))
    with Workers(workers, _check, _Context(root, sources, checksums)) as pool:
        for split, source in sources.items():
            _verify_split(split, source, checksums[split], reports[split], pool, progress)
    for report in reports.values():
        report.problems_per_shard = dict(count(report.problems)[1].most_common())
    return reports


def write_report(reports: Mapping[str, SplitReport], folder: Path) -> None:
    """Write ``verify.json`` and a picture of the classes' sizes, ``verify.png``."""
    import matplotlib  # half a second, only here
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    with atomic_write(folder / "verify.json") as file:
        text = json.dumps({split: asdict(report) for split, report in reports.items()}, indent=1)
        file.write(text.encode() + b"\n")
    figure = Figure(figsize=(5 * len(reports), 3.6), layout="constrained")
    for axis, (split, report) in zip(np.atleast_1d(figure.subplots(1, len(reports))), reports.items()):
        sizes = list(report.per_class.values())
        axis.bar(range(len(sizes)), sizes, width=1.0)
        found = f"{len(report.problems):,} problems" if report.problems else "no problems"
        axis.set(title=f"{split}: {report.decoded:,} images, {found}", xlabel="class", ylabel="images")
        if 0 < len(sizes) <= 20:
            axis.set_xticks(range(len(sizes)), list(report.per_class), rotation=45, ha="right")
    with atomic_write(folder / "verify.png") as file:
        figure.savefig(file, format="png", dpi=120)


def _verify_split(
    split: str,
    source: Source,
    checksums: Mapping[str, str],
    report: SplitReport,
    pool: Workers[_Task, _Found],
    progress: Progress | None,
) -> None:
    report.samples, report.classes = len(source), len(source.classes)
    if report.listed is not None and report.listed != len(source):
        detail = f"it says {report.listed}, there are {len(source)}"
        report.problems.append(_problem(f"{split}.json", "samples", detail, f"{split}.json"))
    tasks: list[_Task] = []
    if report.format == "folder":
        report.problems += _compare_names(split, source, checksums) if checksums else []
    else:
        tasks += [(split, name) for name in checksums]
    starts = range(0, len(source), _BATCH)
    tasks += [(split, list(range(start, min(start + _BATCH, len(source))))) for start in starts]
    counts: Counter[int] = Counter()
    for number, (labels, size, problems) in enumerate(pool.map(tasks), start=1):
        counts.update(labels)
        report.bytes += size
        report.problems += problems
        if progress:
            progress(split, number, len(tasks))
    report.decoded = counts.total()
    report.per_class = {name: counts[label] for label, name in enumerate(source.classes)}
    report.smallest_class, report.largest_class = (
        min(report.per_class.values()),
        max(report.per_class.values()),
    )


def _check(context: _Context, task: _Task) -> _Found:
    split, what = task
    if isinstance(what, str):
        return [], 0, _check_file(context, split, what)
    labels, size, problems = [], 0, []
    for index in what:
        source = context.sources[split]
        where, shard = source.where(index), source.shard(index)
        try:
            image, label = source.read(index)
            size += len(image)
            expected = context.checksums[split].get(f"{split}/{where}")
            if expected not in (None, hashlib.sha256(image).hexdigest()):
                problems.append(_problem(where, "checksum", "the file is not what was written", shard))
            decode_rgb(image, where)
            labels.append(label)
        except BadSample as bad:
            problems.append(_problem(bad.where, bad.reason, bad.detail, shard))
    return labels, size, problems


def _check_file(context: _Context, split: str, name: str) -> list[Problem]:
    try:
        same = sha256(context.root / name) == context.checksums[split][name]
    except OSError as error:
        return [_problem(name, "missing", error.strerror or str(error), name)]
    return [] if same else [_problem(name, "checksum", "the file is not what was written", name)]


def _compare_names(split: str, source: Source, checksums: Mapping[str, str]) -> list[Problem]:
    there = {f"{split}/{source.where(index)}" for index in range(len(source))}
    changes = [(name, "missing", "it was written once") for name in sorted(set(checksums) - there)]
    changes += [(name, "unknown", "it was not written here") for name in sorted(there - set(checksums))]
    return [_problem(*change, change[0].rpartition("/")[0]) for change in changes]


def _manifest_path(root: Path, split: str) -> Path | None:
    path = root / f"{split}.json"
    return path if path.is_file() else None


def _checksums(root: Path, split: str, report: SplitReport) -> dict[str, str]:
    """What the manifest says the files' checksums are; none without a manifest."""
    path = _manifest_path(root, split)
    if path is None:
        return {}
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        report.listed = int(manifest["samples"])
        report.checksums = "compared"
        if "checksums" not in manifest:
            listed = {str(entry["name"]): str(entry["sha256"]) for entry in manifest["shards"]}
            if any("/" in name for name in listed):
                raise ValueError
            return listed
        listing = root / f"{split}.sha256"
        if sha256(listing) != manifest["checksums"]:
            raise DataError(f"{listing} is not what was written")
        return {line[66:]: line[:64] for line in listing.read_text("utf-8").splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a manifest") from None


def _problem(where: str, reason: str, detail: str, shard: str) -> Problem:
    return {"where": where, "reason": reason, "detail": detail, "shard": shard}
