"""Evaluate an image classifier on the validation split.

    python image/eval.py RUN                       a run's newest checkpoint, on the run's own data
    python image/eval.py RUN/checkpoints/STEP      one of its checkpoints
    python image/eval.py FILE --model.name san10_pairwise --data.path DATA     published weights

Prints top-1, top-5, loss and per-class accuracy; writes them as JSON with a picture of the confusion matrix.
With a run, all settings are those of the run; with a file of weights, those of the recipe of the network's name, if
there is one. Options given here override them. The files go to the run's folder, or to --out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import image.models  # noqa: F401  (registers the models)
from common.data.quarantine import describe
from common.engine.evaluate import evaluate
from common.engine.setup import start_accelerator
from common.errors import run_main
from common.evaluation import new_quarantine, parse_checkpoint, show, write
from common.models.build import build_model, refuse_misfit
from common.weights import load_weights
from image.train import Config, open_data


def main() -> int:
    """Evaluate as the command line says; returns the exit code."""
    config, checkpoint, _ = parse_checkpoint(Config, sys.argv[1:], __doc__)
    accelerator = start_accelerator(config, training=False)
    data = open_data(config, accelerator)
    model, folder = build_model(config.model, len(data.classes)), Path(config.out)
    refuse_misfit(model, config.augment.size, "augment.size")
    loaded = load_weights(model, checkpoint, strict=config.weights_strict)
    unreadable = new_quarantine(folder, accelerator)
    result = evaluate(
        model.to(accelerator.device),
        data.val(),
        len(data.classes),
        accelerator.device,
        autocast=accelerator.autocast,
        on_unreadable=lambda samples: unreadable.add(samples, training=False),
    )
    assert result is not None
    if accelerator.is_main_process:
        print(loaded)
        show(result, data.classes)
        if result["unreadable"]:
            print(f"{describe(unreadable.path)}; they count as wrong")
        write(result | {"classes": data.classes, "checkpoint": checkpoint}, folder)
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_main(main)
