"""What a script says of an error, and its exit code."""

import errno
import os

import pytest

from common.errors import ConfigError, RunError, run_main


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ConfigError("a = 1: expected\n2"), 2, "error: a = 1: expected 2"),
        (RunError("the loss is nan"), 1, "error: the loss is nan"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/metrics.jsonl"),
            1,
            "error: runs/a/metrics.jsonl: No space left on device; mend that and run the same command again",
        ),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
            1,
            "error: a file: Permission denied; mend that and run the same command again",
        ),
    ],
)
def test_what_is_the_users_to_mend_is_one_line(capsys, error, code, line):
    with pytest.raises(SystemExit) as exit:
        run_main(raising(error))
    assert exit.value.code == code
    assert capsys.readouterr().err == f"{line}\n"


def test_a_mistake_of_the_program_keeps_its_traceback():
    with pytest.raises(FileNotFoundError):
        run_main(raising(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "x")))
