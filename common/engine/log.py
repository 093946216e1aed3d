"""Progress for people (a live bar on a terminal, else plain lines) and for machines (TensorBoard, metrics.jsonl)."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from common.engine.board import Board
from common.engine.run import Run, read_metrics
from common.files import append_line


@dataclass
class LogConfig:
    """What is reported, and how often."""

    every: int = 20
    """Steps between log entries; only they wait for the device."""
    tensorboard: bool = True
    """Whether to write TensorBoard event files."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every = {self.every}: expected at least 1")


class Log:
    """The log of a run; silent on all but the main process."""

    def __init__(self, run: Run, config: LogConfig, steps: int, start: int, main: bool) -> None:
        self.run, self.steps, self.main = run, steps, main
        self.board: Board | None = None
        self.bar: Progress | None = None
        if not main:
            return
        if config.tensorboard:
            # What an earlier process wrote of this step is hidden too: its evaluation may come again.
            self.board = Board(run.folder / "tensorboard", start)
            for entry in read_metrics(run.folder):
                if entry["step"] == start:
                    self._draw(entry)
        console = Console(file=sys.stdout)
        if console.is_terminal:
            self.bar = Progress(BarColumn(20), TextColumn("{task.description}"), console=console)
            self.bar.start()
            self.task = self.bar.add_task(f"step {start}/{steps}", total=steps, completed=start)

    def train(self, step: int, epoch: float, values: dict[str, float], eta: float) -> None:
        """Report a training interval; ``eta`` in seconds."""
        if not self.main:
            return
        self._record("train", step, epoch, values)
        line = (
            f"epoch {epoch:.2f} step {step}/{self.steps} eta {_clock(eta)} "
            f"loss {values['loss']:.4f} top1 {values['top1']:.2f} lr {values['lr']:.4g} "
            f"{values['samples_per_s']:.0f} samples/s ({values['compute_samples_per_s']:.0f} compute) "
            f"waiting {values['data_wait']:.0%} {values['memory_gib']:.2f} GiB"
        )
        if self.bar:
            self.bar.update(self.task, completed=step, description=line)
        else:
            print(line, flush=True)

    def evaluation(self, step: int, epoch: float, values: dict[str, Any]) -> None:
        """Report an evaluation."""
        if not self.main:
            return
        scalars = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        self._record("val", step, epoch, scalars)
        self.say(
            f"epoch {epoch:.2f} step {step} validation: top1 {values['top1']:.2f} top5 {values['top5']:.2f} "
            f"loss {values['loss']:.4f} ({values['samples']} samples, {values['unreadable']} unreadable)"
        )

    def say(self, line: str) -> None:
        """Print a line on the main process, above the bar."""
        if self.bar:
            self.bar.console.print(line, markup=False, highlight=False)
        elif self.main:
            print(line, flush=True)

    def close(self) -> None:
        """Stop the bar and close the event file."""
        if self.bar:
            self.bar.stop()
        if self.board:
            self.board.close()

    def _record(self, split: str, step: int, epoch: float, values: dict[str, Any]) -> None:
        about = {"split": split, "step": step, "epoch": round(epoch, 6), "time": round(time.time(), 3)}
        append_line(self.run.metrics, about | values)
        if self.board:
            self._draw(about | values)

    def _draw(self, entry: dict[str, Any]) -> None:
        assert self.board
        values = {key: value for key, value in entry.items() if key not in ("split", "step", "epoch", "time")}
        scalars = {f"{entry['split']}/{key}": value for key, value in values.items()}
        self.board.add(entry["step"], entry["time"], scalars)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
