"""Pictures of what a network attends to, from :mod:`common.report.maps`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from common.files import atomic_write
from common.report import html
from common.report.evidence import evidence, on_inputs
from common.report.maps import (
    Affinities,
    ClassMaps,
    Footprints,
    Maps,
    Pairs,
    TimeTransforms,
    Transforms,
    attention_maps,
)

HEADS = 8  # drawn at most
_SIGNS = ListedColormap(["dodgerblue", "red"])


@dataclass
class Evidence:
    """What BAT's and SAN's modules together give to some classes: log-odds a pixel, for and against."""

    weights: Tensor
    """(classes, T, H, W)"""


@dataclass
class Subject:
    """What the maps are of."""

    images: np.ndarray
    """(T, H, W, 3) of 0 to 1: the frames, one for an image."""
    classes: Sequence[str]
    best: Sequence[int]
    """The classes with the highest logits."""
    pixels: Sequence[tuple[float, float]]
    """Places to look from: shares of height and width, each 0 to 1."""

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """The image's edges for matplotlib."""
        return (0, self.images.shape[2], self.images.shape[1], 0)


def subject_of(
    inputs: Tensor, logits: Tensor, classes: Sequence[str], top: int, pixels: Sequence[tuple[float, float]]
) -> Subject:
    """A subject from a network's input (C, [T,] H, W), its colours stretched to what can be seen, and its logits."""
    frames = inputs.detach().cpu().float()
    frames = frames.transpose(0, 1) if frames.ndim == 4 else frames[None]
    frames = frames.permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    low, high = frames.amin(), frames.amax()
    images = ((frames - low) / (high - low).clamp_min(1e-6)).numpy()
    return Subject(images, classes, logits.topk(min(top, len(logits))).indices.tolist(), pixels)


def draw_attention(
    model: nn.Module,
    inputs: Sequence[tuple[str, Tensor]],
    classes: Sequence[str],
    folder: Path,
    top: int = 3,
    pixels: Sequence[tuple[float, float]] = ((0.5, 0.5),),
) -> list[Path]:
    """Draw what ``model`` attends to in each input: a PNG a module, and ``index.html`` that holds all of them.

    Args:
        inputs: a name and what the network sees of it, (C, H, W) or (C, T, H, W), on the model's device.
        classes: their names.
        folder: for the files; made if missing.
        top: of how many classes the class-wise maps are drawn.
        pixels: see :class:`Subject`.

    Returns:
        The paths, the page first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    parts: list[str] = []
    for number, (name, x) in enumerate(inputs):
        logits, maps = attention_maps(model, x[None])
        subject = subject_of(x, logits, classes, top, pixels)
        drawn = [*_evidence(model, x, subject), *maps]
        shares = logits.softmax(0)
        parts += [html.heading(name), _predictions(subject, shares.tolist())]
        parts += [] if maps else [html.paragraph("The network has none of the mechanisms.")]
        for caption, figure in _figures(drawn, subject):
            png = html.png_of(figure)
            path = folder / f"{number}-{len(paths)}-{maps_name(caption)}.png"
            with atomic_write(path) as file:
                file.write(png)
            paths.append(path)
            parts.append(html.picture(png, caption))
    return [html.write_page(folder / "index.html", "What the network attends to", parts), *paths]


def _evidence(model: nn.Module, x: Tensor, subject: Subject) -> list[Evidence]:
    targets = torch.tensor(subject.best, device=x.device)
    _, shares = evidence(model, x.expand(len(targets), *x.shape), targets)
    weights = [on_inputs(shares, tuple(x.shape[1:]))] if shares else []
    return [Evidence(each if each.ndim == 4 else each[:, None]) for each in weights]


def maps_name(caption: str) -> str:
    """The module's name in a caption, fit for a file's name."""
    return caption.split(":")[0].replace("/", "-") or "model"


def _predictions(subject: Subject, shares: Sequence[float]) -> str:
    figure = Figure(figsize=(2, 2))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(subject.images[len(subject.images) // 2])
    axis.axis("off")
    words = "; ".join(f"{_class(subject, index)}: {shares[index]:.1%}" for index in subject.best)
    return html.samples([(html.png_of(figure), words)])


def _class(subject: Subject, index: int) -> str:
    return subject.classes[index] if index < len(subject.classes) else str(index)


def _figures(maps: Sequence[Maps | Evidence], subject: Subject) -> Iterator[tuple[str, Figure]]:
    stages = {m.name.rsplit(".", 2)[0]: m for m in maps if isinstance(m, Footprints)}
    for each in maps:
        if not isinstance(each, Footprints) or stages[each.name.rsplit(".", 2)[0]] is each:
            yield from _draw(each, subject)


@singledispatch
def _draw(maps: Any, subject: Subject) -> Iterator[tuple[str, Figure]]:
    """Captions, which begin with the module's name, and pictures."""
    raise TypeError(type(maps).__name__)


