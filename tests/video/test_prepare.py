"""video/prepare.py as users run it, on real files."""

import json
import os
import shutil
import subprocess
import sys

import av
import pytest

from common.data.video.digits import prepare_moving_digits
from common.data.video.lists import read_list
from common.errors import UserError
from common.files import sha256
from tests.processes import ROOT, run
from tests.video.films import film, sound
from video.prepare import main


def table(path):
    return [
        (name, int(frames), int(label))
        for name, frames, label in (line.rsplit(maxsplit=2) for line in path.read_text().splitlines())
    ]


def test_the_moving_digits_are_the_same_in_every_process(digits, tmp_path):
    """Also where fresh memory holds other bytes, which an encoder may have read."""
    code = (
        "import pathlib, sys; from common.data.video.digits import prepare_moving_digits;"
        "prepare_moving_digits(pathlib.Path(sys.argv[1]), {'train': 2, 'val': 1})"
    )
    again = tmp_path / "again"
    environment = os.environ | {"MALLOC_PERTURB_": "77"}
    subprocess.run([sys.executable, "-c", code, again], cwd=ROOT, env=environment, check=True)
    files = sorted(path.relative_to(digits) for path in digits.rglob("*") if path.is_file())
    assert len(files) == 36 + 3
    assert [sha256(digits / name) for name in files] == [sha256(again / name) for name in files]
    assert not prepare_moving_digits(again), "they are there"


def test_the_moving_digits_vary(digits):
    seen = set()
    for name, frames, _ in table(digits / "train.txt"):
        with av.open(str(digits / name)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            seen.add((stream.height, stream.width, frames, stream.average_rate))
            assert 24 <= frames == stream.frames <= 40
            assert min(stream.height, stream.width) >= 64
    assert all(len(set(column)) >= 4 for column in zip(*seen))


def test_the_digits_never_go_over_other_files(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="not the moving digits"):
        main(["digits", str(tmp_path)])
    assert (tmp_path / "mine.txt").exists()


@pytest.mark.slow
def test_digits_from_the_command_line(tmp_path):
    for done in (
        run("video/prepare.py", "digits", tmp_path / "d"),
        run("video/prepare.py", "digits", tmp_path / "d"),
    ):
        assert done.returncode == 0, done.stderr
        assert "600 training and 192 validation videos of 12 motions" in done.stdout
    assert "nothing to do" in done.stdout


@pytest.fixture
def folders(tmp_path):
    root = tmp_path / "videos"
    for split, name, frames in (
        ("train", "b class/one two.mp4", 9),
        ("train", "a/x.mkv", 12),
        ("val", "a/deep/y.MP4", 7),
    ):
        path = root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        written = film(path.with_suffix(path.suffix.lower()), frames)
        written.rename(path)
    (root / "train" / "a" / "notes.txt").write_text("no video")
    (root / "train" / "a" / "bad.mp4").write_bytes(b"bad")
    return root


def test_lists_of_class_folders(folders, tmp_path, capsys):
    assert main(["list", str(folders), "--workers", "1"]) == 0
    assert (folders / "classes.txt").read_text() == "a\nb class\n"
    assert table(folders / "train.txt") == [("train/a/x.mkv", 12, 0), ("train/b class/one two.mp4", 9, 1)]
    assert table(folders / "val.txt") == [("val/a/deep/y.MP4", 7, 0)]
    report = json.loads((folders / "train_report.jsonl").read_text())
    assert (report["where"], report["reason"]) == ("train/a/bad.mp4", "corrupt")
    assert "2 of 3 videos; missing: 0, unreadable: 1" in capsys.readouterr().out
    main(["list", str(folders), "--out", str(tmp_path / "lists"), "--workers", "1"])
    assert table(tmp_path / "lists" / "val.txt") == [(f"{folders}/val/a/deep/y.MP4", 7, 0)]


def test_a_class_that_training_does_not_have(folders):
    (folders / "val" / "new").mkdir()
    with pytest.raises(UserError, match="class 'new' is not among the classes of train"):
        main(["list", str(folders), "--workers", "1"])


def test_kinetics(tmp_path, capsys):
    folder, out = tmp_path / "videos", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    film(folder / "deep" / "-aB_c_000010_000020.mp4", 10)
    film(folder / "plain_id.mp4", 8)
    sound(folder / "silent_000000_000010.mp4")
    csv = tmp_path / "train.csv"
    csv.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        '"zip, line",-aB_c,10,20,train\nabseiling,plain_id,3,13,train\n'
        "abseiling,gone,1,11,train\nabseiling,silent,0,10,train\n"
    )
    assert main(["kinetics", str(csv), str(folder), str(out), "--split", "train", "--workers", "1"]) == 0
    assert (out / "classes.txt").read_text() == "abseiling\nzip, line\n"
    assert table(out / "train.txt") == [
        (f"{folder}/deep/-aB_c_000010_000020.mp4", 10, 1),
        (f"{folder}/plain_id.mp4", 8, 0),
    ]
    report = [json.loads(line) for line in (out / "train_report.jsonl").read_text().splitlines()]
    assert [(line["where"].split("/")[-1], line["reason"]) for line in report] == [
        ("gone_000001_000011", "missing"),
        ("silent_000000_000010.mp4", "no video"),
    ]
    assert "2 of 4 videos; missing: 1, unreadable: 1" in capsys.readouterr().out
    csv.write_text("label,youtube_id,time_start,time_end\nswimming,x,0,10\n")
    with pytest.raises(UserError, match=r"train.csv:2: label 'swimming' is not among the 2 classes"):
        main(["kinetics", str(csv), str(folder), str(out), "--split", "val", "--workers", "1"])
    csv.write_text("name,id\nswimming,x\n")
    with pytest.raises(UserError, match="expected the columns"):
        main(["kinetics", str(csv), str(folder), str(out), "--split", "val", "--workers", "1"])


