"""What a transform will do to an image, drawn before any pixel is known, so that another library can do it.

The draws are those of the transforms of :mod:`common.data.augment`, from the same generators in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import floor, nan
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageEnhance
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomHorizontalFlip
from torchvision.transforms.functional import pil_to_tensor

from common.data.augment import AugmentConfig, ImageTransform, policy_operations, train_transform
from common.data.tensor_augment import BRIGHTNESS, CONTRAST, SATURATION, Operations
from common.errors import ConfigError

Factors = tuple[tuple[int, float], ...]
Operation = Callable[..., Image.Image]
"""Of an image and arguments."""
NO_FACTORS: Factors = ((BRIGHTNESS, 1.0), (CONTRAST, 1.0), (SATURATION, 1.0))
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


class Patch(NamedTuple):
    """A rectangle that is erased."""

    top: int
    left: int
    pixels: Tensor
    """(3, height, width) float32, normalised."""


class View(NamedTuple):
    """What becomes of an image; all in pixels."""

    window: tuple[int, int, int, int]
    """Top, left, height and width of the part that is used."""
    resized: tuple[int, int]
    """Height and width that this part is resized to."""
    corner: tuple[int, int] = (0, 0)
    """Top and left, in the resized part, of the network's input."""
    flip: bool = False
    factors: Factors = NO_FACTORS
    """Changes of colour and their factors, in order."""
    operations: Operations = ()
    patch: Patch | None = None


def refuse_unknown(augment: AugmentConfig) -> None:
    """Raise :class:`ConfigError` for augmentation that is not a :class:`View`."""
    auto = augment.auto or "rand"
    other = not auto.startswith("rand") or "-t3a" in auto  # whose blur draws as it blurs
    for name, there in (("kind", augment.kind != "standard"), ("auto", other)):
        if there:
            raise ConfigError(
                f"augment.{name} = {getattr(augment, name)}: the dali backend crops, flips, jitters colours, "
                f"erases and has RandAugment (rand-…), but not this; use --data.backend torch"
            )


def drawing_transform(augment: AugmentConfig) -> ImageTransform:
    """A training transform for :func:`random_view`: its RandAugment notes what it would do."""
    transform = train_transform(augment)
    for operation in policy_operations(transform):
        operation.aug_fn = partial(_note, operation.name)
    return transform


def rand_operations(augment: AugmentConfig) -> dict[str, Operation]:
    """RandAugment's operations by name, of an image and the arguments that were noted."""
    return {op.name: partial(op.aug_fn, **op.kwargs) for op in policy_operations(train_transform(augment))}


def _note(name: str, noted: Operations, *arguments: Any, **_: Any) -> Operations:
    return (*noted, (name, arguments))


def random_view(transform: ImageTransform, width: int, height: int, size: int) -> View:
    """The view that a training transform takes of an image of ``width`` × ``height``.

    Args:
        transform: of :func:`drawing_transform`; draws come from the global generators.
        size: of the network's input.
    """
    view = View((0, 0, height, width), (size, size))
    for step in transform.transforms:  # type: ignore[attr-defined]
        if isinstance(step, RandomResizedCropAndInterpolation):
            shape = torch.empty((3, height, width), device="meta")
            view = view._replace(window=step.get_params(shape, step.scale, step.ratio))
        elif isinstance(step, RandomHorizontalFlip):
            view = view._replace(flip=bool(torch.rand(1) < step.p))
        elif isinstance(step, ColorJitter):
            order, *found = step.get_params(step.brightness, step.contrast, step.saturation, step.hue)
            pairs = ((int(change), found[change]) for change in order)
            view = view._replace(factors=tuple((change, f) for change, f in pairs if f is not None))
        elif isinstance(step, RandAugment):
            view = view._replace(operations=step(()))
        elif isinstance(step, RandomErasing):
            view = view._replace(patch=_erased(step(torch.full((3, size, size), nan))))
    return view


def _erased(canvas: Tensor) -> Patch | None:
    """What is no longer NaN."""
    rows, columns = (torch.nonzero(~canvas[0].isnan().all(axis)).flatten() for axis in (1, 0))
    if not len(rows):
        return None
    top, left = int(rows[0]), int(columns[0])
    return Patch(top, left, canvas[:, top : int(rows[-1]) + 1, left : int(columns[-1]) + 1].clone())


def central_view(width: int, height: int, augment: AugmentConfig) -> View:
    """The view that :func:`common.data.augment.test_transform` takes of an image of ``width`` × ``height``."""
    short = floor(augment.size / augment.crop)
    rows, columns = (int(short * side / min(width, height)) for side in (height, width))
    corner = round((rows - augment.size) / 2), round((columns - augment.size) / 2)
    return View((0, 0, height, width), (rows, columns), corner)


def by_pillow(
    image: Tensor, factors: Sequence[Sequence[float]], operations: Operations, known: Mapping[str, Operation]
) -> Tensor:
    """Colours changed and RandAugment's operations done, as the torch backend does.

    Args:
        image: (3, height, width) uint8.
        known: of :func:`rand_operations`.
    """
    changes = [(which, factor) for which, factor in factors if factor != 1]
    if not changes and not operations:
        return image
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    for which, factor in changes:
        picture = _ENHANCERS[int(which)](picture).enhance(factor)
    for name, arguments in operations:
        picture = known[name](picture, *arguments)
    return pil_to_tensor(picture)
