"""``image/prepare.py`` as a user runs it on data of his own: real kills, full disks, one-line errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from common.data.forms import open_source
from image.prepare import main
from tests.common.data.archives import write_archives
from tests.common.data.forms import few_digits, write_split
from tests.image.test_prepare import ROOT, contents, prepare


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        write_split(tmp_path / "in", "folder", few_digits(16), split)
    return tmp_path / "in"


def test_imagenet_and_verify(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root, out = write_archives(tmp_path / "in"), tmp_path / "out"
    command = [
        "imagenet",
        str(root),
        str(out),
        "--resize",
        "48",
        "--quality",
        "90",
        "--parts",
        "2",
        "--workers",
        "1",
    ]
    assert main(command) == 0
    assert capfd.readouterr() == (f"{out}: 12 train and 5 val images as recordio, written\n", "")
    assert main(command) == 0
    assert capfd.readouterr().out.endswith("as recordio, there already, nothing to do\n")
    assert main(["verify", str(out), "--workers", "1"]) == 0
    text = capfd.readouterr()
    assert "train: 12 of 12 images of 3 classes decoded (4 to 4 a class" in text.out
    assert text.out.count("problems: 0\n") == 2
    assert text.err == ""
    assert {"verify.json", "verify.png"} <= set(os.listdir(out))


def test_verify_fails_in_one_line(source: Path) -> None:
    next((source / "train/3").iterdir()).write_bytes(b"\xff\xd8\xff")
    run = prepare("verify", source, "--workers", "1")
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "problems: 1, all in" in run.stderr
    assert "15 of 16 images of 10 classes" in run.stdout


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_called_again(tmp_path: Path, source: Path, workers: int) -> None:
    for split in ("train", "val"):
        for path in list((source / split).rglob("*.jpg")):
            for copy in range(20):
                path.with_name(f"{path.stem}-{copy}.jpg").write_bytes(path.read_bytes())
    options = ["--resize", "400", "--shard-samples", "20", "--workers", str(workers), "--shuffle", "1"]
    words = ["image/prepare.py", "webdataset", str(source), str(tmp_path / "out"), *options]
    running = subprocess.Popen([sys.executable, *words], cwd=ROOT, start_new_session=True)
    progress, deadline = tmp_path / ".out.partial/progress.jsonl", time.monotonic() + 60
    while not progress.exists() or progress.read_bytes().count(b"\n") < 3:
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    names = [json.loads(line)["shard"]["name"] for line in progress.read_text().splitlines()]
    before = {name: (progress.parent / "data" / name).stat().st_mtime_ns for name in names}
    again = prepare(*words[1:])
    assert (again.returncode, again.stderr) == (0, "")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in names} == before
    whole = tmp_path / "whole"
    assert main([*words[1:3], str(whole), *options[:-3], "1", "--shuffle", "1"]) == 0
    assert contents(whole) == contents(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in", "out", "whole"]
    while _group_lives(running.pid):  # its workers end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_at_once(tmp_path: Path, source: Path) -> None:
    command = [sys.executable, "image/prepare.py", "recordio", str(source), str(tmp_path / "out")]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [(*process.communicate(timeout=120), process.returncode) for process in running]
    assert any(code == 0 for _, _, code in ends)
    for _, err, code in ends:
        assert (err, code) == ("", 0) or (code == 2 and "another process is writing it" in err)
    assert len(open_source(tmp_path / "out", "train")) == 16


@pytest.mark.parametrize("form", ["folder", "recordio", "webdataset"])
def test_disk_full_is_one_line_and_goes_on(tmp_path: Path, source: Path, form: str) -> None:
    out = tmp_path / "out"
    limited = textwrap.dedent(f"""
        import resource, signal
        from common.errors import run_main
        from image.prepare import main
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1330, 1330))
        run_main(lambda: main([{form!r}, {str(source)!r}, {str(out)!r}]))
    """)
    run = subprocess.run([sys.executable, "-c", limited], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "File too large; what is finished is kept, the same command goes on from there" in run.stderr
    assert not out.exists()
    assert main([form, str(source), str(out)]) == 0
    assert len(open_source(out, "train", form)) == 16


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["recordio", "{tmp}/in"], "required: OUT"),
        (["recordio", "{tmp}/nowhere", "{tmp}/out"], "nowhere' is not an existing folder"),
        (["recordio", "{tmp}/empty", "{tmp}/out"], "no data of split 'train'"),
        (["recordio", "{tmp}/in", "{tmp}/out", "--split", "test"], "no data of split 'test'"),
        (["recordio", "{tmp}/in", "{tmp}/in/train/out"], "is inside a split of"),
        (["recordio", "{tmp}/in", "{tmp}/in"], "there already and is not this data set"),
        (["recordio", "{tmp}/in", "{tmp}/out", "--quality", "101"], "quality: 101 is not between 1 and 100"),
        (["recordio", "{tmp}/in", "{tmp}/out", "--workers", "0"], "workers: 0"),
        (
            ["recordio", "{tmp}/in", "{tmp}/out", "--max-unreadable", "5"],
            "max-unreadable: 5.0 is not a share",
        ),
        (["recordio", "{tmp}/in", "{tmp}/out", "--parts", "x"], "argument --parts: invalid int value: 'x'"),
        (["recordio", "{tmp}/in", "pipe:cat"], "'pipe:cat' is not a local folder"),
        (["recordio", "{tmp}/in", "/proc/out"], "/proc/out: "),
        (["folder", "{tmp}/in", "{tmp}/out", "--parts", "2"], "unrecognized arguments: --parts 2"),
        (["imagenet", "{tmp}/empty", "{tmp}/out"], "expected ILSVRC2012_img_train.tar"),
        (["imagenet", "{tmp}/in", "{tmp}/out"], "class folder '0' is not a WordNet id"),
        (["verify", "{tmp}/empty"], "no data of split 'train'"),
        (["verify", "{tmp}/nowhere"], "is not an existing folder"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, source: Path, argv: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from common.errors import run_main

    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_main(lambda: main([word.replace("{tmp}", str(tmp_path)) for word in argv]))
    text = capfd.readouterr()
    assert end.value.code == 2
    assert text.out == ""
    assert text.err.startswith("error: ")
    assert text.err.count("\n") == 1
    assert words in text.err
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["empty", "in"]
