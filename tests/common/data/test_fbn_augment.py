"""FBN's three levels of augmentation: their ranges, their geometry, and the calm last epochs."""

import colorsys
import random

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import fbn_augment
from common.data.augment import AugmentConfig, train_transform
from common.data.digits import prepare_digits
from common.data.fbn_augment import (
    hsl_to_rgb,
    random_affine_crop,
    random_crop,
    rgb_to_hsl,
    shift_colours,
    with_shorter_side,
)
from common.data.images import DataConfig, open_images
from common.data.order import Draw

FILL = (124, 117, 104)


def ramps(width, height):
    """Red is the column and green the row, in 1/255 of the side; blue is 0."""
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).round().astype(np.uint8))


def slopes(crop, width, height):
    """How many pixels of an image of width × height lie in a pixel of its crop: the crop's linear map, 2×2."""
    pixels = np.asarray(crop, np.float64)
    inside = (pixels[..., 2] == 0) & (pixels[..., :2] > 3).all(-1) & (pixels[..., :2] < 252).all(-1)
    y, x = np.nonzero(inside)
    design = np.stack([x, y, np.ones_like(x)], 1)
    fit, *_ = np.linalg.lstsq(design, pixels[y, x, :2] / 255 * (width, height), rcond=None)
    return fit[:2].T


def noise(width=600, height=500):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("level", fbn_augment.LEVELS)
@pytest.mark.parametrize("shape", [(600, 500), (300, 700), (40, 30), (480, 480)])
def test_any_image_gives_a_crop_of_the_right_size(level, shape):
    random.seed(0)
    for _ in range(5):
        crop = fbn_augment.fbn_augment(noise(*shape), level, 224, 0.5, FILL)
        assert (crop.size, crop.mode) == ((224, 224), "RGB")


