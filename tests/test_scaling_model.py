"""The model of many GPUs: what it must come to where the answer is plain, and that it says what it is."""

import subprocess
import sys
from dataclasses import replace
from importlib import util

import pytest

from tests.processes import ROOT

spec = util.spec_from_file_location("scaling_model", ROOT / "benchmarks" / "scaling_model.py")
model = sys.modules["scaling_model"] = util.module_from_spec(spec)
spec.loader.exec_module(model)

# A step of 100 ms with 100 samples, and nothing in the way.
IDEAL = model.Assumptions(
    step_ms=100,
    batch=100,
    parameters=25_000_000,
    latency_us=0,
    network_GB_s=1e9,
    node_GB_s=1e9,
    jitter=0,
    samples=1_000_000,
    epochs=36,
    loading_per_GPU=1e9,
    storage_GB_s=1e9,
    sample_kB=100,
    write_MB_s=100,
)


def test_with_nothing_in_the_way_speed_grows_with_the_gpus():
    for gpus in model.GPUS:
        row = model.predict(IDEAL, gpus)
        assert (row["samples/s"], row["of one GPU's"], row["limit"]) == (1000 * gpus, "100%", "compute")
    row = model.predict(IDEAL, 8)
    assert row["hours"] == round(36e6 / 8000 / 3600, 2)
    assert row["data GB/s"] == 0.8
    assert row["shards/GPU"] == 1_000_000 * 0.1 / 200 / 8
    assert row["checkpoint s"] == 2.0, "weights and momentum, 100 MB each"


@pytest.mark.parametrize(
    "changed, samples_per_s, limit",
    [
        ({"loading_per_GPU": 500.0}, 500 * 16, "data"),
        ({"storage_GB_s": 0.4}, 4000, "data"),
        # 2·(2 − 1)/2 · 100 MB / 1 GB/s = 100 ms, all of it seen: as long again as the step
        ({"network_GB_s": 1.0, "overlap": 0.0}, 8000, "network"),
        # as much of it as is behind the backward pass is not seen, but for the last of four buckets
        ({"network_GB_s": 1.0, "overlap": 0.75}, round(1600 / (0.1 + 0.1 - 0.05)), "network"),
        ({"network_GB_s": 10.0, "overlap": 1.0}, round(1600 / (0.1 + 0.01 / 4)), "compute"),
    ],
)
def test_what_limits(changed, samples_per_s, limit):
    row = model.predict(replace(IDEAL, **changed), 16)
    assert (row["samples/s"], row["limit"]) == (samples_per_s, limit)


def test_the_script_says_that_it_is_a_model():
    command = [sys.executable, "benchmarks/scaling_model.py", "--model", "san10_pairwise/b64/fp32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("A MODEL, NOT A MEASUREMENT")
    assert "step_ms 207.3" in done.stdout
    assert "| 1024 |" in done.stdout
