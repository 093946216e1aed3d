"""The training images of factorized bilinear networks on ImageNet, in three levels of disturbance.

Li, Wang, Xu and Hou, "Factorized Bilinear Models for Image Recognition", ICCV 2017, arXiv 1611.05709.
Everything here draws from Python's ``random``, which the loader seeds for each sample.
"""

from __future__ import annotations

import random
from math import ceil, cos, radians, sin

import numpy as np
from PIL import Image

Colour = tuple[int, int, int]

LEVELS = (1, 2, 3)
SIDE, LARGE_SIDE = 256, 480
"""Shorter side of the image that level 1, and the others, take their crop from."""
SCALE = (SIDE / LARGE_SIDE, 1.0)
ASPECT = 0.25
ANGLE, SHEAR = 10.0, 0.1
HUE, SATURATION, LIGHTNESS = 36, 50, 50
"""Largest shift of each, on scales of 0 to 255."""


def fbn_augment(image: Image.Image, level: int, size: int, hflip: float, fill: Colour) -> Image.Image:
    """A random training image.

    Level 1 is a crop of the image with a shorter side of 256, and a flip. Level 2 takes the crop from the image
    with a shorter side of 480, scaled by 0.533 to 1 and with an aspect changed by ±0.25, and shifts its colours.
    Level 3 also rotates it by ±10° and shears it by ±0.1.

    Args:
        image: RGB.
        size: side of the result, pixels.
        hflip: probability of the flip.
        fill: colour of what lies outside the image (level 3).
    """
    if level == 1:
        image = random_crop(with_shorter_side(image, SIDE), size)
    else:
        image = random_affine_crop(with_shorter_side(image, LARGE_SIDE), size, level == 3, fill)
        image = shift_colours(image, *(random.uniform(-r, r) for r in (HUE, SATURATION, LIGHTNESS)))
    flip = random.random() < hflip
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def with_shorter_side(image: Image.Image, side: int) -> Image.Image:
    """``image`` resized, bilinearly, to a shorter side of ``side`` pixels."""
    scale = side / min(image.size)
    return image if scale == 1 else image.resize(_scaled(image, scale, scale), Image.Resampling.BILINEAR)


def random_crop(image: Image.Image, size: int) -> Image.Image:
    """A square of ``size`` pixels anywhere in ``image``, which is enlarged where a side is shorter."""
    if min(image.size) < size:
        image = with_shorter_side(image, size)
    left, top = (random.randint(0, side - size) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def random_affine_crop(image: Image.Image, size: int, turn: bool, fill: Colour) -> Image.Image:
    """A crop of the image after random scaling and stretching, and if ``turn`` rotation and shear.

    Scale s and aspect r give the factors 2s/(1+r) for the width and 2sr/(1+r) for the height, of mean s, but never
    so small that the crop would not fit.
    """
    scale, aspect = random.uniform(*SCALE), random.uniform(1 - ASPECT, 1 + ASPECT)
    factors = [2 * scale / (1 + aspect), 2 * scale * aspect / (1 + aspect)]
    factors = [max(factor, size / side) for factor, side in zip(factors, image.size)]
    stretched = _scaled(image, *factors)
    if not turn:
        return random_crop(image.resize(stretched, Image.Resampling.BILINEAR), size)
    angle, shear = radians(random.uniform(-ANGLE, ANGLE)), random.uniform(-SHEAR, SHEAR)
    turned = np.array([[cos(angle), -sin(angle)], [sin(angle), cos(angle)]]) @ np.array([[1, shear], [0, 1]])
    corner = np.array([random.randint(0, side - size) for side in stretched])
    # Pillow wants the way back: from a pixel of the crop, about the centres, to one of the image.
    back = np.linalg.inv(turned @ np.diag(factors))
    offset = np.array(image.size) / 2 + back @ (corner - np.array(stretched) / 2)
    rows = [(*row, start) for row, start in zip(back, offset)]
    way = [float(number) for row in rows for number in row]
    return image.transform(
        (size, size), Image.Transform.AFFINE, way, Image.Resampling.BILINEAR, fillcolor=fill
    )


def shift_colours(image: Image.Image, hue: float, saturation: float, lightness: float) -> Image.Image:
    """Hue, saturation and lightness (HSL, scales of 0 to 255) shifted; hue wraps around, the others are clipped."""
    h, s, light = rgb_to_hsl(np.asarray(image, np.float32) / 255)
    s, light = np.clip(s + saturation / 255, 0, 1), np.clip(light + lightness / 255, 0, 1)
    pixels = hsl_to_rgb((h + hue / 255) % 1, s, light)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def rgb_to_hsl(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(…, 3) in 0–1 → hue, saturation and lightness, each (…) in 0–1; grey has hue and saturation 0."""
    r, g, b = np.moveaxis(rgb, -1, 0)
    top, bottom = rgb.max(-1), rgb.min(-1)
    chroma, total = top - bottom, top + bottom
    divisor = np.where(chroma > 0, chroma, 1)
    sector = np.select(
        [top == r, top == g], [(g - b) / divisor, 2 + (b - r) / divisor], 4 + (r - g) / divisor
    )
    room = 1 - np.abs(total - 1)
    return sector / 6 % 1, np.where(chroma > 0, chroma / np.where(room > 0, room, 1), 0), total / 2


def hsl_to_rgb(h: np.ndarray, s: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Hue, saturation and lightness, each (…) in 0–1 → (…, 3) in 0–1."""
    reach = s * np.minimum(light, 1 - light)
    # Red, green and blue are one wave of the hue, shifted by thirds of the circle.
    phases = ((shift + 12 * h) % 12 for shift in (0, 8, 4))
    return np.stack([light - reach * np.clip(np.minimum(p - 3, 9 - p), -1, 1) for p in phases], -1)


def _scaled(image: Image.Image, horizontal: float, vertical: float) -> tuple[int, int]:
    # Without its rounding error, 480 · (224/480) would be enlarged to 225.
    return ceil(image.width * horizontal - 1e-6), ceil(image.height * vertical - 1e-6)
