"""`python -m kernels.bench` runs on a CPU and says what it lacks for a GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kernels import bench, runtime
from tests.processes import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kernels.bench", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_on_a_cpu(tmp_path) -> None:
    done = run(
        "--cpu", "--only", "PatchwiseAttention/c2048", "--images", "1", "--out", str(tmp_path / "out.json")
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["name"] == "PatchwiseAttention/c2048_h7_k7"
    for path in ("own", "naive"):
        assert row[path]["ms"] > 0
        assert row[path]["MiB"] >= 0


@pytest.mark.skipif(runtime.missing() is None, reason="there is a GPU")
def test_without_a_gpu() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stderr.endswith("no CUDA device; --cpu measures the path that a CPU takes\n")


def test_every_network_has_a_published_number() -> None:
    known = {**bench.PUBLISHED["models"], **bench.PUBLISHED["others"]}
    for network in bench.NETWORKS:
        assert any(name.startswith(f"{network.published}/b{network.batch}/") for name in known), network