@_draw.register
def _(maps: Evidence, subject: Subject) -> Iterator[tuple[str, Figure]]:
    classes, times = maps.weights.shape[:2]
    figure, axes = _axes(*((classes, times) if times > 1 else (times, classes)))
    for index, weights, line in zip(subject.best, maps.weights.cpu(), axes if times > 1 else axes.T):
        name = _plain(_class(subject, index))
        line[0].set(**({"ylabel": name} if times > 1 else {"title": name}))
        weights = weights / weights.abs().max().clamp_min(1e-30)
        for time, (axis, weight) in enumerate(zip(line, weights)):
            _image(axis, subject, time)
            seen = weight.abs().sqrt()  # also what is small
            axis.imshow(weight > 0, extent=subject.extent, cmap=_SIGNS, vmin=0, vmax=1, alpha=0.85 * seen)
    yield "evidence: where what the modules take speaks for a class (red) or against it (blue)", figure


@_draw.register
def _(maps: Footprints, subject: Subject) -> Iterator[tuple[str, Figure]]:
    heads, _, height, width = maps.weights.shape
    drawn = min(heads, HEADS)
    figure, axes = _axes(len(subject.pixels), drawn + 2)
    for row, (place, line) in enumerate(zip(subject.pixels, axes)):
        y, x = _at(place, (height, width))
        weights = maps.weights[:, :, y, x].unflatten(1, (maps.side, maps.side)).cpu()
        _image(line[0], subject)
        _mark_footprint(line[0], maps, (y, x), subject)
        for head, (axis, weight) in enumerate(zip(line[1:], [weights.mean(0), *weights])):
            limit = float(weight.abs().max())
            if maps.normalised:
                axis.imshow(weight, cmap="viridis", vmin=0, vmax=limit)
            else:
                axis.imshow(weight, cmap="coolwarm", vmin=-limit, vmax=limit)
            axis.set_title(("mean" if head == 0 else f"head {head - 1}") if row == 0 else "", fontsize=9)
    kind = "which sum to 1" if maps.normalised else "patchwise, red above zero"
    yield (
        f"{maps.name}: weights under the {maps.side}×{maps.side} footprint, {kind}, "
        f"{drawn} of {heads} heads, each on its own scale; the frame shows where",
        figure,
    )


@_draw.register
def _(maps: Transforms, subject: Subject) -> Iterator[tuple[str, Figure]]:
    groups = min(len(maps.p), HEADS)
    figure, axes = _axes(groups, 6)
    titles = ("P: row from", "Q: column from", "rows and columns", "where + comes from")
    limits = [float(matrices.max()) for matrices in (maps.p, maps.q)]
    for group, line in enumerate(axes):
        p, q = maps.p[group].cpu(), maps.q[group].cpu()
        line[0].imshow(p, vmin=0, vmax=limits[0], cmap="viridis")
        line[1].imshow(q, vmin=0, vmax=limits[1], cmap="viridis")
        _image(line[2], subject, maps.frame)
        _mesh(line[2], p, q, subject)
        y, x = _at(subject.pixels[0], (p.shape[0], q.shape[0]))
        _image(line[3], subject, maps.frame)
        _heat(line[3], torch.outer(p[y], q[:, x]), subject)
        _mark(line[3], ((y + 0.5) / len(p), (x + 0.5) / len(q)), subject)
        line[4].imshow(maps.before[group].cpu(), cmap="magma")
        line[5].imshow(maps.after[group].cpu(), cmap="magma")
        line[0].set_ylabel(f"group {group}", fontsize=9)
        for axis, title in zip(line, (*titles, "features", "transformed")):
            axis.set_title(title if group == 0 else "", fontsize=9)
    place = "" if maps.frame is None else f", frame {maps.frame}"
    yield (
        f"{maps.name}: bilinear attentional transform{place}; yellow is {limits[0]:.2f} in P and {limits[1]:.2f} in Q",
        figure,
    )


@_draw.register
def _(maps: TimeTransforms, subject: Subject) -> Iterator[tuple[str, Figure]]:
    groups = min(len(maps.m), HEADS)
    figure, axes = _axes(1, groups)
    for group, axis in enumerate(axes[0]):
        axis.imshow(maps.m[group].cpu(), vmin=0, cmap="viridis")
        axis.set_title(f"group {group}", fontsize=9)
    yield f"{maps.name}: temporal matrix, segment (row) from segment (column)", figure


@_draw.register
def _(maps: ClassMaps, subject: Subject) -> Iterator[tuple[str, Figure]]:
    heads = min(len(maps.weights), HEADS)
    figure, axes = _axes(len(subject.best), heads + 1)
    for row, (index, line) in enumerate(zip(subject.best, axes)):
        weights = maps.weights[:, index]
        line[0].set_ylabel(_plain(_class(subject, index)), fontsize=9)
        for head, (axis, weight) in enumerate(zip(line, [weights.mean(0), *weights])):
            _image(axis, subject)
            _heat(axis, weight, subject)
            axis.set_title(("mean" if head == 0 else f"head {head - 1}") if row == 0 else "", fontsize=9)
    yield (
        f"{maps.name or 'model'}: what counts for a class, {heads} of {len(maps.weights)} heads, each on its own scale",
        figure,
    )


