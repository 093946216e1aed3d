"""Evaluate classifiers of small images, one or several, on the validation split.

    python cifar/eval.py RUN                       a run's newest checkpoint, on the run's own data
    python cifar/eval.py RUN0 RUN1 RUN2            several, and the mean and deviation of their errors
    python cifar/eval.py RUN --tta mirror          logits averaged over image and mirror image
    python cifar/eval.py FILE --model.name resnet164_fbn --data.path DATA     a file of weights

Prints error, accuracy and the classes' accuracies; writes them as JSON with a picture of the confusion matrix. With a
run, all settings are those of the run, and options given here override them. The files go to the run's folder, or
to --out.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from torch import Tensor, nn

from cifar.train import Config, open_validation
from common.data.memory import evaluation_batches
from common.engine.evaluate import evaluate
from common.engine.run import write_json
from common.engine.setup import start_accelerator
from common.errors import ConfigError, run_main
from common.evaluation import parse_checkpoint, show, write
from common.models.build import build_model
from common.weights import load_weights


@dataclass
class EvalConfig(Config):
    """Evaluate classifiers of small images."""

    tta: Literal["none", "mirror"] = "none"
    """Test-time augmentation: mirror averages the logits of an image and its mirror image."""
    summary: str | None = None
    """File to write the numbers of all checkpoints to, with mean and deviation, as JSON."""


class Mirrored(nn.Module):
    """The mean of a network's logits for images (N, C, H, W) and their mirror images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return (self.model(x) + self.model(x.flip(-1))) / 2


def main() -> int:
    """Evaluate as the command line says; returns the exit code."""
    argv = sys.argv[1:]
    count = next((number for number, word in enumerate(argv) if word.startswith("-")), len(argv))
    checkpoints, options = argv[:count], argv[count:]
    jobs = [parse_checkpoint(EvalConfig, [*words, *options], __doc__) for words in zip(checkpoints)]
    if not jobs:  # --help, or what is missing
        jobs = [parse_checkpoint(EvalConfig, options, __doc__)]
    if len(jobs) > 1 and any(word.split("=")[0] == "--out" for word in options):
        raise ConfigError("out: several checkpoints' numbers go to their runs' folders; leave --out away")
    first = jobs[0][0]
    if any(config.train.precision != first.train.precision for config, *_ in jobs):
        raise ConfigError("train.precision: the runs' differ; give one for all, as --train.precision fp32")
    accelerator = start_accelerator(first, training=False)
    results = {checkpoint: evaluate_one(config, checkpoint, accelerator) for config, checkpoint, _ in jobs}
    if accelerator.is_main_process:
        conclude(results, first)
    accelerator.end_training()
    return 0


def evaluate_one(config: EvalConfig, checkpoint: str, accelerator: Accelerator) -> dict[str, Any]:
    """Evaluate one checkpoint; shows and writes its numbers, which it returns."""
    data = open_validation(config).to(accelerator.device)
    model = build_model(config.model, len(data.classes))
    loaded = load_weights(model, checkpoint, strict=config.weights_strict)
    model = (Mirrored(model) if config.tta == "mirror" else model).to(accelerator.device)
    world, rank = accelerator.num_processes, accelerator.process_index
    batches = evaluation_batches(data, config.augment, -(-config.train.eval_batch_size // world), world, rank)
    result = evaluate(model, batches(), len(data.classes), accelerator.device, autocast=accelerator.autocast)
    assert result is not None
    result |= {
        "error": 100 - result["top1"],
        "tta": config.tta,
        "classes": data.classes,
        "checkpoint": checkpoint,
    }
    if accelerator.is_main_process:
        print(loaded)
        show(result, data.classes)
        write(result, Path(config.out))
    return result


def conclude(results: dict[str, dict[str, Any]], config: EvalConfig) -> None:
    """Print error and accuracy, of several checkpoints their mean and deviation; write the summary."""
    errors = [result["error"] for result in results.values()]
    text = spread(errors)
    print(f"error {text} %, accuracy {spread([100 - error for error in errors])} %")
    if config.summary:
        numbers = {key: {"error": result["error"], "loss": result["loss"]} for key, result in results.items()}
        deviation = statistics.stdev(errors) if len(errors) > 1 else None
        content = {"mean_error": statistics.mean(errors), "deviation": deviation, "checkpoints": numbers}
        try:
            write_json(Path(config.summary), content)
        except OSError as error:
            raise ConfigError(f"summary = {config.summary!r}: cannot be written ({error.strerror})") from None


def spread(values: Sequence[float]) -> str:
    """``mean ± sample deviation (n runs)``, or the one number."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)} runs)"


if __name__ == "__main__":
    run_main(main)
