"""The table of models: exact counts in ``models.csv``, published accuracies in the recipes; and counting itself.

``models.csv`` has a row a recipe, and one a model that has none. Its columns: ``recipe`` (the file, from the
repository's root), ``model``, ``classes``, ``params`` (trainable scalars), ``macs`` (multiply-accumulates of one input,
see :func:`counted_macs`), ``paper`` (a key of ``PAPERS``), and the paper's own rounded figures,
``paper_params`` and ``paper_macs``, which may be empty.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.attention.san import SelfAttention
from common.report.summary import Expectation

ROOT = Path(__file__).parents[2]
TASKS = ("image", "cifar", "video")
PAPERS = {
    "BAT": "Bilinear attentional transforms and non-local blocks (Chi et al., CVPR 2020)",
    "SAN": "Self-attention networks (Zhao, Jia and Koltun, CVPR 2020)",
    "NOAH": "Non-global attentive heads (Li, Zhou and Yao)",
    "FBN": "Factorized bilinear networks (Li et al., arXiv 1611.05709)",
}
_NUMBERS = ("classes", "params", "macs")


@dataclass
class Row:
    """A row of ``models.csv``."""

    recipe: str
    model: str
    classes: int
    params: int
    macs: int
    paper: str
    paper_params: str
    paper_macs: str

    @cached_property
    def expect(self) -> Expectation:
        """The published accuracy, from the recipe."""
        if not self.recipe:
            return Expectation()
        return Expectation(**yaml.safe_load((ROOT / self.recipe).read_text()).get("expect", {}))


@dataclass
class Layer:
    """What a part of a network is and costs."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """Of its output, without the batch."""
    params: int
    macs: int = 0


def import_models() -> None:
    """Register the models of every task in timm's registry."""
    # By name, because imports run one way: common knows no task, and must work where one is not installed.
    for task in TASKS:
        if importlib.util.find_spec(task) and importlib.util.find_spec(f"{task}.models"):
            importlib.import_module(f"{task}.models")


def read_rows() -> list[Row]:
    """All rows of the table."""
    rows = []
    with Path(__file__).with_name("models.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            values: dict[str, Any] = {k: int(v) if k in _NUMBERS else v for k, v in row.items()}
            rows.append(Row(**values))
    return rows


def meta_model(name: str, num_classes: int | None = None, **kwargs: Any) -> nn.Module:
    """The model in evaluation mode on torch's ``meta`` device: shapes without numbers, so nothing is computed."""
    classes = {} if num_classes is None else {"num_classes": num_classes}
    with torch.device("meta"):
        return timm.create_model(name, **classes, **kwargs).eval()


def count_params(model: nn.Module) -> int:
    """Trainable scalars."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def input_size(model: nn.Module) -> tuple[int, ...]:
    """Of one input, channels first: (C, H, W), for video (C, T, H, W) with the published clips' T = 8."""
    cfg: Any = model.pretrained_cfg
    channels, *space = cfg["input_size"]
    video = any(isinstance(module, nn.Conv3d) for module in model.modules())
    return (channels, 8, *space) if video else (channels, *space)


def count_macs(model: nn.Module) -> int:
    """Multiply-accumulates of one input of the model's own size; see :func:`counted_macs`."""
    return layers(model)[0].macs


def activation_bytes(model: nn.Module) -> int:
    """What a training step keeps of one float32 input for the backward pass, in bytes, by a :func:`meta_model`.

    Counted where tensors are saved, each memory once, weights and buffers not at all. What modules hold only while they
    run, and what the allocator adds, comes on top.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}  # the storages themselves: a freed one's address may come again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    # Two inputs, since batch norm refuses to train on one position.
    pair = torch.empty(2, *input_size(model), device=next(model.parameters()).device)
    training = model.training
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.train()(pair)
    finally:
        model.train(training)
    return sum(storage.nbytes() for storage in kept.values()) // 2


@contextmanager
def counted_macs(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Count multiply-accumulates; gives a function that tells how many there were so far.

    Convolutions, linear layers, matrix products, and the aggregation of self-attention modules count; norms,
    activations, pooling and weighted sums (as in NOAH's head) do not.
    """
    aggregation = 0

    def aggregated(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal aggregation
        aggregation += output.numel() * int(module.kernel_size) ** 2  # type: ignore[arg-type]

    modules = [module for module in model.modules() if isinstance(module, SelfAttention)]
    handles = [module.register_forward_hook(aggregated) for module in modules]
    # torch's counter looks for a gradient function of whatever needs a gradient and is a module's input.
    trained = [p.requires_grad_(False) for p in model.parameters() if p.requires_grad]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            yield lambda: flops.get_total_flops() // 2 + aggregation
    finally:
        for parameter in trained:
            parameter.requires_grad_()
        for handle in handles:
            handle.remove()


def layers(model: nn.Module) -> list[Layer]:
    """The whole network, under the name "", then its parts and their parts; what costs nothing is left out."""
    found: dict[str, Layer] = {}
    before: dict[str, int] = {}

    def enter(name: str, *_: Any) -> None:
        before[name] = so_far()

    def leave(name: str, module: nn.Module, _: Any, output: Any) -> None:
        shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()
        layer = found.setdefault(name, Layer(name, type(module).__name__, shape, params[name]))
        layer.macs += so_far() - before[name]

    parts = {name: part for name, part in model.named_modules() if name.count(".") < 2}
    params = {name: count_params(part) for name, part in parts.items()}
    with counted_macs(model) as so_far:
        handles = [part.register_forward_pre_hook(partial(enter, name)) for name, part in parts.items()]
        handles += [part.register_forward_hook(partial(leave, name)) for name, part in parts.items()]
        try:
            model(torch.empty(1, *input_size(model), device=next(model.parameters()).device))
        finally:
            for handle in handles:
                handle.remove()
    ran = (found[name] for name in parts if name in found)
    return [layer for layer in ran if layer.params or layer.macs]


def markdown(rows: list[Row]) -> str:
    """The table as ``docs/models.md``."""
    lines = [_INTRODUCTION]
    for key, title in PAPERS.items():
        lines += [f"## {title}\n", *_HEAD]
        lines += [_line(row) for row in rows if row.paper == key]
        lines.append("")
    return "\n".join(lines)


_INTRODUCTION = """\
# Models

Made by `python -m common.models --write docs/models.md`. `python -m common.models NAME` shows one model's layers.

Parameters are trainable scalars. MACs are the multiply-accumulates of one input of the model's own size: those of
convolutions, linear layers, matrix products and self-attention's aggregation. "Paper" gives the paper's figures. Where
its parameters differ, the published program has those of this table; SAN's paper also counts norms, activations and
pooling. Accuracies are the published ones, in per cent, and also stand in the recipes; a model without a recipe
has no published result.
"""
_HEAD = (
    "| model | classes | parameters | MACs | paper | top-1 | top-5 | recipe |",
    "|---|--:|--:|--:|--:|--:|--:|---|",
)


def _line(row: Row) -> str:
    accuracies = ("" if value is None else f"{value:.2f}" for value in (row.expect.top1, row.expect.top5))
    recipe = f"[{Path(row.recipe).name}](../{row.recipe})" if row.recipe else ""
    paper = ", ".join(filter(None, (row.paper_params, row.paper_macs)))
    cells = (f"`{row.model}`", row.classes, f"{row.params:,}", giga(row.macs), paper, *accuracies, recipe)
    return f"| {' | '.join(map(str, cells))} |"


def giga(macs: int) -> str:
    """``5386389088`` → ``5.386 G``."""
    return f"{macs / 1e9:.3f} G"
