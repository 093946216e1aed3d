"""What the tasks' training scripts share: a run from its beginning, or its last checkpoint, to its pictures."""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from common.engine.config import EngineConfig
from common.engine.preemption import STOPPED, Stopped
from common.engine.trainer import Data, Trainer
from common.report.summary import Expectation, summarize


def run_training(
    config: EngineConfig, accelerator: Accelerator, model: nn.Module, data: Data, expect: Expectation
) -> int:
    """Train ``model`` and print what came of it. All ranks call this; returns the script's exit code."""
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
