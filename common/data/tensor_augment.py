"""Colour changes and RandAugment's operations as tensor operations, on whatever device the images are.

Each takes images (n, 3, height, width) uint8 and arguments (n, …) float64, of each image its own, and gives images like
them. The values are those of the operations of timm and Pillow, which the torch backend uses: equal, or within 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

Operations = tuple[tuple[str, tuple[Any, ...]], ...]
"""Names and arguments of RandAugment's operations, in order."""
BRIGHTNESS, CONTRAST, SATURATION = range(3)
"""Torchvision's numbers of the changes."""


def change_colours(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation changed, in each image in its own order.

    Args:
        images: (n, 3, height, width) uint8.
        factors: (n, changes, 2) float32: which change, and its factor.
    """
    values = images.float()
    for change in factors.unbind(1):
        which, factor = (column.view(-1, 1, 1, 1) for column in change.unbind(1))
        grey = _luma(values)
        mean = (grey.mean((2, 3), keepdim=True, dtype=torch.float64) + 0.5).floor().float()
        towards = torch.where(which == SATURATION, grey, torch.where(which == CONTRAST, mean, 0.0))
        values = _blend(towards, values, factor)
    return values.to(torch.uint8)


def rand_augment(
    images: Tensor, operations: Sequence[Operations], fill: tuple[int, int, int], cubic: bool
) -> Tensor:
    """RandAugment's operations, of each image its own.

    Images that have the same operation at the same place in their order go through it together: the number of kernels
    does not grow with the batch.

    Args:
        images: (n, 3, height, width) uint8.
        operations: of each image.
        fill: red, green and blue where an operation shows what is outside the image.
        cubic: interpolate between 16 pixels instead of 4.
    """
    images, geometry = images.clone(), Geometry(fill, cubic)
    for step in range(max(map(len, operations), default=0)):
        groups: dict[str, list[tuple[int, tuple[Any, ...]]]] = defaultdict(list)
        for place, chosen in enumerate(operations):
            if step < len(chosen):
                name, arguments = chosen[step]
                groups[name].append((place, arguments))
        for name, members in groups.items():
            places = torch.tensor([place for place, _ in members], device=images.device)
            values = torch.tensor([arguments for _, arguments in members], dtype=torch.float64)
            operation = _COLOURS.get(name) or getattr(geometry, _GEOMETRY[name])
            images[places] = operation(images[places], values.to(images.device))
    return images


def auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    """Each channel stretched to 0–255; a channel of one value stays as it is."""
    low, high = (limit.double()[..., None] for limit in (images.amin((2, 3)), images.amax((2, 3))))
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    scale = levels[-1] / (high - low).clamp(min=1)  # a plain number would be multiplied by a rounded inverse
    stretched = (levels * scale - low * scale).trunc().clamp(0, 255)
    return _look_up(images, torch.where(high > low, stretched, levels))


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Each channel's histogram made flat."""
    number, height, width = len(images), *images.shape[2:]
    channel = torch.arange(3 * number, device=images.device).view(number, 3, 1, 1)
    counts = torch.bincount((images + 256 * channel).flatten(), minlength=768 * number).view(number, 3, 256)
    last = counts.gather(2, images.amax((2, 3))[..., None].long())
    step = (height * width - last) // 255
    below = counts.cumsum(2) - counts
    flat = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return _look_up(images, torch.where(step > 0, flat, torch.arange(256, device=images.device)))


def invert(images: Tensor, _: Tensor) -> Tensor:
    """Negatives."""
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Only the upper ``bits`` of each value kept; 0 makes black."""
    mask = 256 - 2 ** (8 - _column(bits))
    return images & mask.clamp(max=255).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Values from the threshold on inverted."""
    return torch.where(images < _column(threshold), images, 255 - images)


def solarize_add(images: Tensor, added: Tensor) -> Tensor:
    """Values below 128 raised."""
    raised = (images + _column(added)).clamp(max=255).to(torch.uint8)
    return torch.where(images < 128, raised, images)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blended with a smoothed image, or away from it; the outermost pixels stay as they are."""
    values = images.float()
    inner = values[..., 1:-1, 1:-1]
    smooth = values.clone()
    total = avg_pool2d(values, 3, 1, divisor_override=1) + 4 * inner
    smooth[..., 1:-1, 1:-1] = (total / 13 + 0.5).floor()
    return _blend(smooth, values, _column(factor).float()).to(torch.uint8)


class Geometry:
    """Rotation, shear and translation, as Pillow's ``Image.transform`` does them.

    Args:
        fill: red, green and blue outside the image.
        cubic: interpolate between 16 pixels instead of 4.
    """

    def __init__(self, fill: tuple[int, int, int], cubic: bool) -> None:
        self.fill, self.cubic = fill, cubic

    def rotate(self, images: Tensor, degrees: Tensor) -> Tensor:
        """Counter-clockwise, about the centre."""
        y, x = (side / 2 for side in images.shape[2:])
        angle = -torch.deg2rad(degrees[:, 0])
        cos, sin = angle.cos(), angle.sin()
        return self._affine(images, cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)

    def shear_x(self, images: Tensor, factor: Tensor) -> Tensor:
        """Rows moved by their place times ``factor``."""
        return self._affine(images, 1, factor[:, 0], 0, 0, 1, 0)

    def shear_y(self, images: Tensor, factor: Tensor) -> Tensor:
        """Columns moved by their place times ``factor``."""
        return self._affine(images, 1, 0, 0, factor[:, 0], 1, 0)

    def translate_x(self, images: Tensor, share: Tensor) -> Tensor:
        """Moved to the left by a share of the width."""
        return self._affine(images, 1, 0, share[:, 0] * images.shape[3], 0, 1, 0)

    def translate_y(self, images: Tensor, share: Tensor) -> Tensor:
        """Moved up by a share of the height."""
        return self._affine(images, 1, 0, 0, 0, 1, share[:, 0] * images.shape[2])

    def _affine(self, images: Tensor, *matrix: Tensor | float) -> Tensor:
        """What is at (a x + b y + c, d x + e y + f) comes to (x, y), from the corner, in pixels."""
        height, width = images.shape[2:]
        a, b, c, d, e, f = (_column(torch.as_tensor(m, device=images.device))[:, 0] for m in matrix)
        x = torch.arange(width, dtype=torch.float64, device=images.device) + 0.5
        y = torch.arange(height, dtype=torch.float64, device=images.device)[:, None] + 0.5
        shape = (len(images), height, width)
        across, down = (a * x + b * y + c).expand(shape), (d * x + e * y + f).expand(shape)
        inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
        fill = torch.tensor(self.fill, dtype=torch.uint8, device=images.device).view(3, 1, 1)
        return torch.where(inside[:, None], self._sampled(images, across - 0.5, down - 0.5), fill)

    def _sampled(self, images: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Interpolated at places in pixels' centres; beyond the edge it is as on it."""
        (height, width), flat = images.shape[2:], images.flatten(2).double()

        def pixels(row: Tensor, column: Tensor) -> Tensor:
            places = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            return flat.gather(2, places.flatten(1)[:, None].expand_as(flat)).view_as(images)

        left, top = x.floor(), y.floor()
        right_part, lower_part = (x - left)[:, None], (y - top)[:, None]
        near = range(-1, 3) if self.cubic else range(2)
        rows = [
            _between([pixels(top.long() + row, left.long() + column) for column in near], right_part)
            for row in near
        ]
        return _between(rows, lower_part).clamp_(0, 255).to(torch.uint8)


def _between(values: list[Tensor], part: Tensor) -> Tensor:
    """Interpolated between the middle two of 2 or 4 neighbours; the cubic is Pillow's, with a = -1."""
    if len(values) == 2:
        return values[0] + part * (values[1] - values[0])
    a, b, c, d = values
    return b + part * (c - a + part * (2 * (a - b) + c - d + part * (b - a - c + d)))


def _enhance(which: int) -> Callable[[Tensor, Tensor], Tensor]:
    def enhance(images: Tensor, factor: Tensor) -> Tensor:
        change = torch.cat([torch.full_like(factor, which), factor], 1).float()
        return change_colours(images, change[:, None])

    return enhance


_COLOURS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Posterize": posterize,
    "PosterizeIncreasing": posterize,
    "Solarize": solarize,
    "SolarizeIncreasing": solarize,
    "SolarizeAdd": solarize_add,
    "Color": _enhance(SATURATION),
    "ColorIncreasing": _enhance(SATURATION),
    "Contrast": _enhance(CONTRAST),
    "ContrastIncreasing": _enhance(CONTRAST),
    "Brightness": _enhance(BRIGHTNESS),
    "BrightnessIncreasing": _enhance(BRIGHTNESS),
    "Sharpness": sharpness,
    "SharpnessIncreasing": sharpness,
}
_GEOMETRY = {
    "Rotate": "rotate",
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateXRel": "translate_x",
    "TranslateYRel": "translate_y",
}


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _blend(first: Tensor, second: Tensor, factor: Tensor) -> Tensor:
    """``first`` at 0, ``second`` at 1, cut to whole numbers of 0 to 255 as Pillow does."""
    return (first + factor * (second - first)).clamp_(0, 255).floor_()


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Every value replaced by its entry of (n, 3, 256) tables."""
    found = tables.to(torch.uint8).expand(len(images), 3, 256).gather(2, images.flatten(2).long())
    return found.view_as(images)


def _luma(images: Tensor) -> Tensor:
    # ITU-R 601 in 16-bit fixed point; all is a whole number below 2²⁴, so exact in float32.
    red, green, blue = images.split(1, dim=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor_()
