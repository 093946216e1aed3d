"""What is damaged is named by DALI's backend as by torch's: what DALI decodes is told from the markers."""

from __future__ import annotations

import random

import pytest
from PIL import Image

from common.data import augment as augmentation
from common.data import dali
from common.data.augment import AugmentConfig, Normalize
from common.data.images import DataConfig, ImageSet
from common.data.jpeg import plain_jpeg
from common.data.loader import UNREADABLE, evaluation_loader
from tests.common.data.backends import CPU, SIZE, encode, evaluation, levels, photos, same, samples, training
from tests.common.data.forms import FORM_NAMES, damage, few_digits, write_split

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")


def damaged() -> list[tuple[str, bytes, int]]:
    """With a truncated, an empty and a text file, and one whose damage only decoding finds."""
    found = samples()
    broken = bytearray(found[6][1])
    table = broken.find(b"\xff\xc4")
    broken[table + 5 : table + 21] = b"\xff" * 16
    assert plain_jpeg(bytes(broken))
    for place, data in ((3, found[3][1][:2000]), (6, bytes(broken)), (7, b""), (12, b"no image at all")):
        found[place] = (found[place][0], data, found[place][2])
    return found


@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_samples_are_named_and_replaced_alike(tmp_path, form, workers, capfd):
    for split in ("train", "val"):
        write_split(tmp_path, form, damaged(), split)
    augment = AugmentConfig(size=SIZE)
    ours = training(tmp_path, "dali", augment, workers=workers)
    off = levels(ours, training(tmp_path, "torch", augment), augment)
    assert off.max() <= 1.01
    assert len({bad for batch in ours for bad in batch.unreadable}) == 4
    assert all(map(same, ours[5:], training(tmp_path, "dali", augment, start=5)))
    ours = evaluation(tmp_path, "dali", augment, workers=workers)
    off = levels(ours, evaluation(tmp_path, "torch", augment), augment)
    assert off.max() <= 1.01
    assert sum(int((batch.targets == UNREADABLE).sum()) for batch in ours) == 4
    assert "warning: DALI gave up a batch" in capfd.readouterr().err


class Listed:
    """A source of bytes in memory."""

    classes = ("0",)

    def __init__(self, images: list[bytes]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[bytes, int]:
        return self.images[index], 0

    def where(self, index: int) -> str:
        return f"image {index}"

    def shard(self, index: int) -> str:
        return "memory"


@pytest.mark.filterwarnings("ignore")
def test_any_damage_is_judged_alike(capfd):
    """What a stricter or laxer decoder would let pass or refuse."""
    draw = random.Random(5)
    small = photos()[3].resize((60, 48))
    whole = [encode(small), encode(small, progressive=True), encode(small.convert("L")), few_digits(1)[0][1]]
    images = []
    for _ in range(250):
        data = bytearray(draw.choice(whole))
        images.append(damage(bytes(data), draw))
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(2, len(data) - 2)] = draw.randrange(256)
        images.append(bytes(data))
    augment, config = AugmentConfig(size=32), DataConfig(workers=0)
    judged = []
    for backend in ("dali", "torch"):
        if backend == "dali":
            data = dali.open_dali(Listed(images), "cpu", augment, False, 0)
        else:
            data = ImageSet(Listed(images), augmentation.test_transform(augment), 0, 32, False)
        make = evaluation_loader(data, len(images), 4, 1, 0, config, CPU, Normalize(augment, CPU))
        judged.append(list(make()))
    off = levels(*judged, augment)
    assert off.max() <= 1.01
    assert 50 < sum(len(batch.unreadable) for batch in judged[0]) < 450
    capfd.readouterr()  # libjpeg's own words


def test_which_jpegs_are_plain():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turned, upright = Image.Exif(), Image.Exif()
    turned[0x0112], upright[0x0112] = 3, 1
    picture = photos()[3]
    whole = encode(picture)
    for data in (
        whole,
        encode(picture, progressive=True),
        encode(picture, subsampling=0, optimize=True),
        encode(picture, exif=upright),
        encode(picture, comment=b"words"),
        encode(picture, restart_marker_blocks=2),
        encode(picture.convert("L")),
    ):
        assert plain_jpeg(data) == picture.size
    for data in (
        whole[:-1],
        whole[:-2],
        whole + b"\0",
        whole[: len(whole) // 2] + whole[-2:][:1],
        whole[: len(whole) // 2] + b"\xff\xc4" + whole[len(whole) // 2 :],
        encode(picture, exif=turned),
        encode(picture, xmp=xmp),
        encode(picture.convert("CMYK")),
        encode(picture, keep_rgb=True),
        encode(picture, "PNG"),
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xd9",
    ):
        assert plain_jpeg(data) is None
