"""Networks with the CUDA sources in place of the reference, through torch's dispatcher, autograd and autocast."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.kernels import networks
from tests.processes import ROOT


@pytest.fixture(scope="module")
def found() -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.networks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.xdist_group("emulator")
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_gradients_of_a_training_step(name: str, found: dict) -> None:
    distances = found["distances"][name]
    assert distances["kernels, float32"] < 1e-4
    # Rounding to bfloat16 moves these small networks' gradients far: the kernels' not further than the reference's.
    assert distances["kernels, bfloat16"] < 1.5 * distances["reference, bfloat16"]


@pytest.mark.xdist_group("emulator")
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_one_compiled_graph_does_the_same(name: str, found: dict) -> None:
    distances = found["distances"][name]
    assert distances["compiled, float32"] < 1e-4
    assert distances["compiled, bfloat16"] < max(0.1 * distances["reference, bfloat16"], 1e-6)


@pytest.mark.xdist_group("emulator")
def test_the_networks_went_through_the_kernels(found: dict) -> None:
    kinds = ("pairwise", "differences", "norm", "patchwise", "san", "bat", "noah", "fbn")
    assert {call.split(".")[1] for call in found["calls"]} == set(kinds)
    assert len(found["calls"]) == 16  # forward and backward of each
