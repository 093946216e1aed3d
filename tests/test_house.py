"""The house: imports run one way, kernels ← common ← image | video | cifar."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": {"kernels"},
    "common": {"kernels", "common"},
    "image": {"kernels", "common", "image"},
    "video": {"kernels", "common", "video"},
    "cifar": {"kernels", "common", "cifar"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room):
    assert modules(room), f"{room}/ is empty"
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(room)
        for name in imports(path)
        if name.split(".")[0] in MAY_IMPORT and name.split(".")[0] not in MAY_IMPORT[room]
    ]
    assert not wrong


@pytest.mark.parametrize(
    "inside, outside",
    [
        ("common/attention", ("common.engine", "common.data", "accelerate")),
        ("common/data", ("common.engine", "common.attention", "common.models")),
        ("common/engine", ("common.attention", "common.models", "common.data.images", "common.data.source")),
    ],
)
def test_rooms_of_common_do_not_know(inside, outside):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(inside)
        for name in imports(path)
        if name.startswith(outside)
    ]
    assert not wrong


def test_a_clone_stays_small():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(
        b"\0"
    )
    total = sum(
        (ROOT / name.decode()).stat().st_size for name in files if name and (ROOT / name.decode()).is_file()
    )
    assert total < 40e6
