"""Thousands of damaged files through every reader: typed errors only, no wrong sample, no hang, no heap of memory.

These formats have no checksum of a sample. So what comes back must be an original, byte for byte, unless the damage
lies in that sample's own bytes.
"""

from __future__ import annotations

import random
import resource
import struct
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from common.data.forms import open_source
from common.data.im2rec import Im2recSource
from common.data.shard_writer import write_groups
from common.data.shards import scan
from common.data.source import BadSample, DataError, Sample, Source
from common.data.video.lists import read_list, write_list
from common.data.video.shards import open_clips
from tests.common.data.forms import damage, write_split

pytestmark = pytest.mark.timeout(300)  # a hang, not a slow machine

MAGIC = struct.pack("<I", 0xCED7230A)
HEAP = 200 << 20
"""Bytes that reading a few kilobytes may take at most, most of them for the interpreter's own arenas."""
NUMBERS = [b"0", b"-1", *(b"9" * n for n in (9, 18, 19, 30, 5000)), b"1e9", b"0x7f", "٣".encode(), b""]
WORDS = [0, 1, 1 << 20, 1 << 29, *((1 << n) - 1 for n in (29, 30, 31, 32)), 0x4B000000, 0xCED7230A]
FIELDS = {"name": (0, 100), "mode": (100, 108), "size": (124, 136), "type": (156, 157), "prefix": (345, 500)}


def short_samples() -> list[Sample]:
    """Short "images", so that much of a file is structure; some hold RecordIO's magic, which cuts a record."""
    draw = random.Random(3)
    images = [draw.randbytes(size) for size in (1, 30, 101, 257, 700)]
    images += [b"abcd" + MAGIC + b"xyz", MAGIC * 2, draw.randbytes(64) + MAGIC + draw.randbytes(41)]
    return [(f"{number:04d}", image, number) for number, image in enumerate(images)]


SAMPLES = short_samples()
WHOLE = {(image, label) for _, image, label in SAMPLES}


