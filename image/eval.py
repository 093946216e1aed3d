"""Evaluate an image classifier on the validation split.

    python image/eval.py RUN                       a run's newest checkpoint, on the run's own data
    python image/eval.py RUN/checkpoints/STEP      one of its checkpoints
    python image/eval.py FILE --model.name san10_pairwise --data.path DATA     published weights

Prints top-1, top-5, loss and per-class accuracy; writes them as JSON with a picture of the confusion matrix.
With a run, all settings are those of the run, and options given here override them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import image.models  # noqa: F401  (registers the models)
from common.config import Positional, parse
from common.engine.evaluate import evaluate
from common.engine.run import run_of, write_json
from common.engine.setup import start_accelerator
from common.errors import ConfigError, run_main
from common.models.build import build_model
from common.report.pictures import draw_confusion
from common.weights import load_weights
from image.train import Config, open_data

POSITIONAL = Positional("checkpoint", "A run's folder, one checkpoint's folder, or a file of weights.")


def main() -> int:
    """Evaluate as the command line says; returns the exit code."""
    argv = sys.argv[1:]
    run = run_of(argv[0]) if argv and not argv[0].startswith("-") else None
    recipe = run / "config.yaml" if run else None
    config, checkpoint = parse(
        Config, argv, default_recipe=recipe, positional=POSITIONAL, description=__doc__
    )
    if not Path(checkpoint).exists():
        raise ConfigError(
            f"{checkpoint!r} does not exist; expected a run's folder, a checkpoint, or a file of weights"
        )
    accelerator = start_accelerator(config.train)
    data = open_data(config, accelerator)
    model = build_model(config.model, len(data.classes))
    loaded = load_weights(model, checkpoint, strict=config.weights_strict)
    result = evaluate(
        model.to(accelerator.device),
        data.val(),
        len(data.classes),
        accelerator.device,
        autocast=accelerator.autocast,
    )
    assert result is not None
    if accelerator.is_main_process:
        print(loaded)
        show(result, data.classes)
        write(result | {"classes": data.classes, "checkpoint": checkpoint}, run or Path(config.out))
    accelerator.end_training()
    return 0


def show(result: dict[str, Any], classes: tuple[str, ...]) -> None:
    """Print the numbers, and the ten worst classes."""
    accuracies = [
        (accuracy, name) for accuracy, name in zip(result["per_class"], classes) if accuracy is not None
    ]
    worst = ", ".join(f"{name} {accuracy:.1f}" for accuracy, name in sorted(accuracies)[:10])
    print(f"per class, %, the worst first: {worst}{', …' if len(accuracies) > 10 else ''}")
    print(
        f"top1 {result['top1']:.2f} %, top5 {result['top5']:.2f} %, mean class {result['mean_class']:.2f} %, "
        f"loss {result['loss']:.4f} over {result['samples']} samples, {result['unreadable']} unreadable"
    )


def write(result: dict[str, Any], folder: Path) -> None:
    """Write the numbers and the confusion picture into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = write_json(folder / "eval.json", result)
    picture = draw_confusion(result["confusion"], result["classes"], folder / "eval_confusion.png")
    print(f"written: {numbers} and {picture}")


if __name__ == "__main__":
    run_main(main)
