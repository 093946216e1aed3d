"""Clips in shards: the same samples as from the list, the same bytes whatever happens, damage named."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
import webdataset
from torch.nn.functional import interpolate

from common.data.order import Draw
from common.data.source import BadSample, DataError
from common.data.video.clips import ClipConfig, ClipSet, VideoDataConfig, open_videos
from common.data.video.decode import Clock, Decoder, opened, packet_index
from common.data.video.encode import reencode
from common.data.video.lists import read_list
from common.errors import RunError, UserError
from common.files import sha256
from tests.processes import ROOT, command, run
from tests.video.films import HEIGHT, WIDTH, film, lying, number_of
from tests.video.runs import interrupt, train
from tests.video.test_train import assert_same_run
from video.prepare import main

pytestmark = pytest.mark.xdist_group("video")
CLIP = ClipConfig(2, 4, 5, 32, 32)
SMALL = ("--workers", "1", "--shard-samples", "7")


def pack(data, out, *words, splits=("train", "val")):
    return main(["shards", *(str(data / f"{split}.txt") for split in splits), str(out), *(words or SMALL)])


@pytest.fixture(scope="module")
def shards(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "shards"
    pack(digits, path)
    return path


def contents(folder):
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def rows(path, training, split="train", **options):
    videos = open_videos(VideoDataConfig(path=str(path), **options), split)
    data = ClipSet(videos, CLIP, 0, training)
    return [data.row(Draw(1, index)) for index in range(len(videos))]


@pytest.mark.parametrize("training", [True, False])
def test_the_samples_are_those_of_the_list(digits, shards, training):
    there, original = rows(shards, training), rows(digits, training)
    assert len(there) == len(original) == 24
    for a, b in zip(there, original):
        assert torch.equal(a.inputs, b.inputs)
        assert a.target == b.target
    fingerprints = {
        open_videos(VideoDataConfig(path=str(path)), "val").clips.fingerprint() for path in (digits, shards)
    }
    assert len(fingerprints) == 1, "a run may go on from either"


def test_another_order_and_other_names(tmp_path):
    (tmp_path / "a b").mkdir()
    names = ["a b/with space.mp4", "a b/ünï.mkv", "plain.webm", "upper.MP4"]
    for number, name in enumerate(names):
        codec = {"codec": "libvpx-vp9"} if name.endswith("webm") else {}
        written = film(tmp_path / name.lower(), 8 + number, **codec)
        written.rename(tmp_path / name)
    (tmp_path / "train.txt").write_text("".join(f"{n} {8 + i} {i % 2}\n" for i, n in enumerate(names)))
    (tmp_path / "classes.txt").write_text("zero\none\n")
    pack(tmp_path, tmp_path / "out", *SMALL, "--shuffle", "3", splits=["train"])
    videos = open_videos(VideoDataConfig(path=str(tmp_path / "out"), format="webdataset"), "train")
    found = [videos.clips.name(i) for i in range(4)]
    assert found != names
    assert sorted(found) == sorted(names)
    for index, name in enumerate(found):
        assert int(videos.clips.frames[index]) == 8 + names.index(name)
        assert int(videos.clips.labels[index]) == names.index(name) % 2
        assert videos.clips.file(index) == (tmp_path / name).read_bytes()


def test_webdataset_reads_them(shards):
    samples = list(webdataset.WebDataset(str(shards / "val-000000.tar"), shardshuffle=False))
    assert len(samples) == 7
    about = json.loads(samples[3]["json"])
    assert about == {
        "path": "val/moves_down/0000.mp4",
        "frames": about["frames"],
        "label": 3,
        "class": "moves_down",
    }
    assert Decoder().length(samples[3]["mp4"], "") == about["frames"]


def test_the_same_bytes_from_any_number_of_workers(digits, shards, tmp_path):
    pack(digits, tmp_path / "two", "--workers", "2", "--shard-samples", "7")
    assert contents(tmp_path / "two") == contents(shards)
    manifest = json.loads((shards / "train.json").read_text())
    assert [entry["samples"] for entry in manifest["shards"]] == [7, 7, 7, 3]
    assert all(entry["sha256"] == sha256(shards / entry["name"]) for entry in manifest["shards"])


def test_killed_it_goes_on_to_the_same_bytes(digits, tmp_path, capsys):
    """Killed while it encodes, with shards finished; the finished ones are not touched again."""
    words = ("--workers", "1", "--shard-samples", "3", "--short-side", "48")
    pack(digits, tmp_path / "whole", *words)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    line = command("video/prepare.py", "shards", digits / "train.txt", digits / "val.txt", out)
    process = subprocess.Popen([*line, *words], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while len(list(partial.glob("data/*.tar"))) < 2:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    before = {path: path.stat().st_mtime_ns for path in sorted(partial.glob("data/*-00000[0-1].tar"))}
    noted = (
        len((partial / "progress.jsonl").read_bytes().splitlines())
        if (partial / "progress.jsonl").exists()
        else 0
    )
    pack(digits, out, *words)
    kept = {path: (out / path.name).stat().st_mtime_ns for path in list(before)[:noted]}
    assert kept == dict(list(before.items())[:noted])
    assert contents(out) == contents(tmp_path / "whole")
    pack(digits, out, *words)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(DataError, match="made with resize 48, not None"):
        pack(digits, out)


@pytest.mark.parametrize("kind", ["mp4-b-frames", "mkv-variable", "avi", "ts"])
def test_encoded_anew_every_frame_keeps_its_number(tmp_path, kind):
    options = {"bf": "3"} if kind != "avi" else {}
    path = film(tmp_path / f"film.{kind[:3].rstrip('-')}", 60, variable="variable" in kind, **options)
    data = reencode(path, HEIGHT // 2, 12, "film", Decoder())
    assert data == reencode(path.read_bytes(), HEIGHT // 2, 12, "film", Decoder())
    assert Decoder().length(data, "") == 60
    if kind not in ("avi", "ts"):
        np.testing.assert_allclose(seconds(data), seconds(path), atol=1e-3)
    found = Decoder().frames(data, range(60), "")
    for number, frame in found.items():
        assert frame.shape == (3, HEIGHT // 2, WIDTH // 2)
        assert number_of(interpolate(frame[None].float(), scale_factor=2)[0]) == number


def seconds(video):
    """When each frame is shown."""
    with opened(video, "", Decoder(), Clock(60, "")) as (container, stream):
        times = np.array(packet_index(container, stream, "", Clock(60, "")).times)
        return (times - times[0]) * float(stream.time_base)


def test_encoded_anew_frames_are_upright(tmp_path):
    path = lying(film(tmp_path / "film.mp4", 20), 1)
    original, small = (
        Decoder().frames(video, [11], "")[11] for video in (path, reencode(path, 48, 5, "", Decoder()))
    )
    assert small.shape == original.shape == (3, WIDTH, HEIGHT)
    assert (small.float() - original.float()).abs().mean() < 5


def test_encoded_anew_in_every_process_alike(digits, tmp_path):
    """Also where fresh memory holds other bytes, which an encoder may have read."""
    line = command("video/prepare.py", "shards", digits / "val.txt")
    for number in (1, 2):
        environment = os.environ | {"MALLOC_PERTURB_": str(70 * number)}
        words = [tmp_path / str(number), "--workers", number, "--short-side", 50]
        subprocess.run([*line, *map(str, words)], cwd=ROOT, env=environment, check=True)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    small = open_videos(VideoDataConfig(path=str(tmp_path / "1")), "val").clips
    assert small.fingerprint() != open_videos(VideoDataConfig(path=str(digits)), "val").clips.fingerprint()
    frame = Decoder().frames(small.file(0), [0], "")[0]
    assert min(frame.shape[1:]) == 50


def test_what_cannot_be_used_is_left_out_and_named(digits, tmp_path):
    path = shutil.copytree(digits, tmp_path / "digits")
    (path / "val" / "grows" / "0000.mp4").write_bytes(b"")
    (path / "val" / "fades" / "0000.mp4").unlink()
    text = (path / "val.txt").read_text().splitlines()
    text[2] = text[2].rsplit(maxsplit=2)[0] + " 99 2"
    (path / "val.txt").write_text("\n".join(text))
    with pytest.raises(RunError, match="unusable samples in split 'val', more than --max-unreadable allows"):
        pack(path, tmp_path / "out", splits=["val"])
    pack(path, tmp_path / "out", *SMALL, "--max-unreadable", "0.5", splits=["val"])
    named = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in named] == ["wrong frame count", "empty", "unreadable"]
    assert named[0]["where"] == f"{path}/val.txt:3 {text[2].rsplit(maxsplit=2)[0]}"
    left = read_list(tmp_path / "out" / "val.txt", tmp_path, 12)
    assert len(left) == 9
    assert len(rows(tmp_path / "out", False, "val")) == 9


def test_a_damaged_clip_in_a_shard_is_named_and_replaced(digits, shards, tmp_path):
    path = shutil.copytree(shards, tmp_path / "shards")
    clips = open_videos(VideoDataConfig(path=str(path)), "train").clips
    tar = path / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    for index, begin, length in ((1, 0, 3000), (4, -512, 100)):  # in a video; the header before one
        _, offset, _ = clips.places[index].tolist()
        data[offset + begin : offset + begin + length] = bytes(length)
    tar.write_bytes(data)
    original = rows(digits, True)
    for index, row in enumerate(rows(path, True)):
        if index in (1, 4):
            (bad,) = row.unreadable
            assert bad.where.startswith(f"train-000000.tar: {index:08d}-000")
            assert bad.reason in ("corrupt", "truncated")
            assert row.target == original[index + 1].target, "the next one takes its place"
        else:
            assert torch.equal(row.inputs, original[index].inputs)
    with pytest.raises(UserError, match=r"train-000000.tar: 00000001-0001.mp4: (corrupt|truncated)"):
        main(["check", str(path / "train.txt"), "--workers", "1"])


def test_a_shard_that_is_cut_off(shards, tmp_path):
    path = shutil.copytree(shards, tmp_path / "shards")
    tar = path / "val-000001.tar"
    tar.write_bytes(tar.read_bytes()[:6000])
    with pytest.raises(DataError, match=r"val-000001.tar is cut off"):
        rows(path, False, "val")
    (path / "val.json").unlink()
    tar.with_suffix(".idx").unlink()
    with pytest.raises(DataError, match=r"val-000001.tar is cut off: '00000007-0000.mp4'"):
        rows(path, False, "val")


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda path: (path / "train-000001.tar").unlink(), "train-000001.tar is missing"),
        (lambda path: (path / "train.txt").unlink(), "train.txt: No such file"),
        (lambda path: cut_lines(path, 1), "has 23 clips, the shards beside it have 24"),
        (
            lambda path: swap_lines(path),
            r"train.txt:1 train/\S+/0001.mp4: this place in the shards has 00000000-0000",
        ),
        (lambda path: [tar.unlink() for tar in path.glob("*.tar")], "no webdataset data of 'train'"),
    ],
)
def test_shards_and_list_that_do_not_fit_together(shards, tmp_path, change, expected):
    path = shutil.copytree(shards, tmp_path / "shards")
    change(path)
    with pytest.raises(DataError, match=expected):
        open_videos(VideoDataConfig(path=str(path), format="webdataset"), "train")


def cut_lines(path, count):
    lines = (path / "train.txt").read_text().splitlines()
    (path / "train.txt").write_text("\n".join(lines[:-count]))


def swap_lines(path):
    lines = (path / "train.txt").read_text().splitlines()
    (path / "train.txt").write_text("\n".join([lines[1], lines[0], *lines[2:]]))


def test_the_form_can_be_named(digits, shards, tmp_path):
    with pytest.raises(DataError, match="no webdataset data of 'val'"):
        open_videos(VideoDataConfig(path=str(digits), format="webdataset"), "val")
    both = shutil.copytree(digits, tmp_path / "both")
    for path in shards.iterdir():
        if not (both / path.name).exists():
            shutil.copy(path, both)
    assert isinstance(open_videos(VideoDataConfig(path=str(both)), "val").clips.file(0), bytes)
    assert open_videos(VideoDataConfig(path=str(both), format="list"), "val").clips.file(0).is_file()


def test_the_clips_survive_a_pickle(shards):
    clips = pickle.loads(pickle.dumps(open_videos(VideoDataConfig(path=str(shards)), "val").clips))
    assert len(clips.file(5)) > 0


def test_shards_of_shards(shards, tmp_path):
    """Encoded anew from shards; a video whose bytes are no video is refused with its place."""
    pack(shards, tmp_path / "small", *SMALL, "--short-side", "40", splits=["val"])
    assert len(rows(tmp_path / "small", False, "val")) == 12
    with pytest.raises(BadSample, match="corrupt"):
        reencode(b"no video", 40, 20, "here", Decoder())


def test_frames_of_shards(shards, tmp_path):
    main(["frames", str(shards / "val.txt"), str(tmp_path / "frames"), "--workers", "1"])
    assert len(list((tmp_path / "frames").rglob("*.jpg"))) == int(
        read_list(shards / "val.txt", shards).frames.sum()
    )


def test_mistakes_are_one_line(digits, tmp_path):
    for words, expected in (
        (
            [str(digits / "train.txt"), str(tmp_path / "val.txt"), str(tmp_path / "o")],
            "lists: expected lists",
        ),
        ([str(digits / "val.txt"), str(tmp_path / "o"), "--crf", "99"], "crf: 99 is not between 0 and 51"),
        (
            [str(digits / "val.txt"), str(tmp_path / "o"), "--short-side", "0"],
            "short-side: 0 is not between 16 and 8192",
        ),
        ([str(digits / "no.txt"), str(tmp_path / "o")], "no.txt' is not an existing list"),
    ):
        with pytest.raises(UserError, match=expected):
            main(["shards", *words])
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_training_on_shards_is_training_on_the_list(digits, reference, shards, tmp_path):
    """The same numbers and weights, also of a run on the list that goes on with the shards."""
    interrupt(tmp_path / "run", digits, 2, signal.SIGTERM)
    train(tmp_path / "run", shards)
    assert_same_run(tmp_path / "run", reference)
    done = run("video/eval.py", tmp_path / "run", views="1x1", data__path=shards, data__format="webdataset")
    assert done.returncode == 0, done.stderr
