"""DALI makes what the torch backend makes: the same samples, crops, flips, colours, erased patches and quarantine."""

from __future__ import annotations

import io
import json
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation

from common.data import augment as augmentation
from common.data import dali
from common.data.augment import AugmentConfig, Normalize
from common.data.digits import prepare_digits
from common.data.images import DataConfig, ImageSet, open_images
from common.data.jpeg import plain_jpeg
from common.data.loader import FILLER, UNREADABLE, evaluation_loader, train_batches
from common.data.order import Division, Order
from common.data.tensor_augment import change_colours
from common.errors import ConfigError
from tests.common.data.forms import FORM_NAMES, damage, few_digits, write_split
from tests.processes import error_line, interrupt, metrics, run, settings, train

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")

CPU = torch.device("cpu")
SIZE = 48


def encode(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photos() -> list[Image.Image]:
    """Parts of two photographs of 640 × 427."""
    whole = [Image.fromarray(picture) for picture in load_sample_images().images]
    boxes = [
        (0, 0, 640, 427),
        (100, 20, 600, 395),
        (30, 40, 280, 410),
        (200, 100, 300, 180),
        (0, 0, 301, 300),
    ]
    return [picture.crop(box) for picture in whole for box in boxes]


def kinds() -> list[bytes]:
    """Photographs in every encoding that ImageNet and others hold."""
    pictures, turned = photos(), Image.Exif()
    turned[0x0112] = 6
    plain = [encode(picture, quality=90) for picture in pictures]
    first, small = pictures[1], pictures[3]
    return [
        *plain,
        encode(first, progressive=True),
        encode(first, quality=95, subsampling=0),
        encode(first, quality=95, subsampling=1),
        encode(first.convert("L")),
        encode(first.convert("CMYK")),
        encode(first, exif=turned),
        encode(first, xmp=b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'),
        encode(small, "PNG"),
        encode(small.convert("RGBA"), "PNG"),
        encode(small.quantize(32), "PNG"),
        encode(small.convert("L"), "WEBP"),
    ]


def samples() -> list[tuple[str, bytes, int]]:
    found = [(f"{n:04d}", data, n % 10) for n, data in enumerate(kinds())]
    return found + [(f"9{key}", data, label) for key, data, label in few_digits(11)]


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("forms")
    for form in FORM_NAMES:
        for split in ("train", "val"):
            write_split(root / form, form, samples(), split)
    return root


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("digits") / "digits"
    prepare_digits(root, "folder")
    return root


def train_set(path, backend, augment, workers=0, seed=0):
    config = DataConfig(path=str(path), workers=workers, backend=backend)
    return open_images(config, augment, "train", seed), config


def training(path, backend, augment, batch=8, steps=8, start=0, workers=0, world=1, rank=0, parts=1):
    data, config = train_set(path, backend, augment, workers)
    order, division = Order(len(data.source), 0), Division(batch, parts, world, rank)
    return list(train_batches(data, order, division, steps, config, CPU, Normalize(augment, CPU))(start))


def evaluation(path, backend, augment, batch=8, workers=0, world=1, rank=0):
    config = DataConfig(path=str(path), workers=workers, backend=backend)
    data = open_images(config, augment, "val", 0)
    finish = Normalize(augment, CPU)
    return list(evaluation_loader(data, len(data.source), batch, world, rank, config, CPU, finish)())


def levels(ours, theirs, augment) -> torch.Tensor:
    """By how many of 256 levels each value differs; all else of the batches is equal."""
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs):
        assert torch.equal(mine.targets, other.targets)
        assert mine.unreadable == other.unreadable
        assert mine.inputs.dtype == torch.float32
        assert mine.inputs.is_contiguous()
    difference = torch.cat([a.inputs for a in ours]) - torch.cat([b.inputs for b in theirs])
    return (difference * torch.tensor(augment.std).view(3, 1, 1) * 255).abs()


def same(a, b) -> bool:
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


@pytest.mark.parametrize("interpolation, most", [("bilinear", 1), ("bicubic", 3)])
@pytest.mark.parametrize("form", FORM_NAMES)
def test_evaluation_agrees_on_every_image(forms, form, interpolation, most):
    augment = AugmentConfig(size=SIZE, interpolation=interpolation)
    off = levels(*(evaluation(forms / form, backend, augment) for backend in ("dali", "torch")), augment)
    assert off.max() <= most + 0.01
    assert off.mean() < 0.02


@pytest.mark.parametrize("crop, size", [(1.0, 32), (0.875, 224), (0.95, 65)])
def test_evaluation_agrees_at_every_crop(forms, crop, size):
    augment = AugmentConfig(size=size, crop=crop)
    off = levels(*(evaluation(forms / "recordio", b, augment) for b in ("dali", "torch")), augment)
    assert off.max() <= 1.01


@pytest.mark.parametrize("form", FORM_NAMES)
def test_training_takes_the_same_crops_and_flips(forms, form):
    augment = AugmentConfig(size=SIZE, ratio=(0.5, 2))
    off = levels(*(training(forms / form, backend, augment) for backend in ("dali", "torch")), augment)
    assert off.max() <= 1.01


def test_training_changes_colours_and_erases_alike(forms):
    augment = AugmentConfig(size=SIZE, color_jitter=0.4, erasing=0.5, interpolation="bicubic", repeats=2)
    ours, theirs = (training(forms / "recordio", backend, augment) for backend in ("dali", "torch"))
    off = levels(ours, theirs, augment)
    assert off.max() <= 6
    assert off.mean() < 0.02
    erased = torch.cat([batch.inputs for batch in ours]) == torch.cat([batch.inputs for batch in theirs])
    noise = torch.cat([batch.inputs for batch in theirs]).abs() > 2.8  # no pixel of an image is so far out
    assert noise.any()
    assert erased[noise].all()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize(
    "auto", ["rand-m9-mstd0.5-inc1", "rand-m6-n3-mstd1.0-inc1", "rand-m9-n4-mstd101-tweights"]
)
def test_rand_augment_is_that_of_the_torch_backend(tmp_path, monkeypatch, auto, device):
    """To the bit, where nothing is resized; without draws that depend on the number of processes."""
    if device == "gpu":
        use_the_gpus_pipeline(monkeypatch)
    squares = [picture.crop((10, 5, 10 + SIZE, 5 + SIZE)) for picture in photos()]
    write_split(tmp_path, "recordio", [(f"{n}", encode(picture), n) for n, picture in enumerate(squares)])
    augment = AugmentConfig(size=SIZE, auto=auto, scale=(1, 1), ratio=(1, 1), erasing=0.3)
    ours = training(tmp_path, "dali", augment, steps=10)
    off = levels(ours, training(tmp_path, "torch", augment, steps=10), augment)
    assert off.max() < 0.01
    plain = training(tmp_path, "dali", AugmentConfig(size=SIZE, scale=(1, 1), ratio=(1, 1)), steps=10)
    assert sum(not torch.equal(a, b) for x, y in zip(ours, plain) for a, b in zip(x.inputs, y.inputs)) > 60
    parts = [
        training(tmp_path, "dali", augment, steps=10, world=2, rank=rank, workers=rank) for rank in (0, 1)
    ]
    for batch, *pieces in zip(ours, *parts):
        assert torch.equal(batch.inputs, torch.cat([piece.inputs for piece in pieces]))


def test_colours_change_as_in_pillow():
    draw = random.Random(0)
    images = [picture.resize((40, 30)) for picture in photos()]
    factors = [[(which, draw.uniform(0.2, 2.5)) for which in draw.sample(range(3), 3)] for _ in images]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    changed = change_colours(pixels, torch.tensor(factors))
    for image, changes, ours in zip(images, factors, changed):
        for which, factor in changes:
            image = (adjust_brightness, adjust_contrast, adjust_saturation)[which](image, factor)
        assert abs(np.asarray(image).astype(int) - ours.permute(1, 2, 0).numpy()).max() <= 1


def use_the_gpus_pipeline(monkeypatch):
    made = dali.Decoder.__init__

    def fused(self, *args):
        made(self, *args)
        self.fused = True

    monkeypatch.setattr(dali.Decoder, "__init__", fused)


@pytest.mark.parametrize("interpolation, most", [("bilinear", 1), ("bicubic", 12)])
def test_the_gpus_pipeline_agrees_but_at_the_images_edges(forms, monkeypatch, interpolation, most):
    """On the GPU DALI also resizes and flips; here the same operators run on the CPU."""
    use_the_gpus_pipeline(monkeypatch)
    for size, crop in ((SIZE, 0.875), (65, 0.95)):
        augment = AugmentConfig(size=size, crop=crop, interpolation=interpolation)
        off = levels(*(evaluation(forms / "recordio", b, augment) for b in ("dali", "torch")), augment)
        assert off.max() <= most + 0.01
        off = levels(*(training(forms / "recordio", b, augment) for b in ("dali", "torch")), augment)
        assert off[..., 1:-1, 1:-1].max() <= most + 0.01
        assert off.max() <= 32
        assert off.mean() < 0.25
    augment = AugmentConfig(size=SIZE, color_jitter=0.4, interpolation=interpolation)
    off = levels(*(training(forms / "recordio", b, augment) for b in ("dali", "torch")), augment)
    assert off[..., 1:-1, 1:-1].max() <= 1.4**3 * most + 3, "three factors up to 1.4, three roundings"
    augment = AugmentConfig(size=SIZE, auto="rand-n1", interpolation=interpolation)
    off = levels(*(training(forms / "recordio", b, augment) for b in ("dali", "torch")), augment)
    assert off.median() < 0.01, "some operations are steep"


def test_a_classifier_says_the_same_of_every_digit(digits):
    """A linear one, fitted by least squares to the torch backend's images."""
    augment = AugmentConfig(size=24, crop=1.0, scale=(0.9, 1.0), hflip=0.0)
    batches = training(digits, "torch", augment, batch=1442, steps=1)
    flat = torch.cat([b.inputs for b in batches]).mean(1).flatten(1).double()
    wanted = torch.nn.functional.one_hot(torch.cat([b.targets for b in batches]), 10).double()
    ridge = 10 * torch.eye(flat.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(flat.T @ flat + ridge, flat.T @ wanted)
    said = {}
    for backend in ("torch", "dali"):
        found = evaluation(digits, backend, augment, batch=71)
        labels = torch.cat([b.targets for b in found])
        said[backend] = (torch.cat([b.inputs for b in found]).mean(1).flatten(1).double() @ weights).argmax(1)
        assert (said[backend] == labels).float().mean() > 0.85
    assert torch.equal(said["torch"], said["dali"])


@pytest.mark.parametrize("form", FORM_NAMES)
def test_the_middle_of_a_run_and_other_workers_are_the_same_run(forms, form):
    augment = AugmentConfig(size=SIZE, color_jitter=0.4, erasing=0.5)
    whole = training(forms / form, "dali", augment)
    assert all(map(same, whole[3:], training(forms / form, "dali", augment, start=3)))
    if form == "recordio":
        assert all(map(same, whole[3:], training(forms / form, "dali", augment, start=3, workers=2)))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_see_parts_of_the_same_batches(forms, world):
    augment = AugmentConfig(size=SIZE)
    whole = training(forms / "webdataset", "dali", augment)
    parts = [training(forms / "webdataset", "dali", augment, world=world, rank=r) for r in range(world)]
    for batch, *pieces in zip(whole, *parts):
        assert torch.equal(batch.inputs, torch.cat([piece.inputs for piece in pieces]))
    labels = sorted(label for _, _, label in samples())
    epochs = torch.cat([batch.targets for batch in whole]).view(2, -1).tolist()
    assert [sorted(epoch) for epoch in epochs] == [labels, labels], "every sample once in each of two epochs"


def test_micro_batches_of_other_sizes_are_parts_of_the_same_batches(forms):
    augment = AugmentConfig(size=SIZE)
    whole = torch.cat([batch.inputs for batch in training(forms / "webdataset", "dali", augment)])
    parts = training(forms / "webdataset", "dali", augment, parts=3)
    assert [len(part.targets) for part in parts[:3]] == [2, 2, 4]
    assert torch.equal(whole, torch.cat([part.inputs for part in parts]))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_sample_once_on_any_number_of_processes(forms, world):
    augment = AugmentConfig(size=SIZE)
    parts = [evaluation(forms / "recordio", "dali", augment, 5, 0, world, rank) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    seen = torch.cat([batch.targets for part in zip(*parts) for batch in part])
    assert seen[seen != FILLER].tolist() == [label for _, _, label in samples()]
    assert (seen != FILLER).nonzero().max() == len(samples()) - 1


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


@pytest.mark.parametrize(
    "options, words",
    [
        ({"auto": "augmix-m5-w4-d2"}, "augment.auto = augmix-m5-w4-d2: the dali"),
        ({"kind": "fbn2"}, "augment.kind = fbn2"),
    ],
)
def test_augmentation_that_it_lacks_is_an_error_and_evaluation_is_not(digits, options, words):
    augment = AugmentConfig(size=SIZE, **options)
    with pytest.raises(ConfigError, match=words):
        training(digits, "dali", augment)
    assert evaluation(digits, "dali", augment, batch=355)


def test_what_is_missing_is_an_error(digits, monkeypatch):
    config = DataConfig(path=str(digits), backend="dali", device="gpu", workers=0)
    with pytest.raises(ConfigError, match="data.device = gpu: there is no GPU"):
        open_images(config, AugmentConfig(), "val", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = open_images(config, AugmentConfig(), "val", 0)
    batches = evaluation_loader(data, 8, 8, 1, 0, config, CPU, lambda images: images)()
    with pytest.raises(ConfigError, match="data.device = gpu: this process computes on cpu"):
        next(batches)
    with pytest.raises(ValueError, match="device = gpu: only with data.backend = dali"):
        DataConfig(device="gpu")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ConfigError, match="NVIDIA DALI cannot be imported .*pip install"):
        open_images(DataConfig(path=str(digits), backend="dali"), AugmentConfig(), "val", 0)


def test_the_main_processs_generators_are_left_alone(digits):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    training(digits, "dali", AugmentConfig(size=SIZE, erasing=0.5), steps=1)
    assert torch.equal(before, torch.get_rng_state())


OPTIONS = {
    "data__backend": "dali",
    "augment__auto": "null",
    "augment__color_jitter": 0.4,
    "augment__erasing": 0.3,
}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["recordio", "webdataset"])
def test_a_killed_training_goes_on_exactly(tmp_path, form):
    data = tmp_path / "digits"
    prepare_digits(data, form)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, data, **OPTIONS)
    assert interrupt(killed, data, 7, signal.SIGKILL, **OPTIONS) == -signal.SIGKILL
    assert interrupt(killed, data, 20, signal.SIGTERM, **OPTIONS) == 75
    train(killed, data, **OPTIONS)
    for split in ("train", "val"):
        assert metrics(killed, split) == metrics(whole, split)


@pytest.mark.slow
def test_both_backends_give_a_trained_network_the_same_accuracy(digits, tmp_path):
    """The demo's recipe, trained by DALI with two processes, evaluated by both."""
    folder = tmp_path / "run"
    options = {"out": folder, "data.path": digits, "train.epochs": 4, "data.backend": "dali"}
    done = run("image/train.py", processes=2, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for backend in ("dali", "torch"):
        done = run("image/eval.py", folder, data__backend=backend)
        assert done.returncode == 0, done.stderr[-3000:]
        found[backend] = json.loads((folder / "eval.json").read_text())
    assert found["dali"]["top1"] > 60
    assert found["dali"]["confusion"] == found["torch"]["confusion"]


@pytest.mark.slow
def test_another_backend_is_another_run(digits, tmp_path):
    assert interrupt(tmp_path / "run", digits, 5, signal.SIGTERM, **OPTIONS) == 75
    done = run(
        "image/train.py", **settings(tmp_path / "run", digits, **(OPTIONS | {"data__backend": "torch"}))
    )
    assert "data.backend: dali → torch" in error_line(done)
