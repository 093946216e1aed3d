"""The report of one run or of several, as one HTML page."""

from __future__ import annotations

import base64
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from common.config import flatten
from common.data.quarantine import count
from common.engine.run import read_file, read_metrics
from common.errors import UserError
from common.files import read_lines
from common.report import html
from common.report.pictures import confusion_figure

_PANELS = (
    ("loss", "loss", "step"),
    ("top1", "top-1 accuracy, %", "step"),
    ("lr", "learning rate", "step"),
    ("samples_per_s", "samples/s", "minutes"),
    ("data_wait", "share of waiting for data", "minutes"),
    ("memory_gib", "peak memory, GiB", "minutes"),
)
_NUMBERS = (
    ("top1", "top-1, %"),
    ("top5", "top-5, %"),
    ("mean_class", "mean of the classes, %"),
    ("loss", "loss"),
)
_SHOWN_CLASSES = 200


@dataclass
class Report:
    """What a run's folder tells."""

    name: str
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]

    @property
    def group(self) -> str:
        """What runs that differ in their seed alone have in common."""
        return json.dumps({k: v for k, v in flatten(self.config).items() if k not in ("out", "train.seed")})


def read_report(folder: Path) -> Report:
    """Read a run's folder.

    Raises:
        UserError: it is not a run's folder, or a damaged one, or nothing has been evaluated in it.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{str(folder)!r} is not a run's folder: it has no config.yaml")
    if not (folder / "evaluation.json").is_file():
        raise UserError(f"{folder}: no evaluation.json; a run is reported once it has been evaluated")
    return Report(
        str(folder),
        read_metrics(folder),
        read_file(folder / "evaluation.json"),
        read_file(folder / "config.yaml"),
        read_lines(folder / "starts.jsonl"),
        read_lines(folder / "quarantine.jsonl"),
    )


def write_report(folders: Sequence[Path], path: Path) -> Path:
    """Write the page about the runs in ``folders``; returns its path.

    Raises:
        UserError: see :func:`read_report`, or the page cannot be written.
    """
    reports = [read_report(folder) for folder in folders]
    parts = [_summary(reports)]
    if len(reports) > 1:
        parts += [html.heading("Over seeds"), _over_seeds(reports)]
    parts += [html.heading("Curves"), html.picture(html.png_of(_curves(reports)), "dots: validation")]
    for report in reports:
        parts += [html.heading(report.name), *_one(report)]
    try:
        return html.write_page(path, "Report", parts)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _summary(reports: Sequence[Report]) -> str:
    rows = []
    for report in reports:
        model = report.config.get("model", {}).get("name", "")
        numbers = [_number(report.evaluation.get(key)) for key, _ in _NUMBERS]
        rows.append([report.name, model, *numbers, len(report.starts), len(report.quarantine)])
    head = ["run", "model", *(title for _, title in _NUMBERS), "starts", "unreadable"]
    return html.table(head, rows)


def _over_seeds(reports: Sequence[Report]) -> str:
    groups: dict[str, list[Report]] = defaultdict(list)
    for report in reports:
        groups[report.group].append(report)
    rows = []
    for members in groups.values():
        seeds = ", ".join(str(report.config.get("train", {}).get("seed", "?")) for report in members)
        spreads = [
            _spread([r.evaluation[key] for r in members if key in r.evaluation]) for key, _ in _NUMBERS
        ]
        rows.append([members[0].name, len(members), seeds, *spreads])
    head = ["runs like", "runs", "seeds", *(title for _, title in _NUMBERS)]
    return html.table(head, rows)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def _curves(reports: Sequence[Report]) -> Figure:
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for axis, (key, title, place) in zip(figure.subplots(2, 3).flat, _PANELS):
        for number, report in enumerate(reports):
            colour = f"C{number % 10}"
            begun = report.metrics[0]["time"] if report.metrics else 0
            for split, style in (("train", "-"), ("val", "o")):
                entries = [e for e in report.metrics if e["split"] == split and key in e]
                places = [e["step"] if place == "step" else (e["time"] - begun) / 60 for e in entries]
                axis.plot(places, [e[key] for e in entries], style, color=colour, markersize=3)
        axis.set(title=title, xlabel=place)
        axis.set_yscale("log" if key == "loss" else "linear")
        axis.grid(alpha=0.3)
    names = [report.name.replace("$", r"\$") for report in reports]
    handles = [figure.axes[0].plot([], [], color=f"C{n % 10}")[0] for n in range(len(names))]
    figure.axes[0].legend(handles, names, fontsize="x-small")
    return figure


def write_evaluation(
    evaluation: dict[str, Any], path: Path, names: Callable[[int], str], quarantine: Path
) -> Path:
    """Write the page about one evaluation; returns its path.

    Args:
        evaluation: the numbers, with ``classes`` and the ``worst`` samples.
        names: what a sample is called, by its index.
        quarantine: the file that names what could not be read; there is none if all could.
    """
    numbers = [[title, _number(evaluation.get(key))] for key, title in _NUMBERS]
    parts = [html.table(["", f"{evaluation['samples']} samples"], numbers), *_classes(evaluation)]
    parts.append(html.heading("Worst samples"))
    parts += [
        html.picture(png, f"{names(sample['index'])}: {caption}")
        for sample, (png, caption) in zip(evaluation["worst"], _worst(evaluation))
    ]
    return html.write_page(path, "Evaluation", [*parts, *_unreadable(read_lines(quarantine))])


def _one(report: Report) -> list[str]:
    parts = _classes(report.evaluation)
    if report.evaluation.get("worst"):
        parts += [html.heading("Worst samples", 3), html.samples(_worst(report.evaluation))]
    parts += _unreadable(report.quarantine)
    parts.append(html.folded("Settings", yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True)))
    return [*parts, html.folded("Starts and versions", "\n\n".join(map(_start, report.starts)))]


def _classes(evaluation: dict[str, Any]) -> list[str]:
    classes, confusion = evaluation["classes"], evaluation["confusion"]
    return [
        html.picture(html.png_of(confusion_figure(confusion, classes), 80), "confusion"),
        html.heading("Classes, the worst first", 3),
        _class_table(classes, evaluation["per_class"], confusion),
    ]


def _unreadable(samples: Sequence[dict[str, Any]]) -> list[str]:
    if not samples:
        return [html.paragraph("Every sample could be read.")]
    reasons, shards = count(samples)
    rows = [[s.get("where", ""), s.get("reason", ""), s.get("detail", "")] for s in samples[:100]]
    words = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    files = html.table(["file", "unreadable"], [[*pair] for pair in shards.most_common(100)])
    table = html.table(["where", "reason", "detail"], rows)
    return [html.heading("Unreadable samples", 3), html.paragraph(words), files, table]


def _class_table(classes: Sequence[str], per_class: Sequence[float | None], confusion: Sequence[Any]) -> str:
    rows = []
    for name, accuracy, row in zip(classes, per_class, confusion):
        if accuracy is None:
            continue
        wrong = [(count, other) for other, count in zip(classes, row) if other != name and count]
        taken = ", ".join(f"{other} ({count})" for count, other in sorted(wrong, reverse=True)[:3])
        rows.append((accuracy, [name, f"{accuracy:.1f}", sum(row), taken]))
    rows.sort(key=lambda row: row[0])
    shown = html.table(
        ["class", "accuracy, %", "samples", "taken for"], [r for _, r in rows[:_SHOWN_CLASSES]]
    )
    left = len(rows) - _SHOWN_CLASSES
    return shown + (html.paragraph(f"and {left} better ones") if left > 0 else "")


def _worst(evaluation: dict[str, Any]) -> list[tuple[bytes, str]]:
    """Picture and caption of each of the worst samples."""
    classes = evaluation["classes"]
    return [
        (
            base64.b64decode(s["png"]),
            f"{classes[s['target']]}, {_taken(s, classes)} ({s['share']:.0%}), loss {s['loss']:.2f}",
        )
        for s in evaluation["worst"]
    ]


def _taken(sample: dict[str, Any], classes: Sequence[str]) -> str:
    right = sample["predicted"] == sample["target"]
    return "rightly" if right else f"taken for {classes[sample['predicted']]}"


def _start(start: dict[str, Any]) -> str:
    return yaml.safe_dump(start, sort_keys=False, allow_unicode=True)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.2f}"
