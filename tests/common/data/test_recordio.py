"""RecordIO: the format to the byte, damage, and DALI as the second reader."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest

from common.data.forms import open_source
from common.data.recordio import frame, pack, unframe, unpack
from common.data.source import BadSample, DataError
from tests.common.data.forms import few_digits, pairs, read_all, readable, write_split

MAGIC = struct.pack("<I", 0xCED7230A)


def awkward_images() -> list[bytes]:
    """Images that hold the magic at offsets that are and are not multiples of 4, at the ends and doubled."""
    draw = random.Random(1)
    images = []
    for offset in range(9):
        for tail in range(5):
            images.append(draw.randbytes(offset) + MAGIC + draw.randbytes(tail))
    images += [MAGIC * 3, b"ab" + MAGIC * 2, MAGIC[:3] + MAGIC, MAGIC[:1] + MAGIC * 2 + b"x" * 7]
    images += [draw.randbytes(40) + MAGIC + draw.randbytes(40) + MAGIC + draw.randbytes(41)]
    return images


def test_record_to_the_byte() -> None:
    payload = pack(b"\xff\xd8\xff", 5, 7, 9)
    assert payload == struct.pack("<IfQQ", 0, 5.0, 7, 9) + b"\xff\xd8\xff"
    assert frame(payload) == MAGIC + struct.pack("<I", 27) + payload + b"\0"


def test_record_is_cut_at_aligned_magics_only() -> None:
    cut = frame(pack(b"abcd" + MAGIC + b"xyz", 1, 2))
    first = struct.pack("<IfQQ", 0, 1.0, 2, 0) + b"abcd"
    assert (
        cut
        == MAGIC + struct.pack("<I", 1 << 29 | 28) + first + MAGIC + struct.pack("<I", 3 << 29 | 3) + b"xyz\0"
    )
    middle = frame(b"abcd" + MAGIC + b"efgh" + MAGIC)
    assert [middle[at + 7] >> 5 for at in (0, 12, 24)] == [1, 2, 3]
    assert len(middle) == 32
    payload = b"abc" + MAGIC + b"d"
    assert frame(payload) == MAGIC + struct.pack("<I", 8) + payload


def test_labels_behind_the_header() -> None:
    payload = pack(b"image", [1.5, -2.0], 3)
    assert payload == struct.pack("<IfQQff", 2, 0.0, 3, 0, 1.5, -2.0) + b"image"
    assert unpack(payload) == ((1.5, -2.0), 3, 0, b"image")


@pytest.mark.parametrize("labels", [4, [4.0, 5.0]])
def test_awkward_images_come_back(labels: float | list[float]) -> None:
    for image in awkward_images():
        assert unpack(unframe(frame(pack(image, labels, 6)))).image == image


MAGIC_FLOAT = struct.unpack("<f", MAGIC)[0]


@pytest.mark.parametrize(
    ("labels", "id", "id2"),
    [
        (MAGIC_FLOAT, 0, 0),
        ([1.0, MAGIC_FLOAT], 0, 0),
        (0, 0xCED7230A, 0),
        (0, 0xCED7230A << 32, 0),
        (0, 0, 0xCED7230A),
    ],
)
def test_header_that_holds_the_magic_is_refused(labels: float | list[float], id: int, id2: int) -> None:
    with pytest.raises(ValueError, match="bytes equal to RecordIO's magic"):
        pack(b"image", labels, id, id2)


@pytest.mark.parametrize(("labels", "id"), [(1e39, 0), (0, -1), (0, 1 << 64), ([], 0), ([1e39], 0)])
def test_header_values_that_do_not_fit_are_refused(labels: float | list[float], id: int) -> None:
    with pytest.raises(ValueError, match=r"do not fit|is empty"):
        pack(b"image", labels, id)


def test_a_magic_across_header_and_image_is_cut_behind_the_header() -> None:
    # The header's length is a multiple of 4, so a cut can never straddle its end.
    payload = pack(MAGIC[2:] + b"x", 0, 0, int.from_bytes(b"\0\0\0\0\0\0" + MAGIC[:2], "little"))
    assert frame(payload)[7] >> 5 == 0


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        (b"", "truncated", "inside a part's header"),
        (MAGIC + struct.pack("<I", 9) + b"x" * 8, "truncated", "length 9 where 8 bytes are left"),
        (b"....\0\0\0\0", "corrupt", "no RecordIO magic"),
        (MAGIC + struct.pack("<I", 3 << 29), "corrupt", "continuation flag 3 in part 0"),
        (MAGIC + struct.pack("<I", 5 << 29), "corrupt", "continuation flag 5 in part 0"),
        (MAGIC + struct.pack("<I", 1 << 29), "truncated", "inside a part's header"),
        ((MAGIC + struct.pack("<I", 1 << 29)) * 2, "corrupt", "continuation flag 1 in part 1"),
        (MAGIC + struct.pack("<I", 3) + b"abcd", "corrupt", "not zero padding"),
        (frame(b"abcd") + b"\0\0\0\0", "corrupt", "the index says 16"),
        (frame(b"abcd") * 2, "corrupt", "the index says 24"),
    ],
)
def test_damaged_records_are_typed(record: bytes, reason: str, detail: str) -> None:
    with pytest.raises(BadSample, match=detail) as raised:
        unframe(record, "here")
    assert (raised.value.reason, raised.value.where) == (reason, "here")


@pytest.mark.parametrize("payload", [b"", b"x" * 23, struct.pack("<IfQQ", 2, 0, 0, 0) + b"x" * 7])
def test_payloads_shorter_than_their_header(payload: bytes) -> None:
    with pytest.raises(BadSample, match="corrupt"):
        unpack(payload)


def write_records(root: Path, name: str, images: list[bytes], labels: list[float | list[float]]) -> None:
    (root / "classes.txt").write_text("a\nb\n")
    offset, lines = 0, []
    with open(root / f"{name}.rec", "wb") as file:
        for number, (image, label) in enumerate(zip(images, labels)):
            lines.append(f"{number}\t{offset}\n")
            offset += file.write(frame(pack(image, label, number)))
    (root / f"{name}.idx").write_text("".join(lines))


def test_labels_that_are_no_class_are_typed(tmp_path: Path) -> None:
    labels: list[float | list[float]] = [1, [1.0], 2, -1, 0.5, float("nan"), float("inf"), [0.0, 1.0]]
    write_records(tmp_path, "train", [b"image"] * len(labels), labels)
    source = open_source(tmp_path, "train")
    assert [source.read(0), source.read(1)] == [(b"image", 1)] * 2
    for index in range(2, len(labels)):
        with pytest.raises(BadSample, match="bad label"):
            source.read(index)


def test_several_parts_are_read_in_numeric_order(tmp_path: Path) -> None:
    for part in range(11):
        write_records(tmp_path, f"train_{part}", [b"%d.%d" % (part, n) for n in range(2)], [0, 1])
    source = open_source(tmp_path, "train")
    assert [data for data, _ in read_all(source)] == [
        b"%d.%d" % (part, n) for part in range(11) for n in range(2)
    ]
    assert source.where(21).startswith("train_10.rec record 1 at byte ")
    (tmp_path / "train_4.rec").unlink()
    with pytest.raises(DataError, match=r"train_4\.rec is missing; parts go up to 10"):
        open_source(tmp_path, "train")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["train_0", "train_00", "train_1"],
            r"train_00\.rec and train_0\.rec are the same part|train_0\.rec and train_00",
        ),
        (["train_0", "train_20261121123456"], r"train_1\.rec is missing; parts go up to 20261121123456"),
        (["train_1"], r"train_0\.rec is missing"),
        (["train", "train_0"], r"train\.rec and train_0\.rec are both there"),
    ],
)
def test_parts_are_numbered_without_gaps(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        write_records(tmp_path, name, [b"image"], [0])
    with pytest.raises(DataError, match=words):
        open_source(tmp_path, "train")


def test_parts_may_be_numbered_with_zeros_in_front(tmp_path: Path) -> None:
    for part in range(3):
        write_records(tmp_path, f"train_{part:03d}", [b"%d" % part], [0])
    assert [data for data, _ in read_all(open_source(tmp_path, "train"))] == [b"0", b"1", b"2"]


def test_index_is_sorted_by_offset_and_keys_do_not_matter(tmp_path: Path) -> None:
    write_split(tmp_path, "recordio", few_digits())
    idx = tmp_path / "train.idx"
    lines = idx.read_text().splitlines(keepends=True)
    idx.write_text("".join(reversed(lines)).rstrip("\n"))
    assert read_all(open_source(tmp_path, "train")) == pairs(few_digits())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda idx: "", "line 1: b'' is not"),
        (lambda idx: idx.replace("\t", " "), "line 1: b'0 0' is not 'key<TAB>offset'"),
        (lambda idx: idx + "12\t-4\n", r"line 13: b'12\\t-4' is not"),
        (lambda idx: idx + "12\t99999999999999999999\n", "line 13"),
        (lambda idx: idx + "12\t99999999\n", "the index has a record at byte 99999999, the file has"),
        (lambda idx: idx + "12\t0\n", "has byte 0 twice"),
        (lambda idx: idx[: idx.rindex("\n", 0, -1) + 1], "cut off or damaged"),
        (lambda idx: idx[:-3], "cut off or damaged"),
    ],
)
def test_index_that_does_not_fit_is_named(tmp_path: Path, change, words: str) -> None:
    write_split(tmp_path, "recordio", few_digits())
    idx = tmp_path / "train.idx"
    idx.write_text(change(idx.read_text()))
    with pytest.raises(DataError, match=words):
        open_source(tmp_path, "train")


def test_file_cut_off_or_without_index_is_named(tmp_path: Path) -> None:
    write_split(tmp_path, "recordio", few_digits())
    rec = tmp_path / "train.rec"
    data = rec.read_bytes()
    for cut in (1, 5, 2000):
        rec.write_bytes(data[:-cut])
        with pytest.raises(DataError, match=r"train.rec.*(cut off or damaged|the file has)"):
            open_source(tmp_path, "train")
    rec.write_bytes(data)
    source = open_source(tmp_path, "train")
    rec.write_bytes(data[:100])  # the file changes under an open source
    with pytest.raises(BadSample, match="truncated"):
        source.read(0)
    (tmp_path / "train.idx").unlink()
    with pytest.raises(DataError, match=r"train\.idx is missing"):
        open_source(tmp_path, "train")


def test_damaged_structure_never_gives_a_wrong_sample(tmp_path: Path) -> None:
    write_split(tmp_path, "recordio", few_digits(5))
    rec, idx = tmp_path / "train.rec", tmp_path / "train.idx"
    expected = pairs(few_digits(5))
    offsets = [int(line.split("\t")[1]) for line in idx.read_text().splitlines()]
    # magic, length and continuation flag, number of labels; then every byte of the index
    places = [(rec, offset + byte) for offset in offsets for byte in range(12)]
    places += [(idx, byte) for byte in range(idx.stat().st_size)]
    for path, place in places:
        original = path.read_bytes()
        for bit in range(8):
            changed = bytearray(original)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            for image, label in readable(tmp_path):
                # One more byte of length that falls into the padding cannot be noticed.
                assert any(image.rstrip(b"\0") == known and label == right for known, right in expected)
        path.write_bytes(original)


def test_dali_reads_what_we_write(tmp_path: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    samples = [*few_digits(100), *((f"x{n}", image, n % 10) for n, image in enumerate(awkward_images()))]
    write_split(tmp_path, "recordio", samples)

    @dali.pipeline_def(batch_size=len(samples), num_threads=1, device_id=None)
    def pipeline():
        return tuple(
            dali.fn.readers.mxnet(path=[f"{tmp_path}/train.rec"], index_path=[f"{tmp_path}/train.idx"])
        )

    pipe = pipeline()
    pipe.build()
    images, labels = pipe.run()
    found = [(np.array(images[n]).tobytes(), int(np.array(labels[n])[0])) for n in range(len(samples))]
    assert found == pairs(samples) == read_all(open_source(tmp_path, "train"))