def mutate(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """One to three changes."""
    changes: list[Callable[[bytes, random.Random], bytes]]
    changes = [damage, damage, moved, wild_text, wild_words, wild_field, partial(spliced, others=others)]
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        data = draw.choice(changes)(data, draw) if data else data
    return data


def moved(data: bytes, draw: random.Random) -> bytes:
    """A piece put elsewhere, often in whole words or blocks."""
    unit = draw.choice([1, 4, 512])
    a, b, c = sorted(unit * draw.randrange(len(data) // unit + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def spliced(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """A piece of another file in place of one of this."""
    other = draw.choice(others)
    a, b = sorted(draw.randrange(len(data)) for _ in range(2))
    begin = draw.randrange(len(other))
    return data[:a] + other[begin : begin + draw.choice([b - a, draw.randrange(600)])] + data[b:]


def wild_text(data: bytes, draw: random.Random) -> bytes:
    """A number in a text."""
    begin = draw.randrange(len(data))
    while begin < len(data) and not data[begin : begin + 1].isdigit():
        begin += 1
    end = begin
    while end < len(data) and data[end : end + 1].isdigit():
        end += 1
    return data[:begin] + draw.choice(NUMBERS) + data[end:]


def wild_words(data: bytes, draw: random.Random) -> bytes:
    """A number of four bytes, most often in the head of a RecordIO record."""
    heads = [at for at in range(0, len(data), 4) if data[at : at + 4] == MAGIC]
    place = draw.choice(heads) + 4 * draw.randrange(1, 6) if heads else draw.randrange(len(data)) // 4 * 4
    return data[:place] + struct.pack("<I", draw.choice(WORDS)) + data[place + 4 :]


def wild_field(data: bytes, draw: random.Random) -> bytes:
    """A field of a tar header, under a checksum that fits again."""
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    if not headers:
        return data
    place, (begin, end) = draw.choice(headers), draw.choice(list(FIELDS.values()))
    width = end - begin
    fills = [b"7", b"\xff", b"0", b"\0", b" "]
    values = [*(fill * width for fill in fills), (b"\x80" + b"\xff" * width)[:width], draw.randbytes(width)]
    value = draw.choice(values) if width > 1 else bytes([draw.choice(b"0\x001234567xgLKSDNVMX")])
    block = bytearray(data[place : place + 512].ljust(512, b"\0"))
    block[begin:end] = value
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return data[:place] + bytes(block) + data[place + 512 :]


@contextmanager
def bounded_heap() -> Iterator[None]:
    """Within it, more than HEAP new bytes raise MemoryError."""
    status = Path("/proc/self/status").read_text()
    used = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + HEAP, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def survivors(open_damaged: Callable[[], Source]) -> list[tuple[str, bytes, int]]:
    """Place, image and label of what is still handed out; whatever is not a typed error goes through."""
    try:
        source = open_damaged()
        source.fingerprint()
        for index in range(len(source)):
            assert "\n" not in source.where(index) + source.name(index)
    except DataError as error:
        one_line(error)
        return []
    found = []
    for index in range(len(source)):
        try:
            found.append((source.where(index), *source.read(index)))
        except BadSample as bad:
            one_line(bad)
    return found


def one_line(error: Exception) -> None:
    assert "\n" not in str(error)


def is_whole(image: bytes, label: int) -> bool:
    """A RecordIO length that grows into the padding cannot be noticed: up to three zeros more, which decoders skip."""
    shorter = [image, *(image[:-n] for n in (1, 2, 3) if not any(image[-n:]))]
    return any((original, label) in WHOLE for original in shorter)


def put(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # a file that is truncated and written again waits for the disk
    path.write_bytes(data)


def fuzz(root: Path, names: list[str], trials: int, open_damaged: Callable[[], Source], own: dict) -> int:
    """Damage the files ``names`` in turn; how many samples came back whole.

    Args:
        own: (file, begin, end) of the bytes of a sample that nothing protects, by its place as ``where`` says it.
    """
    whole = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    assert {(image, label) for _, image, label in survivors(open_damaged)} == WHOLE
    anywhere = [place for places in own.values() for place in places]  # of a sample that has moved
    count = 0
    with bounded_heap():
        for trial in range(trials):
            draw, name = random.Random(trial), names[trial % len(names)]
            damaged = mutate(whole[name], draw, list(whole.values()))
            put(root / name, damaged)
            for where, image, label in survivors(open_damaged):
                touched = any(
                    file == name and damaged[begin:end] != whole[name][begin:end]
                    for file, begin, end in own.get(where, anywhere)
                )
                assert touched or is_whole(image, label), f"trial {trial}: {name}: wrong sample at {where}"
                count += (image, label) in WHOLE
            put(root / name, whole[name])
    return count


def own_records(root: Path) -> dict[str, list[tuple[str, int, int]]]:
    begins = [int(line.split("\t")[1]) for line in (root / "train.idx").read_text().splitlines()]
    ends = [*begins[1:], (root / "train.rec").stat().st_size]
    return {
        f"train.rec record {number} at byte {begin}": [("train.rec", begin + 8, end)]
        for number, (begin, end) in enumerate(zip(begins, ends))
    }


def own_members(root: Path, before: int = 0) -> dict[str, list[tuple[str, int, int]]]:
    members = [(tar, member) for tar in sorted(root.glob("*.tar")) for member in scan(tar)]
    own = [(tar.name, member.offset - before, member.offset + member.size) for tar, member in members]
    return {
        f"{tar.name}: {member.key}.jpg": own[number // 2 * 2 : number // 2 * 2 + 2]
        for number, (tar, member) in enumerate(members)
    }


@pytest.mark.parametrize("trials", [6000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_recordio(tmp_path: Path, trials: int) -> None:
    write_split(tmp_path, "recordio", SAMPLES)
    names = ["train.rec", "train.rec", "train.idx", "train.lst", "classes.txt"]
    count = fuzz(tmp_path, names, trials, partial(open_source, tmp_path, "train"), own_records(tmp_path))
    assert count > trials


@pytest.mark.parametrize("trials", [2000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_recordio_without_index(tmp_path: Path, trials: int) -> None:
    write_split(tmp_path, "recordio", SAMPLES)
    own = own_records(tmp_path)
    (tmp_path / "train.idx").unlink()
    count = fuzz(tmp_path, ["train.rec"], trials, partial(Im2recSource, tmp_path / "train.rec"), own)
    assert count > trials // 4


@pytest.mark.parametrize("trials", [6000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_shards(tmp_path: Path, trials: int) -> None:
    write_split(tmp_path, "webdataset", SAMPLES, max_samples=5)
    names = ["train-000000.tar", "train-000001.tar", "train-000000.idx", "train-000001.idx", "train.json"]
    count = fuzz(tmp_path, names, trials, partial(open_source, tmp_path, "train"), own_members(tmp_path))
    assert count > trials


@pytest.mark.parametrize("trials", [4000, pytest.param(40_000, marks=pytest.mark.slow)])
def test_shards_without_index_and_manifest(tmp_path: Path, trials: int) -> None:
    write_split(tmp_path, "webdataset", SAMPLES, max_samples=5)
    for path in (*tmp_path.glob("*.idx"), tmp_path / "train.json"):
        path.unlink()
    names = ["train-000000.tar", "train-000001.tar"]
    count = fuzz(tmp_path, names, trials, partial(open_source, tmp_path, "train"), own_members(tmp_path, 512))
    assert count > trials


@pytest.mark.parametrize("trials", [6000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_video_list(tmp_path: Path, trials: int) -> None:
    lines = [b"some folder/a%d.mp4 %d %d\n" % (n, 30 + n, n % 12) for n in range(20)]
    path = tmp_path / "train.txt"
    unchanged = 0
    with bounded_heap():
        for trial in range(trials):
            damaged = mutate(b"".join(lines), random.Random(trial), [MAGIC * 9, b"\xff\0\r\n 1 2" * 30])
            put(path, damaged)
            with suppress(DataError):
                clips = read_list(path, tmp_path, 12)
                clips.fingerprint()
                there = damaged.split(b"\n")
                for index in range(len(clips)):
                    # Every clip is a line that is there, and says what the line says.
                    line = there[int(clips.lines[index]) - 1]
                    name, frames, label = (
                        clips.name(index),
                        int(clips.frames[index]),
                        int(clips.labels[index]),
                    )
                    words = line.rsplit(None, 2)
                    assert name.encode("utf-8", "surrogateescape") == words[0]
                    assert (frames, label) == (int(words[1]), int(words[2]))
                    assert "\0" not in name
                    assert 0 <= label < 12
                    assert frames > 0
                unchanged += 1
    assert unchanged > trials // 20


class Clips:
    """Clips in shards, as a source."""

    def __init__(self, root: Path) -> None:
        self.clips = open_clips(root / "train.txt", root, [str(n) for n in range(10)], "webdataset")
        self.classes = ()
        self.where, self.name, self.fingerprint = self.clips.where, self.clips.name, self.clips.fingerprint

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, index: int) -> tuple[bytes, int]:
        return self.clips.file(index), int(self.clips.labels[index])


def test_clips_whose_names_are_no_text(tmp_path: Path) -> None:
    write_list(tmp_path / "train.txt", [("a/x.mp4", 30, 0)])
    write_groups(tmp_path / "train-000000.tar", [("000000-x", [("json", b"{}"), ("mp4", b"video")])])
    idx = tmp_path / "train-000000.idx"
    idx.write_bytes(idx.read_bytes().replace(b"000000-x", b"\xff00000-x"))
    with pytest.raises(BadSample, match="the index does not fit the tar") as raised:
        Clips(tmp_path).read(0)
    assert raised.value.where == "train-000000.tar: \udcff00000-x.mp4"


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("trials", [2000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_clips_in_shards(tmp_path: Path, trials: int, indexed: bool) -> None:
    write_list(tmp_path / "train.txt", [(f"a/{key}.mp4", 30, label) for key, _, label in SAMPLES])
    for number, part in enumerate((SAMPLES[:5], SAMPLES[5:])):
        groups = [(f"00{key}-{key}", [("json", b"{}"), ("mp4", data)]) for key, data, _ in part]
        write_groups(tmp_path / f"train-{number:06d}.tar", groups)
    before = 0 if indexed else 512  # without an index nothing says where a header belongs
    own = {
        f"{tar.name}: {member.name}": [(tar.name, member.offset - before, member.offset + member.size)]
        for tar in tmp_path.glob("*.tar")
        for member in scan(tar)
        if member.ext == "mp4"
    }
    names = ["train-000000.tar", "train-000001.tar"]
    names += ["train-000000.idx", "train-000001.idx"] if indexed else []
    for path in () if indexed else tmp_path.glob("*.idx"):
        path.unlink()
    assert fuzz(tmp_path, names, trials, partial(Clips, tmp_path), own) > trials


@pytest.mark.parametrize(
    "text", ["x" * (1 << 20), "a." * (1 << 19), "1" * (1 << 20), "jpg 512 1 " + "/" * (1 << 20)]
)
def test_a_line_of_a_megabyte_is_read_at_once(tmp_path: Path, text: str) -> None:
    write_split(tmp_path / "wds", "webdataset", SAMPLES)
    (tmp_path / "wds" / "train-000000.idx").write_text(f"v1.2 1\n{text}\n")
    write_split(tmp_path / "rec", "recordio", SAMPLES)
    (tmp_path / "rec" / "train.idx").write_text(text)
    for form in ("wds", "rec"):
        with pytest.raises(DataError, match=r"idx line \d: "):
            open_source(tmp_path / form, "train")
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match="list.txt:1: "):
        read_list(tmp_path / "list.txt", tmp_path)
