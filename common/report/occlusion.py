"""Whether a map shows what a network goes by: hide where it is highest, and see what that costs the class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.attention.attach import evaluating


@dataclass
class Costs:
    """By how much the probability of each input's class, (N,), falls when a square of the image is hidden."""

    highest: Tensor
    """The square that holds most of the input's map."""
    lowest: Tensor
    """The one that holds least."""
    random: Tensor
    """Mean over random squares."""
    others: Tensor
    """The square that holds most of another input's map."""


def occlude(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    heat: Tensor,
    side: int,
    squares: int = 8,
    seed: int = 0,
) -> Costs:
    """What hiding squares of ``side`` pixels costs. Hidden is grey: zero, the mean of normalised images.

    Args:
        model: gives logits (N, classes).
        images: (N, C, H, W).
        targets: (N,), their classes.
        heat: (N, h, w), the maps, of whatever size.
        squares: how many random ones an image gets.
        seed: of these, and of which other image's map is taken.
    """
    size = (images.shape[2], images.shape[3])
    generator = torch.Generator().manual_seed(seed)
    sums = square_sums(heat, size, side)
    highest, lowest = _place(sums.flatten(1).argmax(1), sums), _place(sums.flatten(1).argmin(1), sums)
    random = torch.randint(sums[0].numel(), (squares, len(images)), generator=generator)
    other = torch.randperm(len(images), generator=generator)

    def cost(places: Tensor) -> Tensor:
        hidden = torch.stack([hide(x, top, left, side) for x, (top, left) in zip(images, places.tolist())])
        return before - _probability(model, hidden, targets)

    before = _probability(model, images, targets)
    of_random = torch.stack([cost(_place(index, sums)) for index in random]).mean(0)
    return Costs(cost(highest), cost(lowest), of_random, cost(highest[other]))


def square_sums(heat: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """(N, h, w) → (N, H − side + 1, W − side + 1): the mean of the map in each square of an image of ``size``."""
    large = nn.functional.interpolate(heat[:, None].float(), size=size, mode="bilinear", align_corners=False)
    return nn.functional.avg_pool2d(large, side, 1)[:, 0]


def hide(image: Tensor, top: int, left: int, side: int) -> Tensor:
    """A copy of the image (C, H, W) with a grey square."""
    image = image.clone()
    image[:, top : top + side, left : left + side] = 0
    return image


def excess(costs: Tensor, than: Tensor) -> tuple[float, float]:
    """By how much ``costs`` are higher on average, and the standard error of that."""
    more = costs - than
    return float(more.mean()), float(more.std() / len(more) ** 0.5)


def _place(index: Tensor, sums: Tensor) -> Tensor:
    """Numbers of squares (N,) → tops and lefts (N, 2)."""
    width = sums.shape[2]
    return torch.stack([index // width, index % width], 1)


def _probability(model: nn.Module, images: Tensor, targets: Tensor, batch: int = 128) -> Tensor:
    with evaluating(model):
        logits = torch.cat([model(part) for part in images.split(batch)])
    return logits.softmax(1).gather(1, targets[:, None])[:, 0]