@pytest.mark.parametrize("quick", [True, False])
def test_check_names_file_and_line(digits, tmp_path, quick):
    path = shutil.copytree(digits, tmp_path / "digits")
    words = ["check", str(path / "train.txt"), "--workers", "1"] + ["--quick"] * quick
    assert main(words) == 0
    lines = (path / "train.txt").read_text().splitlines()
    name, frames, label = lines[6].rsplit(maxsplit=2)
    lines[6] = f"{name} {int(frames) + 5} {label}"
    (path / "train.txt").write_text("\n".join(lines))
    (path / "train" / "fades" / "0001.mp4").unlink()
    with pytest.raises(UserError) as caught:
        main(words)
    assert str(caught.value).startswith(f"{path}/train.txt:7 {name}: wrong frame count: the list says ")
    report = [json.loads(line) for line in (path / "train_check.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in report] == ["wrong frame count", "unreadable"]


def test_check_decodes(tmp_path):
    """Damage in the middle of a file: its packets count right, its frames are broken."""
    path = film(tmp_path / "film.mp4", 60, crf="1")
    data = bytearray(path.read_bytes())
    middle = len(data) // 3
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)
    (tmp_path / "list.txt").write_text("film.mp4 60 0\n")
    with pytest.raises(UserError, match=r"list.txt:1 film.mp4: (corrupt|truncated)"):
        main(["check", str(tmp_path / "list.txt"), "--workers", "1"])


def test_frames_become_folders_and_a_list(digits, tmp_path):
    out = tmp_path / "frames"
    assert main(["frames", str(digits / "val.txt"), str(out), "--workers", "2"]) == 0
    found, original = read_list(out / "val.txt", out, 12), table(digits / "val.txt")
    assert [(found.name(i), int(found.frames[i])) for i in range(12)] == [(n[:-4], f) for n, f, _ in original]
    assert len(list(found.file(3).glob("img_*.jpg"))) == original[3][1]
    assert main(["check", str(out / "val.txt"), "--read-mode", "img", "--workers", "1"]) == 0


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "a" / "jumps").mkdir(parents=True)
    for words, expected in (
        (["list", "no/where"], "'no/where' is not an existing folder"),
        (["list", str(tmp_path)], "no folder train, val or test"),
        (
            ["list", str(tmp_path), "--split", "a"],
            "a: no videos found; expected files such as a/CLASS/NAME.mp4",
        ),
        (["shards", "no/train.txt", "out"], "'no/train.txt' is not an existing list"),
        (["check", "no.txt"], "no.txt: No such file"),
        (["digitz", "x"], "invalid choice"),
        (["check", "no.txt", "--workers", "0"], "workers: 0"),
    ):
        with pytest.raises(UserError) as caught:
            main(words)
        assert expected in str(caught.value)
    assert (ROOT / "video" / "prepare.py").is_file()
