"""The set in memory: the same stream and the same draws whoever asks, crops by definition, every form the same."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from common.data.arrays import open_arrays, write_arrays
from common.data.folder import write_folder
from common.data.im2rec import Im2recSource
from common.data.loader import FILLER, UNREADABLE
from common.data.memory import (
    CropConfig,
    MemoryConfig,
    MemorySet,
    _take,
    _windows,
    crops,
    evaluation_batches,
    load_memory,
    train_batches,
)
from common.data.order import Division, Order
from common.data.recordio import frame, pack, write_recordio
from common.data.shard_writer import write_shards
from common.data.source import DataError

SIZE, SAMPLES = 12, 22
CLASSES = ("cat", "dog", "eel")
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (SAMPLES, 3, SIZE, SIZE), np.uint8)
LABELS = np.sort(np.arange(SAMPLES) % 3)
CROP = CropConfig(size=SIZE, pad=2)
DATA = MemorySet(torch.from_numpy(IMAGES), torch.from_numpy(LABELS), CLASSES)


def encoded(kind="PNG"):
    for number, (image, label) in enumerate(zip(IMAGES, LABELS.tolist())):
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(file, kind)
        yield f"{number:03d}", file.getvalue(), label


def write_form(root, form, samples=None, split="train"):
    root.mkdir(exist_ok=True)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    if form == "memory":
        write_arrays(root, split, IMAGES, LABELS, CLASSES)
    else:
        writer = {"folder": write_folder, "recordio": write_recordio, "webdataset": write_shards}[form]
        writer(root, split, encoded() if samples is None else samples, CLASSES)
    return root


def load(root, training=True, **options):
    return load_memory(MemoryConfig(path=str(root), workers=0, **options), "train", SIZE, training)


def batches(step=0, steps=7, data=DATA, crop=CROP, **division):
    order = Order(len(data), seed=5)
    return list(train_batches(data, crop, order, Division(8, **division), steps)(step))


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_table_of_draws_is_the_order(repeats):
    order = Order(10, seed=3, repeats=repeats)
    one_by_one = [tuple(order[index]) for index in range(7, 34)]
    assert order.table(range(7, 34)).tolist() == [list(draw) for draw in one_by_one]


def test_the_stream_is_that_of_the_order_whoever_shares_in_it():
    order = Order(SAMPLES, seed=5)
    alone = batches()
    expected = [LABELS[order[index].sample] for index in range(56)]
    assert torch.cat([batch.targets for batch in alone]).tolist() == expected
    parts = [batches(world=2, rank=rank, accumulation=2) for rank in (0, 1)]
    for step, batch in enumerate(alone):
        pieces = [parts[rank][2 * step + micro] for micro in (0, 1) for rank in (0, 1)]
        assert torch.equal(torch.cat([piece.inputs for piece in pieces]), batch.inputs)
        assert torch.equal(torch.cat([piece.targets for piece in pieces]), batch.targets)


def test_it_goes_on_exactly_from_any_step():
    whole = batches()
    for step in (1, 4, 6):
        for ours, theirs in zip(batches(step), whole[step:], strict=True):
            assert torch.equal(ours.inputs, theirs.inputs)


def test_crops_are_those_of_torchvision():
    order, index = Order(SAMPLES, seed=5), 0
    for batch in batches():
        for row in batch.inputs:
            sample, flip, top, left = crops(5, order.table(range(index, index + 1)), CROP)[:, 0].tolist()
            padded = TF.pad(torch.from_numpy(IMAGES[sample]), [2])
            expected = TF.crop(TF.hflip(padded) if flip else padded, top, left, SIZE, SIZE).float()
            mean = torch.tensor([123.68, 116.779, 103.939]).view(3, 1, 1)
            torch.testing.assert_close(row, expected - mean)
            index += 1


def test_without_padding_and_flip_images_stay_as_they_are():
    crop = CropConfig(size=SIZE, pad=0, hflip=0.0, mean=(0.0,) * 3)
    table = Order(SAMPLES, seed=5).table(range(8))
    assert torch.equal(batches(steps=1, crop=crop)[0].inputs, torch.from_numpy(IMAGES[table[:, 1]]).float())


def test_draws_are_uniform_and_depend_on_seed_epoch_sample_and_copy():
    crop = CropConfig(pad=4, hflip=0.25)
    table = np.stack(
        [np.repeat(np.arange(10), 9000), np.tile(np.arange(9000), 10), np.zeros(90000, np.int64)], 1
    )
    _, flip, top, left = drawn = crops(1, table, crop)
    assert abs(flip.mean() - 0.25) < 0.01
    cells = np.bincount(9 * top + left, minlength=81)
    # 81 cells of 1,111 on average: deviation 33; chi-square with 80 degrees of freedom exceeds 150 once in 300,000.
    assert ((cells - 90000 / 81) ** 2 / (90000 / 81)).sum() < 150
    assert abs(np.corrcoef(np.stack([flip, top, left])) - np.eye(3)).max() < 0.02
    by_epoch = drawn[1:].reshape(3, 10, 9000)
    assert abs(np.corrcoef(by_epoch[1]) - np.eye(10)).max() < 0.06
    other = [crops(2, table, crop), crops(1, table + np.array([0, 0, 1]), crop)]
    assert all((drawn[1:] == changed[1:]).all(0).mean() < 0.02 for changed in other)
    assert np.array_equal(crops(1, table[500:600], crop), drawn[:, 500:600]), "not of the batch"


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_sees_every_sample_once(world):
    per_rank = [list(evaluation_batches(DATA, CROP, 4, world, rank)()) for rank in range(world)]
    assert len({len(found) for found in per_rank}) == 1
    seen = [row for found in per_rank for batch in found for row in zip(batch.inputs, batch.targets.tolist())]
    labelled = [(image, target) for image, target in seen if target != FILLER]
    assert sorted(target for _, target in labelled) == LABELS.tolist()
    total = sum(image.double().sum() for image, _ in labelled)
    mean = np.array([123.68, 116.779, 103.939]).sum() * SIZE * SIZE * SAMPLES
    assert float(total) == pytest.approx(IMAGES.sum() - mean)


def test_every_form_gives_the_same_set(tmp_path):
    reference = load(write_form(tmp_path / "memory", "memory"))
    assert torch.equal(reference.images, DATA.images)
    assert torch.equal(reference.targets, DATA.targets)
    for form in ("recordio", "webdataset", "folder"):
        assert load(write_form(tmp_path / form, form)).fingerprint() == reference.fingerprint()
    changed = MemorySet(DATA.images.clone(), DATA.targets, CLASSES)
    changed.images[3, 1, 4, 4] ^= 1
    assert changed.fingerprint() != reference.fingerprint()


def test_larger_images_are_resized(tmp_path):
    root = write_form(tmp_path / "folder", "folder")
    data = load_memory(MemoryConfig(path=str(root), workers=0), "train", 8, True)
    assert data.images.shape == (SAMPLES, 3, 8, 8)


def test_an_unreadable_image_is_replaced_in_training_and_wrong_in_evaluation(tmp_path):
    samples = list(encoded())
    samples[4] = (samples[4][0], samples[4][1][:60], samples[4][2])
    root = write_form(tmp_path / "recordio", "recordio", samples)
    training, evaluation = load(root), load(root, training=False)
    assert torch.equal(training.images[4], training.images[5])
    assert evaluation.targets.tolist() == [*LABELS[:4], UNREADABLE, *LABELS[5:]]
    for data in (training, evaluation):
        assert [bad.reason for bad in data.unreadable] == ["truncated"]
    for made in (batches(data=training, world=2, rank=rank) for rank in (0, 1)):
        assert not any(batch.unreadable for batch in made[1:])
    reported = [batches(data=training, world=2, rank=rank)[0].unreadable for rank in (0, 1)]
    assert sorted(map(len, reported)) == [0, 1]
    assert sum(len(batch.unreadable) for batch in evaluation_batches(evaluation, CROP, 4, 1, 0)()) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_what_im2rec_writes_is_read_as_it_is(tmp_path, kind):
    samples = list(encoded(kind))
    key, data, label = samples[2]
    samples[2] = key, data + bytes(-len(data) % 4) + b"\x0a\x23\xd7\xce" * 2, label  # cut into parts
    records = [frame(pack(data, label, number + 7)) for number, (_, data, label) in enumerate(samples)]
    (tmp_path / "train.rec").write_bytes(b"".join(records))
    source = Im2recSource(tmp_path / "train.rec")
    assert [source.read(index) for index in range(len(source))] == [
        (data, label) for _, data, label in samples
    ]
    data = load(tmp_path)
    assert (data.classes, data.targets.tolist()) == (("0", "1", "2"), LABELS.tolist())
    assert kind == "JPEG" or torch.equal(data.images, DATA.images)


def test_a_damaged_rec_file_is_one_line(tmp_path):
    rec = tmp_path / "train.rec"
    whole = b"".join(frame(pack(data, label, 0)) for _, data, label in encoded())
    for content, words in (
        (whole[:-4], "the last record goes on"),
        (b"", "not a whole RecordIO file"),
        (b"x" * 100, "no RecordIO magic"),
        (whole + b"\0" * 8, "no RecordIO magic"),
        (frame(pack(b"", [1, 2], 0)), "no record has a single class index"),
    ):
        rec.write_bytes(content)
        with pytest.raises(DataError, match=words) as raised:
            load(tmp_path)
        assert "\n" not in str(raised.value)


def test_damaged_arrays_are_one_line(tmp_path):
    root = write_form(tmp_path / "memory", "memory")
    images = (root / "train.npy").read_bytes()
    for name, content, words in (
        ("train.npy", images[:-1], "train.npy is damaged"),
        ("train.npy", images[:-1] + b"!", "train.npy is damaged"),
        ("train.labels.npy", None, "No such file"),
        ("train.json", b"{", "is damaged"),
        ("train.json", b'{"sha256": {}, "classes": []}', "does not fit"),
        ("classes.txt", b"cat\ndog\n", "does not fit"),
    ):
        before = (root / name).read_bytes()
        (root / name).unlink() if content is None else (root / name).write_bytes(content)
        with pytest.raises(DataError, match=words):
            load(root)
        (root / name).write_bytes(before)
    with pytest.raises(DataError, match=r"images of 12×12 pixels, augment.size is 32"):
        load_memory(MemoryConfig(path=str(root)), "train", 32, True)
    with pytest.raises(DataError, match="no memory data of split 'val'"):
        load_memory(MemoryConfig(path=str(root), format="memory"), "val", SIZE, False)


def test_the_file_is_never_written_to(tmp_path):
    root = write_form(tmp_path / "memory", "memory")
    before = (root / "train.npy").read_bytes()
    load(root).images.zero_()
    assert (root / "train.npy").read_bytes() == before


def test_arrays_that_cannot_be_written(tmp_path: Path):
    for images, labels in (
        (IMAGES.astype(float), LABELS),
        (IMAGES, LABELS[1:]),
        (IMAGES, LABELS + 1),
        (IMAGES[:0], LABELS[:0]),
    ):
        with pytest.raises(ValueError, match="expected"):
            write_arrays(tmp_path, "train", images, labels, CLASSES)
    assert open_arrays(tmp_path, "train") is None
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_batches_on_the_gpu_are_those_of_the_cpu():
    for ours, theirs in zip(batches(data=DATA.to(torch.device("cuda"))), batches(), strict=True):
        assert ours.inputs.is_cuda
        torch.testing.assert_close(ours.inputs.cpu(), theirs.inputs)
        assert torch.equal(ours.targets.cpu(), theirs.targets)


def test_both_ways_of_taking_crops_are_the_same():
    index = crops(5, Order(SAMPLES, seed=5).table(range(40)), CROP)
    windows = _windows(DATA.images, CROP)
    sample, flip, top, left = torch.from_numpy(index)
    assert torch.equal(_take(windows, index), windows[sample, flip, :, top, left])
