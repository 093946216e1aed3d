"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import RandomReads, append_line, atomic_folder, atomic_write, read_lines


def test_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_stays_of_a_block_that_raises(tmp_path: Path, error: type[BaseException]) -> None:
    def write_file() -> None:
        with atomic_write(tmp_path / "a") as file:
            file.write(b"new")
            raise error

    def write_folder() -> None:
        with atomic_folder(tmp_path / "b") as folder:
            (folder / "x").write_bytes(b"new")
            raise error

    for write in (write_file, write_folder):
        with pytest.raises(error):
            write()
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device") as error, atomic_write(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert error.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError, match="No space left on device") as error:
        append_line("/dev/full", {})
    assert error.value.filename == "/dev/full"


def test_lines_that_were_cut_off_are_left_out_and_take_no_other_with_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_lines(path) == []
    append_line(path, {"n": 1})
    for cut in (b'{"n": 2', b'{"n": {}', b"3", b"\xff", b"[" * 99999):
        with path.open("ab") as file:
            file.write(cut)
        append_line(path, {"after": cut.decode("latin-1")})
    assert [list(entry) for entry in read_lines(path)] == [["n"]] + 5 * [["after"]]


def test_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a"
    with atomic_folder(path) as folder:
        (folder / "x").write_bytes(b"1")
        assert not path.exists()
    assert (path / "x").read_bytes() == b"1"
    with pytest.raises(FileExistsError), atomic_folder(path) as folder:
        (folder / "x").write_bytes(b"2")
    assert (path / "x").read_bytes() == b"1"
    with atomic_folder(path, replace=True) as folder:
        (folder / "y").write_bytes(b"3")
    assert os.listdir(path) == ["y"]
    assert os.listdir(path.parent) == ["a"]


def test_leftovers_of_killed_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    names = {
        "stale": f".a.{host}-{gone.pid}-0123abcd.partial",
        "old": f".a.{host}-{gone.pid}-0123abcd.old",
        "running": f".a.{host}-{os.getppid()}-0123abcd.partial",
        "other host": f".a.elsewhere-{gone.pid}-0123abcd.partial",
        "other folder": f".b.{host}-{gone.pid}-0123abcd.partial",
        "not ours": ".a.partial",
    }
    files = {name: name.replace(".partial", ".tmp") for name in names.values() if "partial" in name}
    for name in names.values():
        (tmp_path / name).mkdir()
    for name in files.values():
        (tmp_path / name).touch()
    with atomic_folder(tmp_path / "a"):
        pass
    with atomic_write(tmp_path / "a.json"):
        pass
    gone_ones = {names["stale"], names["old"], files[names["stale"]]}
    assert set(os.listdir(tmp_path)) == {"a", "a.json", *names.values(), *files.values()} - gone_ones


def test_random_reads(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    reads = RandomReads([tmp_path / "a", tmp_path / "b"])
    for copy in (reads, pickle.loads(pickle.dumps(reads))):
        assert copy.read(0, 10, 5) == bytes(range(10, 15))
        assert copy.read(0, 98, 5) == bytes([98, 99])
        assert copy.read(0, 200, 5) == copy.read(0, 5, 0) == b""
        with pytest.raises(FileNotFoundError):
            copy.read(1, 0, 1)
