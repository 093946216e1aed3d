"""A run's weights as one file: `python -m common.engine.consolidate RUN OUT.safetensors`.

    python -m common.engine.consolidate runs/digits digits.safetensors           the newest undamaged checkpoint
    python -m common.engine.consolidate RUN/checkpoints/STEP weights.safetensors one of its checkpoints
    python -m common.engine.consolidate RUN plain.safetensors --plain            not the averaged weights (EMA)

A checkpoint in parts (FSDP, ZeRO) is put together here, with no GPU, no second process, and without building the
network. `--weights`, `image/eval.py` and timm's `checkpoint_path` load what it writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import save

from common.engine.checkpoint import damage, holds, load, newest, step_of
from common.engine.run import read_file, run_of
from common.errors import ConfigError, UserError, run_main
from common.files import atomic_write


def main() -> int:
    """Do what the command line says; returns the exit code."""
    arguments = _parser().parse_args()
    print(consolidate(arguments.run, arguments.out, arguments.plain))
    return 0


def consolidate(source: Path, out: Path, plain: bool = False) -> str:
    """Write the weights of a run to ``out``, with model, run and step as metadata; returns a line for the user.

    Args:
        source: a run's folder, or one of its checkpoints.
        out: a name that ends in ``.safetensors``; a file there is replaced.
        plain: the weights themselves, also where there are averaged ones (EMA).

    Raises:
        UserError: there is no run or no undamaged checkpoint, or ``out`` cannot be written.
    """
    run, checkpoint = _find(source)
    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise ConfigError(f"{str(out)!r}: expected a name that ends in .safetensors, in a folder that exists")
    averaged = not plain and holds(checkpoint, "ema")
    state = load(checkpoint, "ema.safetensors" if averaged else "model.safetensors")
    model = str(read_file(run / "config.yaml")["model"]["name"])
    about = {"format": "pt", "model": model, "run": run.name, "step": str(step_of(checkpoint))}
    try:
        with atomic_write(out) as file:
            file.write(save(state, about))
    except OSError as error:
        raise UserError(f"{str(out)!r}: not written ({error.strerror})") from None
    kind = "averaged weights (EMA)" if averaged else "weights"
    return f"written: {out}, {kind} of {model} at step {about['step']}, {len(state)} tensors"


def _find(source: Path) -> tuple[Path, Path]:
    run = run_of(source)
    if run is None:
        raise ConfigError(
            f"{str(source)!r}: expected a run's folder (it has a config.yaml) or one of its checkpoints"
        )
    if source.resolve() != run.resolve() and source.name.startswith("step-"):
        problem = damage(source)
        if problem:
            raise UserError(f"{source} is damaged ({problem})")
        return run, source
    checkpoint = newest(run / "checkpoints")
    if checkpoint is None:
        raise UserError(f"{run}: no undamaged checkpoint in {run / 'checkpoints'}")
    return run, checkpoint


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m common.engine.consolidate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("out", metavar="OUT", type=Path, help="the safetensors file to write")
    parser.add_argument("--plain", action="store_true", help="not the averaged weights, where there are any")
    return parser


if __name__ == "__main__":
    run_main(main)
