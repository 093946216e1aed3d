"""Convert published checkpoints to safetensors under this project's names.

    python -m common.weights convert IN OUT.safetensors --model NAME
    python -m common.weights --list

IN is a checkpoint of PyTorch (any version from 0.1.10 on) or a safetensors file, in the published layout.
OUT holds the same weights under the names of NAME's state dict, and the model's and IN's names as metadata.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
from safetensors.torch import save

from common.config import Commands, nearest
from common.errors import ConfigError, run_main
from common.files import atomic_write
from common.models.table import import_models, read_rows
from common.weights import load_published, translated_models


def main() -> int:
    """Do what the command line says; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.list:
        import_models()
        print("\n".join(listing()))
    elif arguments.command == "convert":
        import_models()
        print(convert(arguments.source, arguments.target, arguments.model, arguments.num_classes))
    else:
        parser.error("expected convert or --list")
    return 0


def convert(source: Path, target: Path, name: str, num_classes: int | None = None) -> str:
    """Write the published checkpoint ``source`` of the model ``name`` to ``target``; returns a line for the user.

    Raises:
        UserError: no such model, the checkpoint cannot be read or does not fit it, or ``target`` cannot be written.
    """
    if not timm.is_model(name):
        raise ConfigError(f"--model {name!r}: no such model; {nearest(name, timm.list_models())}")
    if num_classes is not None and num_classes < 1:
        raise ConfigError(f"--num-classes {num_classes}: expected at least 1")
    if target.suffix != ".safetensors" or not target.parent.is_dir():
        raise ConfigError(
            f"{str(target)!r}: expected a name that ends in .safetensors, in a folder that exists"
        )
    model = timm.create_model(name, **({} if num_classes is None else {"num_classes": num_classes}))
    load_published(model, source)
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    with atomic_write(target) as file:
        file.write(save(state, {"format": "pt", "model": name, "source": source.name}))
    return f"written: {target}, {len(state)} tensors of {name}"


def listing() -> list[str]:
    """A line a model: its name, and what its published weights are."""
    papers = {row.model: row.paper for row in read_rows()}
    translated = translated_models()
    names = dict.fromkeys([*papers, *translated])
    width = max(map(len, names))
    lines = []
    for name in names:
        what = "published names are translated" if name in translated else "published names are ours"
        if papers.get(name) == "FBN":
            what = "MXNet's published names are translated, its .params files not read"
        lines.append(f"{name:<{width}}  {what}")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = Commands(
        prog="python -m common.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--list", action="store_true", help="list the models, and how their published weights are read"
    )
    commands = parser.add_subparsers(dest="command")
    converts = commands.add_parser("convert", help="convert a published checkpoint")
    converts.add_argument("source", metavar="IN", type=Path, help="the published checkpoint")
    converts.add_argument("target", metavar="OUT", type=Path, help="the safetensors file to write")
    converts.add_argument("--model", required=True, metavar="NAME", help="the checkpoint's model")
    converts.add_argument(
        "--num-classes", type=int, help="of the checkpoint; the model's own number by default"
    )
    return parser


if __name__ == "__main__":
    run_main(main)
