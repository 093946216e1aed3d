"""What the tasks' visualize.py share: from the command line to the pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.config import Positional
from common.errors import ConfigError
from common.evaluation import check_exists, class_names, parse_with_run
from common.models.build import build_model
from common.report.attention import draw_attention
from common.weights import load_weights


@dataclass
class PictureConfig:
    """What is drawn; a task's own settings come beside it."""

    top: int = 3
    """Classes whose maps are drawn, the likeliest first."""
    pixels: tuple[tuple[float, float], ...] = ((0.5, 0.5),)
    """Places to look from, as shares of height and width, such as [[0.5,0.5],[0.2,0.8]]."""
    num_classes: int = 1000
    """Classes of the network, where no run tells."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"top = {self.top}: expected at least 1")
        if not self.pixels or not all(0 <= share <= 1 for pixel in self.pixels for share in pixel):
            raise ValueError(f"pixels = {self.pixels}: expected pairs of shares, each 0 to 1")


def visualize(
    cls: type[Any],
    description: str | None,
    subject: str,
    read: Callable[[str, Any], Tensor],
    names: Callable[[Any], list[str]] = lambda config: [],
) -> int:
    """Draw as the command line says; returns the exit code.

    Args:
        cls: the task's settings, with those of :class:`PictureConfig`.
        description: of the command.
        subject: what is drawn: "image" or "video".
        read: a file's path and the settings → what the network sees of it.
        names: of the classes, where no run tells; as many as the network has, or none.

    Raises:
        UserError: a setting or a file is wrong.
    """
    words = Positional(
        "run", f"A run's folder, a checkpoint or a file of weights, then {subject}s.", many=True
    )
    config, (checkpoint, *files), run = parse_with_run(cls, sys.argv[1:], description, words)
    check_exists(checkpoint)
    if not files:
        raise ConfigError(f"no {subject} after {checkpoint!r}; expected CHECKPOINT {subject.upper()}...")
    inputs = [(path, read(path, config)) for path in files]
    classes = class_names(run)
    model = build_model(config.model, len(classes) or config.num_classes)
    print(load_weights(model, checkpoint, strict=config.weights_strict))
    folder = Path(config.out) / "attention"
    page, *pictures = draw_attention(
        model, inputs, classes or names(config), folder, config.top, config.pixels
    )
    print(f"written: {page}; pictures beside it: {len(pictures)}")
    return 0
