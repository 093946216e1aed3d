"""Several runs side by side: their curves in one picture, and a table of final and best numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.engine.run import read_metrics
from common.errors import UserError
from common.files import atomic_write

_PANELS = (("loss", "loss"), ("error", "top-1 error, %"))


@dataclass
class History:
    """What a run has logged: entries with ``split``, ``step``, ``loss`` and ``top1``, and where known ``epoch``."""

    name: str
    entries: list[dict[str, Any]]

    def of(self, split: str) -> list[dict[str, Any]]:
        """The entries of ``train`` or ``val``, with ``error`` = 100 − top1."""
        return [entry | {"error": 100 - entry["top1"]} for entry in self.entries if entry["split"] == split]

    @property
    def best(self) -> dict[str, Any]:
        """The evaluation with the highest top-1, the first of equals."""
        return max(self.of("val"), key=lambda entry: entry["top1"])


def read_history(folder: Path) -> History:
    """Read ``metrics.jsonl`` of a run's folder, or TensorBoard's event files in it if there is none.

    Raises:
        UserError: there is neither, or no evaluation in it.
    """
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is not an existing folder; expected a run's folder")
    history = History(str(folder), read_metrics(folder) or read_events(folder))
    if not history.of("val"):
        raise UserError(f"{folder}: no evaluation in metrics.jsonl or in TensorBoard's event files")
    return history


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The scalars ``train/NAME`` and ``val/NAME`` of the event files in ``folder`` or below, one entry a step."""
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,  # a second to import, so only here
    )

    entries: dict[tuple[int, str], dict[str, Any]] = {}
    for place in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(place), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            split, _, name = tag.partition("/")
            for scalar in events.Scalars(tag):
                entry = entries.setdefault((scalar.step, split), {"split": split, "step": scalar.step})
                entry[name] = scalar.value
    return [entry for _, entry in sorted(entries.items()) if {"loss", "top1"} <= entry.keys()]


def draw_histories(histories: Sequence[History], stem: Path) -> list[Path]:
    """Draw loss and error of all runs into ``stem.png`` and ``stem.svg``; stars mark the best evaluations.

    Lines are validation, thin dots training. The axis is the epoch, or the step where a run does not know its epochs.
    """
    known = all("epoch" in entry for history in histories for entry in history.entries)
    place = "epoch" if known else "step"
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots(1, len(_PANELS))
    for number, history in enumerate(histories):
        colour, train, val = f"C{number % 10}", history.of("train"), history.of("val")
        for axis, (key, _) in zip(axes, _PANELS):
            axis.plot([e[place] for e in train], [e[key] for e in train], ":", color=colour, linewidth=1)
            axis.plot([e[place] for e in val], [e[key] for e in val], color=colour, label=history.name)
            best = history.best
            axis.plot(best[place], best[key], "*", color=colour, markersize=10)
    for axis, (key, title) in zip(axes, _PANELS):
        axis.set(title=f"{title} (dotted: training)", xlabel=place)
        axis.set_yscale("log" if key == "loss" else "linear")
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize="small")
    return [_save(figure, stem.with_name(f"{stem.name}.{kind}"), kind) for kind in ("png", "svg")]


def table(histories: Sequence[History]) -> str:
    """A Markdown table of each run's last and best evaluation."""
    lines = ["| run | final error, % | best error, % | at | final loss |", "|---|---|---|---|---|"]
    for history in histories:
        last, best = history.of("val")[-1], history.best
        at = f"epoch {best['epoch']:.1f}" if "epoch" in best else f"step {best['step']}"
        lines.append(
            f"| {history.name} | {last['error']:.2f} | {best['error']:.2f} | {at} | {last['loss']:.4f} |"
        )
    return "\n".join(lines)


def _save(figure: Figure, path: Path, kind: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format=kind, dpi=110)
    return path
