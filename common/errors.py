"""Errors that are the user's to mend: one line, exit code 2 (bad input) or 1 (a failed run), no traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from kernels import KernelError


class UserError(ValueError):
    """What was wrong, where, and what would be right, in one line."""

    exit_code = 2


class RunError(UserError):
    """Something that went wrong in the middle of a run: a diverging loss, a full disk."""

    exit_code = 1


class ConfigError(UserError):
    """A bad setting: found alike on every rank, so only one rank per node prints it."""


_OUTSIDE = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
)
"""Errors of the system that say that a disk or a permission is at fault, not this program."""


def run_main(main: Callable[[], int | None]) -> None:
    """Run a script's ``main`` and exit the process with its code; what is the user's to mend becomes one line."""
    try:
        code = main() or 0
    except UserError as error:
        _print(error)
        code = error.exit_code
    except KernelError as error:
        _print(ConfigError(str(error)))
        code = ConfigError.exit_code
    except BrokenPipeError:  # `… | head` closed our output: not worth a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if error.errno not in _OUTSIDE:
            raise
        _print(
            RunError(
                f"{error.filename or 'a file'}: {error.strerror}; mend that and run the same command again"
            )
        )
        code = RunError.exit_code
    sys.exit(code)


def _print(error: UserError) -> None:
    rank = os.environ.get("RANK", "0")
    alone = rank == "0" or os.environ.get("LOCAL_RANK", "0") == "0"
    if isinstance(error, ConfigError) and not alone:
        return
    line = " ".join(str(error).split())
    print(f"error: {line}" if rank == "0" else f"error (rank {rank}): {line}", file=sys.stderr, flush=True)