@_draw.register
def _(maps: Affinities, subject: Subject) -> Iterator[tuple[str, Figure]]:
    length, height, width = maps.weights.shape[:3]
    seen = maps.weights.shape[3]
    figure, axes = _axes(len(subject.pixels), seen)
    for place, line in zip(subject.pixels, axes):
        y, x = _at(place, (height, width))
        weights = maps.weights[length // 2, y, x]
        for time, axis in enumerate(line):
            shown = maps.frame if maps.frame is not None else time * len(subject.images) // seen
            _image(axis, subject, shown)
            _heat(axis, weights[time], subject)
            _mark(axis, place, subject)
    where = "" if maps.frame is None else f", frame {maps.frame}"
    yield f"{maps.name}: what the marked position takes from each other one{where}", figure


@_draw.register
def _(maps: Pairs, subject: Subject) -> Iterator[tuple[str, Figure]]:
    figure, axes = _axes(len(subject.best), 3, width=3.2)
    for row, (index, line) in enumerate(zip(subject.best, axes)):
        pairs = strongest_pairs(maps.of_class(index))
        names = [f"{a} · {b}" for a, b, _ in pairs]
        line[0].barh(names, [value for *_, value in pairs], color="steelblue")
        line[0].invert_yaxis()
        line[0].set_aspect("auto")
        line[0].set(yticks=range(len(names)), ylabel=_plain(_class(subject, index)))
        line[0].xaxis.set_major_locator(MaxNLocator(3))
        line[0].tick_params(labelsize=7)
        first, second, _ = pairs[0]
        for axis, heat in zip(
            line[1:], (maps.features[first] * maps.features[second], maps.class_maps[index])
        ):
            _image(axis, subject)
            _heat(axis, heat, subject)
        for axis, title in zip(line, ("pairs, part of the logit", "strongest pair's product", "class map")):
            axis.set_title(title if row == 0 else "", fontsize=9)
    yield f"{maps.name or 'model'}: the pairs of features that count most for a class", figure


def strongest_pairs(pairs: Tensor, count: int = 10) -> list[tuple[int, int, float]]:
    """Features a ≤ b and what they add together, the largest first, from :meth:`common.attention.fbn.FBNHead.pairs`."""
    both = (pairs + pairs.mT).triu(1).detach() + torch.diag(pairs.diagonal()).detach()
    best = both.flatten().abs().topk(min(count, both.numel())).indices.tolist()
    side = len(pairs)
    return [(index // side, index % side, float(both[index // side, index % side])) for index in best]


def _axes(rows: int, columns: int, width: float = 1.6) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width * columns + 0.4, 1.6 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure, axes


def _plain(name: str) -> str:
    return name.replace("$", r"\$")[:24]  # matplotlib takes what is between dollars for mathematics


def _image(axis: Any, subject: Subject, frame: int | None = None) -> None:
    last = len(subject.images) - 1
    frame = last // 2 if frame is None else min(frame, last)
    axis.imshow(subject.images[frame], extent=subject.extent)


def _heat(axis: Any, heat: Tensor, subject: Subject) -> None:
    """From zero up: a map that hardly varies looks so."""
    heat = heat.detach().float().cpu()
    axis.imshow(heat, extent=subject.extent, cmap="jet", alpha=0.5, vmin=min(0.0, float(heat.min())))


def _mark(axis: Any, place: tuple[float, float], subject: Subject) -> None:
    _, width, height, _ = subject.extent
    axis.plot(place[1] * width, place[0] * height, "w+", markersize=9, markeredgewidth=2)


def _mark_footprint(axis: Any, maps: Footprints, place: tuple[int, int], subject: Subject) -> None:
    _, image_width, image_height, _ = subject.extent
    height, width = maps.weights.shape[2:]
    reach = (maps.dilation * (maps.side - 1) + 1) / maps.stride
    corner = [(at + 0.5 - reach / 2) / count for at, count in zip(place, (height, width))]
    sides = reach / width * image_width, reach / height * image_height
    at = corner[1] * image_width, corner[0] * image_height
    axis.add_patch(Rectangle(at, *sides, fill=False, color="red"))
    axis.set(xlim=(0, image_width), ylim=(image_height, 0))


def _mesh(axis: Any, p: Tensor, q: Tensor, subject: Subject) -> None:
    """The mean place that each output row and column comes from."""
    _, width, height, _ = subject.extent
    rows = (p @ (torch.arange(len(p)) + 0.5).to(p)) / len(p) * height
    columns = ((torch.arange(len(q)) + 0.5).to(q) @ q) / len(q) * width
    axis.hlines(rows, 0, width, color="yellow", linewidth=1)
    axis.vlines(columns, 0, height, color="cyan", linewidth=1)


def _at(place: tuple[float, float], size: tuple[int, int]) -> tuple[int, int]:
    y, x = (min(int(share * side), side - 1) for share, side in zip(place, size))
    return y, x
