"""The API page from the docstrings: `python -m common.report.api docs/api.md`."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import run_main
from common.files import atomic_write

MODULES = (
    "common.attention.attach",
    "common.attention.bat",
    "common.attention.bat_video",
    "common.attention.fbn",
    "common.attention.noah",
    "common.attention.non_local",
    "common.attention.san",
    "common.weights",
    "common.export",
    "common.models.build",
    "common.models.table",
    "common.report.maps",
    "common.report.evidence",
    "common.report.occlusion",
    "common.report.attention",
    "common.report.page",
    "common.engine.trainer",
    "common.engine.evaluate",
    "kernels.bat",
    "kernels.fbn",
    "kernels.noah",
    "kernels.pairwise",
    "kernels.patchwise",
    "kernels.reference",
    "kernels.runtime",
    "kernels.san",
)


def main() -> int:
    """Write the page to the file named on the command line; returns the exit code."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/api.md")
    with atomic_write(path) as file:
        file.write(render().encode())
    print(f"written: {path}")
    return 0


def render() -> str:
    """The page."""
    lines = ["# API", "", "Made from the docstrings by `python -m common.report.api docs/api.md`.", ""]
    for name in MODULES:
        module = importlib.import_module(name)
        lines += [f"## `{name}`", "", _text(module), ""]
        for title, member in _public(module):
            lines += [f"### `{title}`", "", _text(member), ""]
    return "\n".join(lines)


def _public(module: Any) -> Iterator[tuple[str, Any]]:
    """Functions, and classes with their methods, that are documented and defined in ``module``, as they stand there."""
    own = [
        m for m in vars(module).values() if getattr(m, "__module__", None) == module.__name__ and _named(m)
    ]
    for member in sorted(own, key=_line):
        if inspect.isfunction(member):
            yield _signature(member), member
        elif inspect.isclass(member):
            yield f"class {member.__name__}", member
            methods = [m for m in vars(member).values() if inspect.isfunction(m) and _named(m)]
            yield from ((_signature(m, f"{member.__name__}."), m) for m in sorted(methods, key=_line))


def _named(member: Any) -> bool:
    name = getattr(member, "__name__", "_")
    return not name.startswith("_") and name != "main" and bool(inspect.getdoc(member))


def _line(member: Any) -> int:
    code = inspect.unwrap(member)
    return inspect.getsourcelines(code)[1]


def _signature(function: Any, owner: str = "") -> str:
    names = [
        f"{'*' * (p.kind is p.VAR_POSITIONAL) + '**' * (p.kind is p.VAR_KEYWORD)}{p.name}"
        for p in inspect.signature(function).parameters.values()
        if p.name != "self"
    ]
    return f"{owner}{function.__name__}({', '.join(names)})"


def _text(member: Any) -> str:
    """The docstring as Markdown: a line as it is, more as a block that keeps its form."""
    words = re.sub(r":(?:class|func|meth|mod|data):", "", inspect.getdoc(member) or "").replace("\\*", "*")
    return f"```text\n{words.replace('`', '')}\n```" if "\n" in words else words.replace("``", "`")


if __name__ == "__main__":
    run_main(main)
