"""Training's crop against timm's, and generators that are a function of the draw."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from common.data.augment import AugmentConfig, seeded, train_transform
from common.data.bench import photo
from common.data.decode import decode_rgb
from common.data.images import DataConfig, open_images
from common.data.jpeg import decode_plain
from common.data.order import Draw
from tests.common.data.forms import write_split

IMAGE = decode_rgb(photo(1), "photo")


@pytest.mark.parametrize("size", [32, 224, 500])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_crop_is_timms(size: int, interpolation: str) -> None:
    config = AugmentConfig(size=size, interpolation=interpolation)
    ours = train_transform(config).transforms[0]
    theirs = RandomResizedCropAndInterpolation(size, config.scale, config.ratio, interpolation)
    for seed in range(20):
        found = []
        for crop in (ours, theirs):
            random.seed(seed)
            found.append(np.asarray(crop(IMAGE), np.int16))
        apart = found[0] - found[1].transpose(2, 0, 1)
        assert np.abs(apart).max() <= 2
        assert abs(apart.mean()) < 0.25


@pytest.mark.parametrize(
    "mode, size", [("RGB", (500, 375)), ("RGB", (37, 91)), ("L", (64, 48)), ("RGB", (1, 1))]
)
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}]
)
def test_plain_jpegs_are_decoded_to_pillows_pixels(mode: str, size: tuple[int, int], options: dict) -> None:
    file = io.BytesIO()
    IMAGE.resize(size).convert(mode).save(file, "JPEG", **options)
    tensor = decode_plain(file.getvalue())
    assert tensor is not None
    assert torch.equal(tensor, pil_to_tensor(decode_rgb(file.getvalue(), "photo")))


@pytest.mark.parametrize("damage", [lambda data: data[:-1000], lambda data: data[2:], lambda data: b""])
def test_what_is_no_plain_jpeg_is_left_to_pillow(damage: Callable[[bytes], bytes]) -> None:
    assert decode_plain(damage(photo(1))) is None


@pytest.mark.parametrize("auto", [None, "rand-m5-mstd0.5"])
def test_the_training_set_decodes_either_way_to_the_same(tmp_path: Path, auto: str | None) -> None:
    write_split(tmp_path, "recordio", [("a", photo(1), 0), ("b", photo(2), 1)])
    data = open_images(DataConfig(path=str(tmp_path)), AugmentConfig(size=64, auto=auto), "train", seed=0)
    assert data.tensors
    for draw in (Draw(0, 0), Draw(0, 1), Draw(3, 1)):
        assert torch.equal(data.row(draw).inputs, replace(data, tensors=False).row(draw).inputs)


@pytest.mark.parametrize(
    "settings", [{}, {"auto": "rand-m9-mstd0.5"}, {"color_jitter": 0.4}, {"erasing": 0.25}]
)
def test_a_draw_makes_the_same_image_whatever_came_before(settings: dict) -> None:
    transform = train_transform(AugmentConfig(size=64, **settings))

    def image(draw: Draw) -> torch.Tensor:
        with seeded(5, draw):
            return transform(IMAGE)

    first = [image(Draw(1, sample)) for sample in range(4)]
    again = [image(Draw(1, sample)) for sample in reversed(range(4))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], first[1])
    assert {(part.shape, part.dtype) for part in first} == {
        (torch.Size([3, 64, 64]), torch.float32 if "erasing" in settings else torch.uint8)
    }


def test_the_main_process_gets_its_generators_back() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with seeded(0, Draw(0, 0)):
        drawn = random.random(), np.random.rand(), torch.rand(1).item()
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected != drawn


class Drawn:
    """What the three generators give for a draw."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> list[float]:
        with seeded(0, Draw(0, index)):
            return [random.random(), np.random.rand(), torch.rand(1).item()]


def test_worker_processes_draw_the_same() -> None:
    alone = [Drawn()[index] for index in range(6)]
    loader = DataLoader(Drawn(), num_workers=2, collate_fn=lambda rows: rows[0])  # type: ignore[arg-type]
    assert list(loader) == alone
