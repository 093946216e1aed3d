"""Every model as ONNX and as a torch.export file: `nice python benchmarks/export_all.py` (most of an hour of one core).

Each registered model, at full depth, width and input size, is exported, read again and compared with torch on batches
of one and of three, by onnxruntime and by torch.export. Weights are random, and such that no part is idle: what starts
at zero is drawn too, and batch norms know the statistics of some inputs. Hundreds of layers so drawn magnify rounding:
where a difference is above 1e-4, torch's own from float64 is measured too. Each has a process of its own; memory is
its peak. Names behind the command do those alone. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from common.environment import environment
from common.export import difference, encoded
from common.models.table import import_models, input_size, read_rows

TIMM = set(timm.list_models())
# Inputs that batch norms see. The patchwise weights multiply their own input: with the statistics of two alone, 19
# layers of them overflow on a third.
SEEN = {"san19_patchwise": 8}


def main() -> None:
    """Export, compare, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; all by default")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/export.json"))
    arguments = parser.parse_args()
    import_models()
    there = json.loads(arguments.out.read_text())["results"] if arguments.out.is_file() else {}
    results = {name: row for name, row in there.items() if passed(row)}
    names = [name for name in arguments.names or registered() if name not in results]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as processes:
        for name, row in zip(names, processes.imap(measured, names)):
            results[name] = row
            print(name, json.dumps(row), flush=True)
            write(results, arguments.out)
    failed = [name for name, row in results.items() if not passed(row)]
    print(
        f"{len(results)} of {len(registered())} models in {arguments.out}, {len(failed)} failed {failed or ''}"
    )


def write(results: dict[str, dict[str, Any]], out: Path) -> None:
    """Write what is known so far."""
    content = {"results": dict(sorted(results.items())), "precision": "fp32"}
    content |= {"device": "CPU, one thread"} | environment("onnx", "onnxscript", "onnxruntime")
    out.write_text(json.dumps(content, indent=1) + "\n")


def registered() -> list[str]:
    """Ours, and timm's own in the table of models."""
    ours = set(timm.list_models()) - TIMM
    return sorted(ours | {row.model for row in read_rows()})


def passed(row: dict[str, Any]) -> bool:
    """Whether both files gave torch's logits, but for rounding."""
    return "error" not in row and max(row["onnx"], row["pt2"]) <= max(1e-4, 3 * row.get("rounding", 0))


def measured(name: str) -> dict[str, Any]:
    """What exporting a model gave, or why it failed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row: dict[str, Any] = {}
    try:
        model = timm.create_model(name)
        size = tuple(input_size(model))
        awaken(model, size, SEEN.get(name, 2))
        row["size"] = size
        for suffix in (".onnx", ".pt2"):
            begun = time.process_time()
            content = encoded(model, suffix, size, {"model": name})
            row[f"{suffix[1:]}_seconds"] = round(time.process_time() - begun, 1)
            row[f"{suffix[1:]}_mib"] = round(len(content) / 2**20, 1)
            row[suffix[1:]] = float(f"{difference(content, suffix, model, size):.1e}")
        if max(row["onnx"], row["pt2"]) > 1e-4:
            row["rounding"] = float(f"{rounding(model, size):.1e}")
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:500]
    row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return row


def rounding(model: nn.Module, size: tuple[int, ...]) -> float:
    """The largest difference of torch's logits from those in float64, as a share of the largest. Changes the model."""
    images = torch.randn(3, *size)
    with torch.no_grad():
        logits = model(images)
        exact = model.double()(images.double())
    return float((logits - exact).abs().max() / exact.abs().max())


def awaken(model: nn.Module, size: tuple[int, ...], seen: int) -> None:
    """Draw the weights that start at zero, which would hide what is behind them; let batch norms see some inputs."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
        for parameter in module.parameters(recurse=False):
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        model.train()(torch.randn(seen, *size))
    model.eval()


if __name__ == "__main__":
    main()
