"""What the tasks' training scripts share: a run from its beginning, or its last checkpoint, to its pictures."""

from __future__ import annotations

import sys

from accelerate import Accelerator
from torch import nn

from common.engine.config import EngineConfig
from common.engine.preemption import STOPPED, Stopped
from common.engine.trainer import Data, Trainer
from common.errors import ConfigError
from common.report.summary import Expectation, summarize
from common.weights import architecture


def run_training(
    config: EngineConfig, accelerator: Accelerator, model: nn.Module, data: Data, expect: Expectation
) -> int:
    """Train ``model`` and print what came of it. All ranks call this; returns the script's exit code.

    Raises:
        ConfigError: the data have one class only.
    """
    if len(data.classes) < 2:
        raise ConfigError(
            f"data: there is one class only, {data.classes[0]!r}; a classifier needs two or more"
        )
    accelerator.print(opening(config, accelerator, model, data))
    if config.train.batch_size > data.samples:
        accelerator.print(
            f"warning: train.batch_size = {config.train.batch_size}: more than the {data.samples:,} training samples, "
            "of which each update sees some several times",
            file=sys.stderr,
        )
    trainer = Trainer(config, accelerator, model, data)
    try:
        evaluation = trainer.fit()
    except Stopped:
        return STOPPED
    finally:
        accelerator.end_training()
    if accelerator.is_main_process:
        print(summarize(trainer.run.folder, evaluation, expect))
    return 0


def opening(config: EngineConfig, accelerator: Accelerator, model: nn.Module, data: Data) -> str:
    """One line before training: which network, on what, where, and the run's folder."""
    name = next(filter(None, map(architecture, model.modules())), type(model).__name__)
    parameters = sum(p.numel() for p in model.parameters())
    processes = f"{accelerator.num_processes} processes, " if accelerator.num_processes > 1 else ""
    return (
        f"{name}, {parameters:,} parameters; {data.samples:,} training samples of {len(data.classes):,} classes; "
        f"{processes}{accelerator.device.type}, {config.train.precision}; run in {config.out}"
    )
