"""A run's pictures: curves of loss, accuracy and learning rate, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from common.engine.run import read_file, read_metrics
from common.files import atomic_write

matplotlib.use("Agg")


def draw_run(folder: Path) -> list[Path]:
    """Draw ``curves.png`` and ``confusion.png`` into a run's folder; returns their paths."""
    paths = [draw_curves(read_metrics(folder), folder / "curves.png")]
    evaluation = folder / "evaluation.json"
    if evaluation.is_file():
        result = read_file(evaluation)
        paths.append(draw_confusion(result["confusion"], result["classes"], folder / "confusion.png"))
    return paths


def draw_curves(metrics: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw loss, top-1 and learning rate over epochs from the entries of ``metrics.jsonl``."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for split, marker in (("train", ""), ("val", "o")):
        entries = [entry for entry in metrics if entry["split"] == split]
        epochs = [entry["epoch"] for entry in entries]
        for axis, key in zip(axes, ("loss", "top1")):
            axis.plot(epochs, [entry[key] for entry in entries], marker=marker, markersize=3, label=split)
        if split == "train":
            axes[2].plot(epochs, [entry["lr"] for entry in entries])
    for axis, title in zip(axes, ("loss", "top-1 accuracy, %", "learning rate")):
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].legend()
    return _save(figure, path)


def draw_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> Path:
    """Write :func:`confusion_figure` as PNG; returns its path."""
    return _save(confusion_figure(confusion, classes), path)


def confusion_figure(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """A confusion matrix, rows the true classes; each row's shares are colours, small ones also carry counts."""
    counts = np.asarray(confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = len(classes) <= 30
    figure = Figure(figsize=(7, 6), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(picture, label="share of the true class")
    axis.set(
        xlabel="predicted",
        ylabel="true",
        title=f"top-1 {100 * np.trace(counts) / max(counts.sum(), 1):.2f} %",
    )
    if few:
        names = [name.replace("$", r"\$") for name in classes]  # between dollars is mathematics to matplotlib
        axis.set_xticks(range(len(classes)), names, rotation=90 if max(map(len, classes)) > 3 else 0)
        axis.set_yticks(range(len(classes)), names)
        for row, column in zip(*np.nonzero(counts)):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color=colour)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return path
