"""``image/prepare.py digits`` as a user runs it: one-line errors, nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from common.data.digits import prepare_digits
from common.data.forms import open_source
from common.data.source import DataError
from tests.common.data.forms import FORM_NAMES, few_digits, write_split

ROOT = Path(__file__).parents[2]


def prepare(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "image/prepare.py", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_digits_and_again(tmp_path: Path) -> None:
    out = tmp_path / "new" / "digits"
    first = prepare("digits", out)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == f"{out}: 1,442 training and 355 validation images as folder, written\n"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = prepare("digits", out)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.endswith("as folder, there already, nothing to do\n")
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert os.listdir(out.parent) == ["digits"]


def test_help_explains_itself() -> None:
    assert "digits" in prepare("--help").stdout
    text = " ".join(prepare("digits", "--help").stdout.split())
    for word in ("OUT", "folder,recordio,webdataset", "--force", "handwritten digits", "no download"):
        assert word in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: COMMAND"),
        (["digits"], "required: OUT"),
        (["digit", "{tmp}/out"], "invalid choice: 'digit'"),
        (["digits", "{tmp}/out", "--format", "zip"], "invalid choice: 'zip'"),
        (["digits", "{tmp}/out", "--forse"], "unrecognized arguments: --forse"),
        (["digits", "{tmp}/file"], "file is a file; expected a folder"),
        (["digits", "{tmp}/file/out"], "file is in the way of"),
        (["digits", "{tmp}/full"], "not empty and does not hold the whole digits"),
        (["digits", "{tmp}/full", "--force"], "not empty and does not hold the whole digits"),
        (["digits", "/proc/out"], "/proc/out: No such file or directory"),
        (["digits", "."], "is the current folder or a mount point"),
        (["digits", "pipe:cat"], "'pipe:cat' is not a local folder"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(tmp_path: Path, argv: list[str], words: str) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_bytes(b"mine")
    before = contents(tmp_path)
    run = prepare(*(word.replace("{tmp}", str(tmp_path)) for word in argv))
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert words in run.stderr
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]


def test_force_replaces_digits_in_another_form(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    assert prepare_digits(out, "webdataset")
    with pytest.raises(
        DataError, match="holds the digits as webdataset; name another folder, or replace them"
    ):
        prepare_digits(out, "recordio")
    assert prepare_digits(out, "recordio", force=True)
    assert sorted(os.listdir(out)) == [
        "classes.txt", "train.idx", "train.lst", "train.rec", "val.idx", "val.lst", "val.rec",
    ]  # fmt: skip
    assert os.listdir(tmp_path) == ["digits"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("change", ["a file is missing", "a file is added", "other images"])
def test_what_is_not_the_whole_digits_is_never_replaced(tmp_path: Path, change: str, force: bool) -> None:
    out = tmp_path / "digits"
    if change == "other images":  # someone's own digits
        for split in ("train", "val"):
            write_split(out, "recordio", few_digits(20), split)
    else:
        prepare_digits(out, "recordio")
        (out / "thesis.tex").write_bytes(b"mine") if change == "a file is added" else (
            out / "val.idx"
        ).unlink()
    before = contents(out)
    with pytest.raises(DataError, match="does not hold the whole digits; remove it or name another folder"):
        prepare_digits(out, "recordio", force=force)
    assert contents(out) == before


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    for form in FORM_NAMES:
        for name in ("a", "b"):
            prepare_digits(tmp_path / name / form, form)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_two_processes_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "image/prepare.py", "digits", str(tmp_path / "out"), "--format", "recordio"]
    running = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [(process.communicate(timeout=120)[1], process.returncode) for process in running] == [("", 0)] * 3
    assert os.listdir(tmp_path) == ["out"]
    assert len(open_source(tmp_path / "out", "train")) == 1442


KILLER = """
    import os, signal, sys
    from itertools import islice
    from common.data import digits

    form, out, samples = sys.argv[1], sys.argv[2], {s: list(islice(digits.digits_samples(s), 8)) for s in digits.SPLITS}
    digits.digits_samples = lambda split: iter(samples[split])

    def dying(function, left):
        def call(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)
        return call

    # Kill before the n-th call that changes what can be seen on the disk, for every n.
    n = 0
    while True:
        child = os.fork()
        if child == 0:
            left = [n]
            for name in ("mkdir", "rename", "replace"):
                setattr(os, name, dying(getattr(os, name), left))
            digits.prepare_digits(f"{out}/{n}/digits", form)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        n += 1
    print(n)
"""


@pytest.mark.parametrize("form", FORM_NAMES)
def test_killed_at_any_moment_leaves_nothing_that_opens(tmp_path: Path, form: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLER), form, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.stderr == ""
    kills = int(run.stdout)
    assert kills >= 8
    for n in range(kills):
        for split in ("train", "val"):
            with pytest.raises(DataError):
                open_source(tmp_path / str(n) / "digits", split)
    finished = [open_source(tmp_path / str(kills) / "digits", split) for split in ("train", "val")]
    assert [len(source) for source in finished] == [8, 8]


def test_next_run_cleans_up_after_a_kill(tmp_path: Path) -> None:
    killed = textwrap.dedent(f"""
        import os, signal
        from common.data.digits import prepare_digits

        def track(samples, split):
            for number, sample in enumerate(samples):
                if split == "val" and number == 100:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield sample

        prepare_digits({str(tmp_path / "out")!r}, "folder", track=track)
    """)
    assert subprocess.run([sys.executable, "-c", killed], cwd=ROOT).returncode == -9
    assert len(os.listdir(tmp_path)) == 1
    with pytest.raises(DataError):
        open_source(tmp_path / "out", "train")
    assert prepare_digits(tmp_path / "out", "folder")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("form", FORM_NAMES)
def test_disk_full_is_one_line_and_leaves_nothing(tmp_path: Path, form: str) -> None:
    limited = textwrap.dedent(f"""
        import resource, signal
        from common.errors import run_main
        from image.prepare import main
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1300, 1300))
        run_main(lambda: main(["digits", {str(tmp_path / "out")!r}, "--format", {form!r}]))
    """)
    run = subprocess.run([sys.executable, "-c", limited], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == f"error: {tmp_path / 'out'}: File too large\n"
    assert os.listdir(tmp_path) == []
