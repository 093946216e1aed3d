"""What the tasks' evaluation scripts share: the settings that go with a checkpoint, and what is shown and written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator

from common.config import Positional, parse
from common.data.quarantine import Quarantine
from common.engine.run import read_file, run_of, write_json
from common.errors import ConfigError
from common.recipes import given, recipes_of
from common.report.pictures import draw_confusion

CHECKPOINT = Positional("run", "A run's folder, one checkpoint's folder, or a file of weights.")

T = TypeVar("T")


def parse_checkpoint(
    cls: type[T], argv: Sequence[str], description: str | None
) -> tuple[T, str, Path | None]:
    """The settings of an evaluation: those of the checkpoint's run, and options over them.

    Args:
        cls: the task's configuration.
        argv: the checkpoint, then options.

    Returns:
        Settings, the checkpoint, and its run's folder (None for a file of weights).

    Raises:
        ConfigError: a setting is wrong, or the checkpoint does not exist.
    """
    config, checkpoint, run = parse_with_run(cls, argv, description, CHECKPOINT)
    check_exists(checkpoint)
    named = {word.split("=")[0] for word in argv} & {"--model.name", "--config"}
    if run is None and not named and Path(checkpoint).is_file():
        raise ConfigError(
            f"{checkpoint!r} is a file without a run: name its network by --model.name, or --config"
        )
    return config, checkpoint, run


def parse_with_run(
    cls: type[T], argv: Sequence[str], description: str | None, positional: Positional
) -> tuple[T, Any, Path | None]:
    """:func:`parse_checkpoint` with what is positional given, whose first word is the checkpoint; unchecked.

    The settings' ``out`` is the run's folder, unless the command line names another. Without a run the settings begin
    with the recipe of the network that the command line names, if it has one: its images were normalised as that says.
    """
    words = {word.split("=")[0] for word in argv}
    if not words & {"-h", "--help", "--print_config"} and (not argv or argv[0].startswith("-")):
        raise ConfigError(
            f"expected first {positional.help[0].lower()}{positional.help[1:-1]}; options behind it"
        )
    run = run_of(argv[0]) if argv and not argv[0].startswith("-") else None
    recipe = run / "config.yaml" if run else None
    own = [recipes_of(cls) / f"{name}.yaml" for name in given(argv, "--model.name")]
    if run is None and "--config" not in words and own and own[-1].is_file():
        argv = [f"--config={own[-1]}", *argv]
    try:
        config, value = parse(
            cls, argv, default_recipe=recipe, positional=positional, description=description
        )
    except ConfigError as error:
        if recipe and str(error).startswith(f"{recipe}: ") and "unknown key" in str(error):
            raise ConfigError(f"{error} Was the run made by another task's train.py?") from None
        raise
    if run and "--out" not in words:
        config.out = str(run)  # type: ignore[attr-defined]
    return config, value, run


def check_exists(checkpoint: str) -> None:
    """Raise a :class:`ConfigError` where ``checkpoint`` is not there."""
    if not Path(checkpoint).exists():
        raise ConfigError(
            f"{checkpoint!r} does not exist; expected a run's folder, a checkpoint, or a file of weights"
        )


def class_names(run: Path | None) -> list[str]:
    """The classes of a run's last evaluation; none where there was none."""
    evaluation = run / "evaluation.json" if run else None
    if evaluation is None or not evaluation.is_file():
        return []
    return list(read_file(evaluation)["classes"])


def new_quarantine(folder: Path, accelerator: Accelerator) -> Quarantine:
    """An empty list of what an evaluation cannot read, in ``folder``, which is made. All ranks call this."""
    path = folder / "eval_quarantine.jsonl"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return Quarantine(path, math.inf)


def show(result: dict[str, Any], classes: Sequence[str]) -> None:
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
