"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import RandomReads, atomic_folder, atomic_write


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
    for name in names.values():
        (tmp_path / name).mkdir()
    with atomic_folder(tmp_path / "a"):
        pass
    assert set(os.listdir(tmp_path)) == {"a", *names.values()} - {names["stale"], names["old"]}


def test_random_reads(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    reads = RandomReads([tmp_path / "a", tmp_path / "b"])
    for copy in (reads, pickle.loads(pickle.dumps(reads))):
        assert copy.read(0, 10, 5) == bytes(range(10, 15))
        assert copy.read(0, 98, 5) == bytes([98, 99])
        assert copy.read(0, 200, 5) == copy.read(0, 5, 0) == b""
        with pytest.raises(FileNotFoundError):
            copy.read(1, 0, 1)
