"""What a finished run has come to, and where everything lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.engine.checkpoint import newest
from common.report.pictures import draw_run


def summarize(folder: Path, evaluation: dict[str, Any]) -> str:
    """Draw a run's pictures; returns lines for the user."""
    pictures = ", ".join(map(str, draw_run(folder)))
    return "\n".join(
        [
            f"validation accuracy {evaluation['top1']:.2f} % (top-1, {evaluation['samples']} samples)",
            f"  checkpoint   {newest(folder / 'checkpoints')}",
            f"  TensorBoard  {folder / 'tensorboard'}  (tensorboard --logdir {folder})",
            f"  pictures     {pictures}",
        ]
    )