def test_level_1_only_crops_and_flips():
    random.seed(0)
    image = with_shorter_side(ramps(320, 256), 256)
    seen, flips = set(), 0
    for _ in range(200):
        pixels = np.asarray(fbn_augment.fbn_augment(ramps(320, 256), 1, 224, 0.5, FILL)).astype(int)
        flipped = pixels[0, 0, 0] > pixels[0, -1, 0]
        flips += flipped
        pixels = pixels[:, ::-1] if flipped else pixels
        columns = np.asarray(image)[0, :, 0]
        left = next(x for x in range(97) if (columns[x : x + 224] == pixels[0, :, 0]).all())
        top = next(y for y in range(33) if np.asarray(image)[y, 0, 1] == pixels[0, 0, 1])
        assert (np.asarray(image)[top : top + 224, left : left + 224] == pixels).all()
        seen.add((left, top))
    assert 70 < flips < 130
    assert {0, 96} <= {left // 2 * 2 for left, _ in seen}, "the crop goes from edge to edge"
    assert {0, 32} <= {top for _, top in seen}


def test_level_2_scales_and_stretches_within_its_ranges():
    random.seed(0)
    image = ramps(640, 640)
    scales, aspects = [], []
    for _ in range(150):
        across, down = np.diag(slopes(random_affine_crop(image, 160, False, FILL), 640, 640))
        scales.append((1 / across + 1 / down) / 2)
        aspects.append(across / down)
    assert 0.53 < min(scales) < 0.56 < 0.97 < max(scales) < 1.005
    assert 0.745 < min(aspects) < 0.77 < 1.23 < max(aspects) < 1.255


def test_level_3_also_turns_and_shears_within_its_ranges():
    random.seed(0)
    image = ramps(640, 640)
    angles, shears = [], []
    for _ in range(150):
        forward = np.linalg.inv(slopes(random_affine_crop(image, 160, True, FILL), 640, 640))
        angle = np.arctan2(forward[1, 0], forward[0, 0])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        upright = turn.T @ forward  # shear · diag(factors)
        angles.append(np.degrees(angle))
        shears.append(upright[0, 1] / upright[1, 1])
    assert -10.1 < min(angles) < -9 < 9 < max(angles) < 10.1
    assert -0.105 < min(shears) < -0.09 < 0.09 < max(shears) < 0.105


def test_turning_keeps_the_place_of_the_crop(monkeypatch):
    """Without angle and shear, the way of level 3 gives the pixels of level 2, but for the resampling."""
    monkeypatch.setattr(fbn_augment, "ANGLE", 0.0)
    monkeypatch.setattr(fbn_augment, "SHEAR", 0.0)

    def crop(turn):
        random.seed(3)
        drawn = [random.uniform(*fbn_augment.SCALE), random.uniform(0.75, 1.25)]
        monkeypatch.setattr(random, "uniform", lambda low, high: drawn.pop(0) if drawn else 0.0)
        monkeypatch.setattr(random, "randint", lambda low, high: high // 3)
        pixels = np.asarray(random_affine_crop(ramps(640, 480), 160, turn, FILL), np.float64)
        monkeypatch.undo()
        return pixels

    assert np.abs(crop(True) - crop(False)).max() <= 1


def test_outside_the_image_is_the_fill_colour():
    random.seed(0)
    white = Image.new("RGB", (240, 240), (255, 255, 255))
    found = set()
    for _ in range(50):
        found |= {colour for _, colour in random_affine_crop(white, 224, True, FILL).getcolors(99999)}
    assert FILL in found
    assert (255, 255, 255) in found


def test_conversion_is_the_textbooks():
    pixels = np.random.default_rng(0).integers(0, 256, (500, 3)) / 255
    pixels[:3] = [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5]]
    hues, saturations, lights = rgb_to_hsl(pixels)
    for pixel, h, s, light in zip(pixels, hues, saturations, lights):
        expected_h, expected_light, expected_s = colorsys.rgb_to_hls(*pixel)
        assert (h, s, light) == pytest.approx((expected_h, expected_s, expected_light), abs=1e-9)
    np.testing.assert_allclose(hsl_to_rgb(hues, saturations, lights), pixels, atol=1e-9)


def test_colours_shift_by_their_amount_and_no_more():
    red = Image.new("RGB", (2, 2), (191, 64, 64))  # saturation 127, lightness 127.5
    assert shift_colours(red, 0, 0, 0).getpixel((0, 0)) == (191, 64, 64)
    assert shift_colours(red, 85, 0, 0).getpixel((0, 0)) == (64, 191, 64), "a third of the circle is green"
    assert shift_colours(red, -170, 0, 0).getpixel((0, 0)) == (64, 191, 64), "and the circle closes"
    assert shift_colours(red, 0, 0, 50).getpixel((0, 0))[0] > 191
    assert shift_colours(red, 0, 200, 0).getpixel((0, 0)) == (255, 0, 0), "saturation is clipped"
    assert shift_colours(red, 0, 0, 200).getpixel((0, 0)) == (255, 255, 255)


def test_levels_2_and_3_shift_colours_within_the_published_ranges(monkeypatch):
    drawn = []
    monkeypatch.setattr(fbn_augment, "shift_colours", lambda image, *shifts: drawn.append(shifts) or image)
    random.seed(0)
    for level in (1, 2, 3) * 60:
        fbn_augment.fbn_augment(Image.new("RGB", (64, 64)), level, 16, 0.0, FILL)
    assert len(drawn) == 120, "level 1 leaves colours alone"
    reach = np.abs(drawn).max(0)
    assert (reach <= (36, 50, 50)).all()
    assert (reach > (33, 46, 46)).all()


def test_random_crop_enlarges_what_is_too_small():
    assert random_crop(noise(20, 30), 24).size == (24, 24)


def test_a_transform_is_a_function_of_pythons_generator_alone():
    transform = train_transform(AugmentConfig(kind="fbn3", size=64))
    images = []
    for torch_seed in (0, 1):
        random.seed(5)
        np.random.seed(torch_seed)
        torch.manual_seed(torch_seed)
        images.append(transform(noise()))
    assert images[0].dtype == torch.uint8
    assert images[0].shape == (3, 64, 64)
    assert torch.equal(*images)


def test_the_last_epochs_are_calm(tmp_path):
    prepare_digits(tmp_path / "digits", "folder")
    data = DataConfig(path=str(tmp_path / "digits"))
    augment = AugmentConfig(kind="fbn2", calm_epochs=2, size=32)
    phased = open_images(data, augment, "train", 0, epochs=6)
    wild, calm = (
        open_images(data, AugmentConfig(kind=kind, size=32), "train", 0) for kind in ("fbn2", "fbn1")
    )
    for epoch in range(6):
        draw = Draw(epoch, 3)
        expected = (wild if epoch < 4 else calm).row(draw).inputs
        assert torch.equal(phased.row(draw).inputs, expected), epoch
        assert not torch.equal(wild.row(draw).inputs, calm.row(draw).inputs)


@pytest.mark.parametrize("kind, epochs", [("standard", 10), ("fbn1", 10), ("fbn2", -1)])
def test_calm_epochs_need_something_to_calm(kind, epochs):
    with pytest.raises(
        ValueError, match=f"calm_epochs = {epochs}: expected 0, or more with kind = fbn2 or fbn3"
    ):
        AugmentConfig(kind=kind, calm_epochs=epochs)
