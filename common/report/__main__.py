"""Runs on one page: `python -m common.report RUN... -o report.html`.

Curves, learning rate, throughput and waiting for data, confusion, classes, the worst samples, settings, versions and
unreadable samples of every run; of several runs also their means and deviations. The page needs no other file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common.config import Commands
from common.errors import run_main
from common.report.page import write_report


def main() -> int:
    """Do what the command line says; returns the exit code."""
    parser = Commands(
        prog="python -m common.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"), help="the page to write")
    arguments = parser.parse_args()
    page, count = write_report(arguments.runs, arguments.out), len(arguments.runs)
    print(f"written: {page}, {count} {'run' if count == 1 else 'runs'}")
    return 0


if __name__ == "__main__":
    run_main(main)
