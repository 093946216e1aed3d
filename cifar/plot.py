"""Draw the curves of several runs into one picture: ``python cifar/plot.py RUN… [--out STEM]``.

Writes STEM.png and STEM.svg and prints a table of each run's final and best evaluation. A RUN is a run's folder, or
any folder with TensorBoard event files that hold train/loss, train/top1, val/loss and val/top1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.config import Positional, parse
from common.errors import UserError, run_main
from common.report.compare import draw_histories, read_history, table

RUNS = Positional("runs", "Folders of runs.", many=True)


@dataclass
class Config:
    """Draw the curves of several runs into one picture."""

    out: str = "runs/curves"
    """Path of the pictures, without extension."""


def main() -> int:
    """Draw as the command line says; returns the exit code."""
    config, runs = parse(Config, positional=RUNS, description=__doc__)
    histories = [read_history(Path(run)) for run in runs]
    try:
        pictures = draw_histories(histories, Path(config.out))
    except OSError as error:
        raise UserError(f"out = {config.out!r}: cannot be written ({error.strerror})") from None
    print(table(histories))
    print(f"written: {', '.join(map(str, pictures))}")
    return 0


if __name__ == "__main__":
    run_main(main)
