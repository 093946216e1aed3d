"""Two steps of a recipe on made-up data, through the real trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from common.config import parse
from common.data.loader import Batch
from common.engine.setup import start_accelerator
from common.engine.trainer import Data, Trainer
from common.models.build import build_model

SAMPLES = 2
# Two epochs of one batch of two: the second step has a learning rate also where the warm-up begins at zero.
OVERRIDES = ("--train.epochs=2", "--train.batch_size=2", "--train.eval_every=2", "--train.eval_batch_size=2")
OVERRIDES += ("--log.every=1", "--log.tensorboard=false", "--checkpoint.every_minutes=0")


def parsed(config_class: Any, path: Any, *arguments: str) -> Any:
    """The recipe at ``path`` with command-line ``arguments`` over it."""
    return parse(config_class, [f"--config={path}", *arguments])[0]


def two_steps(config: Any, classes: int, shape: tuple[int, ...]) -> Trainer:
    """Train for two steps on inputs of ``shape`` (C, H, W), evaluate, and check what must be true of any recipe."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(SAMPLES, *shape), torch.arange(SAMPLES) % classes
    try:
        accelerator = start_accelerator(config)
        model = build_model(config.model, classes)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = Trainer(config, accelerator, model, made_up(inputs, targets, classes))
        evaluation = trainer.fit()
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
    assert (trainer.steps, trainer.progress.step, evaluation["samples"]) == (2, 2, SAMPLES)
    after = dict(trainer.plain_model.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    still = [name for name, p in before.items() if torch.equal(p, after[name])]
    assert len(still) < len(before) / 2, still
    return trainer


def made_up(inputs: torch.Tensor, targets: torch.Tensor, classes: int) -> Data:
    """The same batch in every step and in the evaluation."""

    def batches() -> Iterator[Batch]:
        yield Batch(inputs.clone(), targets)

    def forever(step: int) -> Iterator[Batch]:
        while True:
            yield from batches()

    train: Callable[[int], Iterator[Batch]] = forever
    return Data(len(inputs), tuple(map(str, range(classes))), train, batches, "made up", max_unreadable=0.0)
