"""What the mechanisms of a network attend to, read from the modules themselves as an input passes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor, nn

from common.attention.attach import evaluating
from common.attention.bat import BilinearTransform, bilinear_transform
from common.attention.bat_video import BilinearTransform3d, temporal_transform
from common.attention.fbn import FBNHead
from common.attention.noah import NOAH
from common.attention.non_local import NonLocal, NonLocal3d
from common.attention.san import PairwiseAttention, SelfAttention
from common.frames import clips, frames


@dataclass
class Footprints:
    """SAN: weights (heads, K, h, w) of the K = ``side``² positions under the footprint of each of h × w pixels."""

    name: str
    weights: Tensor
    side: int
    stride: int
    dilation: int
    normalised: bool
    """Whether a footprint's weights sum to 1: pairwise ones do, patchwise ones do not."""


@dataclass
class Transforms:
    """BAT: P (groups, m, m) and Q (groups, n, n) of one frame, and what they make of its features."""

    name: str
    p: Tensor
    q: Tensor
    before: Tensor
    """(groups, h, w), mean size of a group's channels."""
    after: Tensor
    """The same of the transformed grid."""
    frame: int | None = None


@dataclass
class TimeTransforms:
    """BAT in time: M (groups, s, s) of one clip; output segment i takes M[i, j] of segment j."""

    name: str
    m: Tensor


@dataclass
class ClassMaps:
    """NOAH: weights (heads, classes, h, w) of the positions, of sum 1 for each head and class."""

    name: str
    weights: Tensor


@dataclass
class Affinities:
    """Non-local: (t, h, w, t', h', w'), what each position takes from each; of sum 1 over the last three.

    Of one ``frame`` alone, where the block sees frames alone: t = t' = 1.
    """

    name: str
    weights: Tensor
    frame: int | None = None


@dataclass
class Pairs:
    """FBN: what each pair of features (C, C) adds to the logit of a class, and where they are: maps (C, h, w)."""

    name: str
    of_class: Callable[[int], Tensor]
    features: Tensor
    class_maps: Tensor
    """(classes, h, w), whose means are the logits."""


Maps = Footprints | Transforms | TimeTransforms | ClassMaps | Affinities | Pairs


def attention_maps(model: nn.Module, inputs: Tensor) -> tuple[Tensor, list[Maps]]:
    """Run one input through ``model``, in evaluation mode, and see what its mechanisms attend to.

    Args:
        model: gives logits (1, classes).
        inputs: (1, C, H, W), or for video (1, C, T, H, W).

    Returns:
        The logits (classes,), and the maps of all modules in the order in which they run, named as in the model.

    Raises:
        ValueError: ``inputs`` is more than one.
    """
    if len(inputs) != 1:
        raise ValueError(f"inputs: {len(inputs)} of them, expected one at a time")
    found: list[Maps] = []
    with evaluating(model), ExitStack() as hooks:
        for name, module in model.named_modules():
            reader = next((read for kind, read in _READERS.items() if isinstance(module, kind)), None)
            if reader is not None:
                hook = module.register_forward_pre_hook(_reading(name, reader, found))
                hooks.callback(hook.remove)
        logits = model(inputs)
    return logits[0], found


def _reading(name: str, read: Callable[..., list[Maps]], found: list[Maps]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.extend(read(name, module, inputs[0]))

    return hook


def _footprints(name: str, module: SelfAttention, x: Tensor) -> list[Maps]:
    height, width = ((side - 1) // module.stride + 1 for side in x.shape[2:])
    weights = module.attention(x)[0].unflatten(2, (height, width))
    normalised = isinstance(module, PairwiseAttention)
    return [Footprints(name, weights, module.kernel_size, module.stride, module.dilation, normalised)]


def _transforms(name: str, module: BilinearTransform, x: Tensor) -> list[Maps]:
    x = module.fitted(x)
    p, q = module.matrices(x)
    y = bilinear_transform(x, p, q)
    return [Transforms(name, p[0], q[0], _strength(x, module.groups)[0], _strength(y, module.groups)[0])]


def _clip_transforms(name: str, module: BilinearTransform3d, x: Tensor) -> list[Maps]:
    x = module.fitted(x, *x.shape[2:])
    o = module.conv1(x)
    p, q = module.matrices(o)
    y = bilinear_transform(frames(x), p, q)
    time = [TimeTransforms(name, module.time_matrices(o)[0])] if module.time_groups else []
    if module.time_groups:
        y = frames(temporal_transform(clips(y, x.shape[2]), module.time_matrices(o)))
    before, after = (_strength(z, module.groups) for z in (frames(x), y))
    return [*(Transforms(name, *of_frame, t) for t, of_frame in enumerate(zip(p, q, before, after))), *time]


def _strength(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1)).abs().mean(2)


def _class_maps(name: str, module: NOAH, x: Tensor) -> list[Maps]:
    return [ClassMaps(name, module.attention(x)[0].unflatten(2, _grid(x)))]


def _affinities(name: str, module: NonLocal, x: Tensor) -> list[Maps]:
    size = (1, *x.shape[2:])
    return [Affinities(name, module.attention(x)[0].unflatten(1, size).unflatten(0, size))]


def _clip_affinities(name: str, module: NonLocal3d, x: Tensor) -> list[Maps]:
    length, height, width = x.shape[2:]
    weights = module.attention(x).mean(1)  # over the heads
    together = 1 if module.per_frame else length
    pooled = weights.shape[2] != weights.shape[1]
    given = (together, height // 2, width // 2) if pooled else (together, height, width)
    weights = weights.unflatten(2, given).unflatten(1, (together, height, width))
    return [Affinities(name, w, t if module.per_frame else None) for t, w in enumerate(weights)]


def _pairs(name: str, module: FBNHead, x: Tensor) -> list[Maps]:
    grid = _grid(x)
    seen = (x.tanh() if module.tanh else x)[0].flatten(1).unflatten(1, grid)
    maps = module.class_maps(x)[0].flatten(1).unflatten(1, grid)

    def of_class(index: int) -> Tensor:
        with evaluating(module):  # no factor is dropped, also when this is asked later
            pairs: Tensor = module.pairs(x, index)[0]
            return pairs

    return [Pairs(name, of_class, seen, maps)]


def _grid(x: Tensor) -> tuple[int, int]:
    """The sides of (N, C, H, W) features, or of the grid that (N, C, L) tokens fill; a row where there is none."""
    if x.ndim == 4:
        return x.shape[2], x.shape[3]
    side = isqrt(x.shape[2])
    return (side, side) if side**2 == x.shape[2] else (1, x.shape[2])


_READERS: dict[Any, Callable[..., list[Maps]]] = {
    SelfAttention: _footprints,
    BilinearTransform: _transforms,
    BilinearTransform3d: _clip_transforms,
    NOAH: _class_maps,
    NonLocal: _affinities,
    NonLocal3d: _clip_affinities,
    FBNHead: _pairs,
}


def attended(maps: ClassMaps, index: int) -> Tensor:
    """The map (h, w) of the positions that count for class ``index``: the mean over NOAH's heads."""
    return maps.weights[:, index].mean(0)
