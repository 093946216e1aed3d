"""What a finished run has come to, and where everything lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.engine.checkpoint import newest
from common.report.pictures import draw_run


@dataclass
class Expectation:
    """The accuracy that was published for a recipe; shown, and used nowhere."""

    top1: float | None = None
    """Top-1 validation accuracy, %."""
    top5: float | None = None
    """Top-5 validation accuracy, %."""
    note: str = ""
    """What else one has to know about these numbers."""

    def __str__(self) -> str:
        named = (("top-1", self.top1), ("top-5", self.top5))
        numbers = ", ".join(f"{name} {value:g} %" for name, value in named if value is not None)
        return " ".join(filter(None, [numbers, f"({self.note})" if self.note else ""]))


def summarize(folder: Path, evaluation: dict[str, float], expect: Expectation | None = None) -> str:
    """Draw a run's pictures; returns lines for the user."""
    published = [f"  published    {expect}"] if expect and str(expect) else []
    pictures = ", ".join(map(str, draw_run(folder)))
    return "\n".join(
        [
            f"validation accuracy {evaluation['top1']:.2f} % (top-1, {evaluation['samples']} samples)",
            *published,
            f"  checkpoint   {newest(folder / 'checkpoints')}",
            f"  TensorBoard  {folder / 'tensorboard'}  (tensorboard --logdir {folder})",
            f"  pictures     {pictures}",
        ]
    )
