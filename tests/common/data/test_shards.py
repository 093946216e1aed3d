"""WebDataset shards: reproducible, indexed, checked; DALI and webdataset read them too."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from common.data.forms import open_source
from common.data.shards import read_index, scan
from common.data.source import BadSample, DataError
from tests.common.data.forms import few_digits, pairs, read_all, readable, write_split


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """30 digits in shards of 12, 12 and 6."""
    write_split(tmp_path, "webdataset", few_digits(30), max_samples=12)
    return tmp_path


def test_shards_are_full_and_listed(shards: Path) -> None:
    manifest = json.loads((shards / "train.json").read_text())
    assert [entry["samples"] for entry in manifest["shards"]] == [12, 12, 6]
    assert (manifest["samples"], manifest["classes"]) == (30, list("0123456789"))
    for entry in manifest["shards"]:
        data = (shards / entry["name"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_shards_end_at_the_size_asked_for(tmp_path: Path) -> None:
    write_split(tmp_path, "webdataset", few_digits(30), max_bytes=20_000)
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.tar"))]
    assert len(sizes) > 3
    assert all(20_000 < size < 20_000 + 4 * 2048 + 10_240 for size in sizes[:-1])
    assert read_all(open_source(tmp_path, "train")) == pairs(few_digits(30))


def test_tar_is_plain_sorted_and_reproducible(shards: Path, tmp_path: Path) -> None:
    with tarfile.open(shards / "train-000001.tar") as tar:
        members = tar.getmembers()
        image = tar.extractfile(members[1])
        assert image is not None
        assert image.read() == few_digits(13)[12][1]
    names = [member.name for member in members]
    assert names == sorted(names)
    assert len(names) == 24
    assert {(member.mtime, member.uid, member.gid, member.uname, member.isreg()) for member in members} == {
        (0, 0, 0, "", True)
    }
    write_split(tmp_path / "again", "webdataset", few_digits(30), max_samples=12)
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (shards / path.name).read_bytes()


def test_index_is_that_of_dalis_tool(shards: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    for tar in shards.glob("*.tar"):
        with wds2idx.IndexCreator(str(tar), str(tar.with_suffix(".theirs")), verbose=False) as creator:
            creator.create_index()
        assert tar.with_suffix(".theirs").read_bytes() == tar.with_suffix(".idx").read_bytes()


def test_headers_are_read_where_there_is_no_index(shards: Path) -> None:
    with_index = [read_index(tar) for tar in sorted(shards.glob("*.tar"))]
    for idx in shards.glob("*.idx"):
        idx.unlink()
    assert [read_index(tar) for tar in sorted(shards.glob("*.tar"))] == with_index
    (shards / "train.json").unlink()
    assert read_all(open_source(shards, "train")) == pairs(few_digits(30))


def test_webdataset_reads_what_we_write(shards: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    data = webdataset.WebDataset(urls, shardshuffle=False)
    assert [(sample["jpg"], int(sample["cls"])) for sample in data] == pairs(few_digits(30))


@pytest.mark.parametrize("indexed", [True, False])
def test_dali_reads_what_we_write(shards: Path, indexed: bool) -> None:
    dali = pytest.importorskip("nvidia.dali")
    tars = [str(path) for path in sorted(shards.glob("*.tar"))]
    index = {"index_paths": [str(Path(tar).with_suffix(".idx")) for tar in tars]} if indexed else {}

    @dali.pipeline_def(batch_size=30, num_threads=1, device_id=None)
    def pipeline():
        return tuple(dali.fn.readers.webdataset(paths=tars, ext=["jpg", "cls"], **index))

    pipe = pipeline()
    pipe.build()
    images, labels = pipe.run()
    found = [(np.array(images[n]).tobytes(), int(np.array(labels[n]).tobytes())) for n in range(30)]
    assert found == pairs(few_digits(30))


def foreign_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> None:
    """A tar as other tools make it, with its own folders and times."""
    with tarfile.open(path, "w", format=format) as tar:
        folder = tarfile.TarInfo("some")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1234.5
            tar.addfile(info, io.BytesIO(data))
    (path.parent / "classes.txt").write_text("a\nb\n")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_shards(tmp_path: Path, format: int) -> None:
    members = [
        ("some/x1.JPG", b"one"),
        ("some/x1.cls", b"1\n"),
        ("some/x1.json", b"{}"),
        ("some/.x1.jpg", b"hidden"),
        ("./x2.cls", b" 0"),
        ("./x2.seg.png", b"mask"),
        ("./x2.png", b"two"),
    ]
    foreign_tar(tmp_path / "train-0000.tar", members, format)
    source = open_source(tmp_path, "train")
    assert read_all(source) == [(b"one", 1), (b"two", 0)]
    assert source.where(1) == "train-0000.tar: ./x2.png"


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.jpg", b"x")], "expected one image and one .cls of the same key in a sample, found a.jpg"),
        ([("a.cls", b"0")], "found a.cls"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"0")], "found a.jpg, a.png, a.cls"),
        ([("a.jpg", b"x"), ("b.cls", b"0")], "found a.jpg"),
        ([("a" * 120 + ".jpg", b"x"), ("a" * 120 + ".cls", b"0")], "is not supported"),
    ],
)
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_without_image_or_label(tmp_path: Path, members: list, words: str, format: int) -> None:
    foreign_tar(tmp_path / "train-000000.tar", members, format)
    with pytest.raises(DataError, match=words):
        open_source(tmp_path, "train")


@pytest.mark.parametrize("text", [b"", b"x", b"-1", b"2", b"1.0", b"\xb2", b"1" * 5000])
def test_labels_that_are_no_class_are_typed(tmp_path: Path, text: bytes) -> None:
    foreign_tar(tmp_path / "train-000000.tar", [("a.jpg", b"x"), ("a.cls", text)])
    with pytest.raises(BadSample, match="bad label") as raised:
        open_source(tmp_path, "train").read(0)
    assert raised.value.where == "train-000000.tar: a.jpg"


def test_files_with_holes_and_long_extended_headers_are_refused(tmp_path: Path) -> None:
    tar = tmp_path / "train-000000.tar"
    foreign_tar(tar, [("a.jpg", b"x"), ("a.cls", b"1")], tarfile.USTAR_FORMAT)
    data = bytearray(tar.read_bytes())
    data[512 + 156 : 512 + 157] = b"S"  # GNU's type: what follows is the pieces between the holes
    data[512 + 148 : 512 + 156] = b"%06o\0 " % tarfile.calc_chksums(bytes(data[512:1024]))[0]
    tar.write_bytes(data)
    with pytest.raises(DataError, match=r"member 'a\.jpg' of type b'S' at byte 1024 is not supported"):
        open_source(tmp_path, "train")
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"GNU.sparse.major": "1"}
        file.addfile(info)
    with pytest.raises(DataError, match="a name, a size or holes at byte 512 is not supported"):
        open_source(tmp_path, "train")
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"comment": "x" * (2 << 20)}
        file.addfile(info)
    with pytest.raises(DataError, match="extended header of more than 1048576 bytes"):
        open_source(tmp_path, "train")


def cut_tar(root: Path) -> None:
    tar = root / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:5000])


def no_index(root: Path) -> None:
    for path in (*root.glob("*.idx"), root / "train.json"):
        path.unlink()


@pytest.mark.parametrize(
    ("damages", "words"),
    [
        ([cut_tar], "train-000001.tar is cut off: it has 5000 bytes, its index goes to"),
        ([no_index, cut_tar], r"train-000001.tar is cut off: '0\d+.(jpg|cls)' at byte \d+ has"),
        ([lambda root: (root / "train-000001.tar").unlink()], "train-000001.tar is missing; see train.json"),
        ([no_index, lambda root: (root / "train-000001.tar").unlink()], "do not count from 0"),
        ([lambda root: (root / "train-000003.tar").write_bytes(b"")], "is not in the manifest"),
        ([lambda root: (root / "train.json").write_text("{}")], "train.json is damaged"),
        ([lambda root: (root / "train.json").write_text("[" * 100_000)], "train.json is damaged"),
        ([lambda root: (root / "classes.txt").write_text("a\n")], "name different classes"),
        ([lambda root: (root / "train-000000.idx").write_text("v1.1 1\n")], "expected 'v1.2 COUNT'"),
        ([lambda root: (root / "train-000000.idx").write_text("v1.2 99999999999\n")], "COUNT lines"),
        (
            [lambda root: (root / "train-000000.idx").write_text("v1.2 1\njpg 512 1\n")],
            "idx line 2: expected",
        ),
        (
            [lambda root: (root / "train-000000.idx").write_text("v1.2 1\njpg 512 1 a.png\n")],
            "idx line 2: expected",
        ),
        (
            [lambda root: (root / "train-000000.idx").write_text("v1.2 1\n\n")],
            "idx line 2: expected",
        ),
        (
            [
                lambda root: (root / "train-000000.idx").write_text(
                    "v1.2 1\ncls 512 1 a.cls jpg 1536 1 b.jpg\n"
                )
            ],
            "the same key in a sample, found a.cls, b.jpg",
        ),
    ],
)
def test_damage_is_named(shards: Path, damages: list, words: str) -> None:
    for change in damages:
        change(shards)
    with pytest.raises(DataError, match=words):
        open_source(shards, "train")


def test_manifest_names_no_path(shards: Path) -> None:
    manifest = json.loads((shards / "train.json").read_text())
    for name in ("../train-000000.tar", "pipe:cat train-000000.tar", "/etc/passwd"):
        manifest["shards"][0]["name"] = name
        (shards / "train.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=r"train\.json is damaged"):
            open_source(shards, "train")


def test_shard_that_changes_under_an_open_source(shards: Path) -> None:
    source = open_source(shards, "train")
    tar = shards / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:1700])
    with pytest.raises(BadSample, match="truncated"):
        source.read(0)
    tar.unlink()
    with pytest.raises(BadSample, match="unreadable: No such file"):
        pickle.loads(pickle.dumps(source)).read(0)


def test_index_that_calls_a_sample_by_anothers_name(shards: Path) -> None:
    idx = shards / "train-000000.idx"
    first, last = few_digits(12)[0][0], few_digits(12)[-1][0]
    idx.write_text(idx.read_text().replace(f"{last}.", f"{first}."))
    source = open_source(shards, "train")
    with pytest.raises(BadSample, match=rf"does not fit the tar: byte \d+ holds '{last}\.cls' of 1 bytes"):
        source.read(11)


def test_scan_ends_only_at_the_end_of_the_archive(shards: Path) -> None:
    tar = shards / "train-000002.tar"
    data = tar.read_bytes()
    members = scan(tar)
    for cut in range(512, len(data) - 10_240, 512):
        tar.write_bytes(data[:cut])
        with pytest.raises(DataError, match="is cut off"):
            scan(tar)
    tar.write_bytes(data[:512] + b"x" * 512 + data[1024:])
    assert scan(tar) == members  # contents are not looked at
    tar.write_bytes(data[:1024] + b"x" * 512 + data[1536:])
    with pytest.raises(DataError, match="no tar header at byte 1024"):
        scan(tar)


@pytest.mark.parametrize("indexed", [True, False])
def test_damaged_structure_never_gives_a_wrong_sample(tmp_path: Path, indexed: bool) -> None:
    write_split(tmp_path, "webdataset", few_digits(3))
    tar, idx = tmp_path / "train-000000.tar", tmp_path / "train-000000.idx"
    headers = [member.offset - 512 for member in scan(tar)]
    if not indexed:
        no_index(tmp_path)
    places = [
        (tar, header + byte)
        for header in headers
        for byte in (0, 3, 5, 100, 124, 130, 135, 148, 156, 257, 345)
    ]
    places += [(idx, byte) for byte in range(idx.stat().st_size)] if indexed else []
    expected = set(pairs(few_digits(3)))
    for path, place in places:
        original = path.read_bytes()
        for bit in (0, 1, 3, 6):
            changed = bytearray(original)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            assert set(readable(tmp_path)) <= expected
        path.write_bytes(original)


@pytest.mark.parametrize("key", ["a.b", "a b", "../a", "a/b", "", "ä", "a" * 91])
def test_keys_that_tar_or_index_cannot_hold(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="expected 1 to 90 ASCII letters"):
        write_split(tmp_path, "webdataset", [(key, b"x", 0)])


def test_keys_must_rise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected keys in rising order"):
        write_split(tmp_path, "webdataset", [("b", b"x", 0), ("a", b"x", 0)])
    assert not list(tmp_path.iterdir())


def test_no_sample_is_no_shard(tmp_path: Path) -> None:
    for form in ("webdataset", "recordio"):
        with pytest.raises(ValueError, match="no samples"):
            write_split(tmp_path, form, [])
    assert not list(tmp_path.iterdir())
