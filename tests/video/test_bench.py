"""The benchmark of the training step: its small version runs, with torch and timm alone."""

import json
import subprocess
import sys

import pytest
import torch

from common.errors import UserError
from tests.processes import ROOT
from video.bench import PUBLISHED, main, parse

# What a machine with torch and timm alone has not.
ABSENT = (
    "accelerate",
    "av",
    "deepspeed",
    "jsonargparse",
    "webdataset",
    "nvidia.dali",
    "sklearn",
    "matplotlib",
    "rich",
)
CODE = f"""
import runpy, sys
for name in {ABSENT}:
    sys.modules[name] = None
sys.argv = ["video.bench", *sys.argv[1:]]
runpy.run_module("video.bench", run_name="__main__")
"""


def bench(*words):
    line = [sys.executable, "-c", CODE, "--cpu", *words]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_small_version_runs_without_other_packages(precision):
    names = ["c2d_resnet50", "c2d_resnet50_bat3d"]
    found = bench("--precision", precision, *names)
    assert list(found["results"]) == names
    for name in names:
        row = found["results"][name]
        assert row["clips_s"] == pytest.approx(found["settings"]["batch"] / row["ms"] * 1e3)
        assert row["published"] == PUBLISHED[name]
    assert found["settings"]["precision"] == precision
    assert found["torch"] == torch.__version__
    assert "CPU" in found["device"]


@pytest.mark.slow
def test_the_compiled_network_runs():
    assert bench("--compile", "c2d_resnet50")["results"]["c2d_resnet50"]["ms"] > 0


def test_the_published_settings_are_the_default():
    settings = parse([])
    assert (settings.batch, settings.frames, settings.size, settings.precision) == (16, 8, 224, "bf16")
    assert settings.models == list(PUBLISHED)


def test_mistakes_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="no such models: c2d_resnet5"):
        parse(["c2d_resnet50", "c2d_resnet5"])
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["bench"])
        with pytest.raises(UserError, match="no GPU found"):
            main()
