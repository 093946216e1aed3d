"""A run's folder: locked, and read again."""

import errno
import fcntl

import pytest

from common.engine.run import Run, read_file
from common.errors import UserError


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def unlocked(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unlocked)
    Run(tmp_path / "run").lock()
    assert "has no locks (No locks available)" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"out = '.*file/run': cannot be written \(Not a directory\)"):
        Run(tmp_path / "file" / "run").lock()


@pytest.mark.parametrize(
    "content", [b"{", b"", b"[]", b"\xff", b'{"classes": ["a"', pytest.param(b"[" * 99999, id="deep")]
)
def test_an_evaluation_that_is_garbled_is_one_line(tmp_path, content):
    (tmp_path / "evaluation.json").write_bytes(content)
    with pytest.raises(UserError, match=r"evaluation\.json is damaged"):
        read_file(tmp_path / "evaluation.json")
