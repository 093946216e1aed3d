"""Augmentation by name: timm's transforms, each drawn from a generator seeded by (seed, epoch, sample)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import get_worker_info
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from common.data.fbn_augment import Colour, fbn_augment
from common.data.order import Draw

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ImageTransform = Callable[[Any], Tensor]
"""Of a PIL image; :class:`RandomCrop` and what begins with it also of a tensor (3, height, width) uint8."""


@dataclass
class AugmentConfig:
    """How images are cropped, disturbed and normalised."""

    kind: Literal["standard", "fbn1", "fbn2", "fbn3"] = "standard"
    """standard: a random resized crop and all the settings here; fbn1 to fbn3: the levels of FBN's ImageNet training,
    which have their own ranges and use only size, hflip and mean (training)."""
    calm_epochs: float = 0
    """The last so many epochs train at fbn1 (fbn2, fbn3)."""
    size: int = 224
    """Height and width of the network's input, pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a random crop may have (training)."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Aspect ratios, width over height, that a random crop may have (training)."""
    hflip: float = 0.5
    """Probability of a horizontal flip (training)."""
    color_jitter: float = 0.0
    """Strength of random brightness, contrast and saturation (training)."""
    auto: str | None = None
    """RandAugment or another policy in timm's notation, such as rand-m9-mstd0.5-inc1 (training)."""
    erasing: float = 0.0
    """Probability of random erasing, with noise for pixels (training)."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resampling, training and test."""
    crop: float = 0.875
    """Test: the side of the central crop over the shorter side after resizing."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Per channel (R, G, B), on the scale 0–1; subtracted."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Per channel, on the scale 0–1; divided by."""
    repeats: int = 1
    """Repeated augmentation: draws of each sample in a row within an epoch."""

    def __post_init__(self) -> None:
        for name in ("hflip", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected a probability, 0 to 1")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop = {self.crop}: expected a share of the side, above 0 and at most 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale = {self.scale}: expected two shares of the area, 0 < low ≤ high ≤ 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio = {self.ratio}: expected two positive aspect ratios, low ≤ high")
        if self.size < 8:
            raise ValueError(f"size = {self.size}: expected at least 8 pixels")
        if self.repeats < 1:
            raise ValueError(f"repeats = {self.repeats}: expected at least 1")
        if self.calm_epochs < 0 or (self.calm_epochs and self.kind in ("standard", "fbn1")):
            raise ValueError(
                f"calm_epochs = {self.calm_epochs}: expected 0, or more with kind = fbn2 or fbn3"
            )


def train_transform(config: AugmentConfig) -> ImageTransform:
    """PIL image → (3, size, size): uint8, or normalised float32 where erasing needs normalised pixels."""
    if config.kind != "standard":
        red, green, blue = (round(255 * mean) for mean in config.mean)
        fill = (red, green, blue)
        return partial(_fbn, level=int(config.kind[-1]), size=config.size, hflip=config.hflip, fill=fill)
    transform = create_transform(
        config.size,
        is_training=True,
        use_prefetcher=False,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        color_jitter=config.color_jitter or None,
        auto_augment=config.auto,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
        re_prob=config.erasing,
        re_mode="pixel",
        normalize=config.erasing > 0,
    )
    crop = RandomCrop(config.size, config.scale, config.ratio, config.interpolation)
    more = config.auto or config.color_jitter or config.erasing  # which timm begins with Pillow's images
    transform.transforms[:1] = [crop, to_pil_image] if more else [crop]
    for operation in policy_operations(transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return transform


def policy_operations(transform: ImageTransform) -> list[AugmentOp]:
    """The operations that RandAugment or another policy in the transform chooses from."""
    found: list[AugmentOp] = []
    for step in getattr(transform, "transforms", []):
        found += [*getattr(step, "ops", []), *chain(*getattr(step, "policy", []))]
    return found


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    # Timm asks for 0 bits at the highest magnitude. Pillow made that black, and since 13.0 refuses it.
    return posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class RandomCrop(RandomResizedCropAndInterpolation):
    """Timm's random resized crop with the same draws, resized by torch: in a third of Pillow's time, with values
    within 2 of its. Evaluation is left to Pillow.
    """

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """PIL image or (3, height, width) uint8 → (3, size, size) uint8."""
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        if isinstance(image, Tensor):
            crop = image[:, top : top + height, left : left + width]
        else:
            pixels = np.array(image.crop((left, top, left + width, top + height)))
            crop = torch.from_numpy(pixels).permute(2, 0, 1)
        return interpolate(crop[None], self.size, mode=self.interpolation.value, antialias=True)[0]


def calm_transform(config: AugmentConfig) -> ImageTransform | None:
    """What replaces :func:`train_transform` in the last ``config.calm_epochs`` epochs; None if nothing does."""
    return train_transform(replace(config, kind="fbn1", calm_epochs=0)) if config.calm_epochs else None


def test_transform(config: AugmentConfig) -> ImageTransform:
    """PIL image → (3, size, size) uint8: the shorter side to size / crop, then the centre."""
    return create_transform(
        config.size,
        is_training=False,
        use_prefetcher=False,
        interpolation=config.interpolation,
        crop_pct=config.crop,
        normalize=False,
    )


class Normalize:
    """uint8 images on their device → float32, (x / 255 − mean) / std; float images pass as they are."""

    def __init__(self, config: AugmentConfig, device: torch.device) -> None:
        self.mean = 255 * torch.tensor(config.mean, device=device).view(3, 1, 1)
        self.scale = 1 / (255 * torch.tensor(config.std, device=device).view(3, 1, 1))

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        return torch.sub(images, self.mean).mul_(self.scale)  # without a float copy of the images


def _fbn(image: Image.Image, level: int, size: int, hflip: float, fill: Colour) -> Tensor:
    return pil_to_tensor(fbn_augment(image, level, size, hflip, fill))


@contextmanager
def seeded(seed: int, draw: Draw) -> Iterator[None]:
    """Python's, NumPy's and torch's CPU generators as a function of (seed, draw); afterwards restored, except in a
    worker process, which has no other use for them.
    """
    state = np.random.SeedSequence([seed, *draw]).generate_state(2)
    before = None if get_worker_info() else (random.getstate(), np.random.get_state(), torch.get_rng_state())
    random.seed(int(state[0]))
    np.random.seed(state[0])
    torch.default_generator.manual_seed(int(state[1]))
    try:
        yield
    finally:
        if before:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])
