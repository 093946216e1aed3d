"""Show a model, or the table of all published ones.

    python -m common.models resnet50_bat              layers, parameters, MACs, activations, input, accuracy, recipe
    python -m common.models --all                     every model of this project
    python -m common.models --write docs/models.md    that table as a file

NAME may be any model of timm's registry.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm

from common.config import Commands, nearest
from common.errors import ConfigError, run_main
from common.files import atomic_write
from common.models.table import (
    Row,
    activation_bytes,
    giga,
    import_models,
    input_size,
    layers,
    markdown,
    meta_model,
    read_rows,
)


def main() -> int:
    """Do what the command line says; returns the exit code."""
    arguments = _parser().parse_args()
    if arguments.num_classes is not None and arguments.num_classes < 1:
        raise ConfigError(f"--num-classes {arguments.num_classes}: expected at least 1")
    rows = read_rows()
    if arguments.write:
        with atomic_write(arguments.write) as file:
            file.write(markdown(rows).encode())
        print(f"written: {arguments.write}, {len(rows)} rows")
    elif arguments.all:
        print(overview(rows))
    else:
        import_models()
        print(describe(arguments.name, rows, arguments.num_classes))
    return 0


def overview(rows: list[Row]) -> str:
    """A line a row."""
    cells: list[tuple[str, ...]] = [("model", "classes", "parameters", "MACs", "top-1", "recipe")]
    for row in rows:
        top1 = "" if row.expect.top1 is None else f"{row.expect.top1:.2f}"
        cells.append((row.model, str(row.classes), f"{row.params:,}", giga(row.macs), top1, row.recipe))
    return _aligned(cells, left=(0, 5))


def describe(name: str, rows: list[Row], num_classes: int | None = None) -> str:
    """Everything about one model.

    Raises:
        ConfigError: there is no model of that name.
    """
    if not timm.is_model(name):
        raise ConfigError(f"{name!r}: no such model; {nearest(name, timm.list_models())}")
    model = meta_model(name, num_classes)
    whole, *parts = layers(model)
    cells: list[tuple[str, ...]] = [("layer", "kind", "output", "parameters", "MACs")]
    for layer in parts:
        shape = "×".join(map(str, layer.shape))
        cells.append((layer.name, layer.kind, shape, f"{layer.params:,}", giga(layer.macs)))
    lines = [
        f"{name}, {getattr(model, 'num_classes', '?')} classes",
        f"input       {'×'.join(map(str, input_size(model)))}",
        f"parameters  {whole.params:,}",
        f"MACs        {giga(whole.macs)}",
        f"activations {activation_bytes(model) / 2**20:.1f} MiB kept for the backward pass of one input, float32",
    ]
    for row in rows:
        if row.model == name and row.recipe:
            lines.append(f"published   {row.expect}, {row.classes} classes: {row.recipe}")
    return "\n".join([*lines, "", _aligned(cells, left=(0, 1, 2))])


def _aligned(cells: list[tuple[str, ...]], left: tuple[int, ...]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = (
        "  ".join(
            f"{cell:{'<' if i in left else '>'}{width}}" for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = Commands(
        prog="python -m common.models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("name", nargs="?", metavar="NAME", help="a model's name")
    what.add_argument("--all", action="store_true", help="list every model")
    what.add_argument("--write", type=Path, metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--num-classes", type=int, help="of the model NAME; its own by default")
    return parser


if __name__ == "__main__":
    run_main(main)
