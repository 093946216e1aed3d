"""Seeing results, with the commands of the docs on a real run: profile, pictures of attention, report, exports."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors import safe_open

from common import export
from common.errors import UserError
from image import visualize
from tests.browser import seen_in
from tests.processes import ROOT, run, train

pytestmark = pytest.mark.xdist_group("seeing")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    """A run with a profile; its output."""
    folder = tmp_path_factory.mktemp("runs") / "profiled"
    done = train(folder, digits, profile="true", profile_memory="true", train__epochs=1, data__workers=1)
    return folder, done.stdout


def module(name, *words):
    return subprocess.run(
        [sys.executable, "-m", name, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_a_profile_is_a_trace_and_the_ten_largest_operators(trained):
    folder, out = trained
    events = json.loads((folder / "profile" / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::convolution_backward" for event in events)
    lines = (folder / "profile" / "operators.txt").read_text().splitlines()
    assert len(lines) == 11
    assert lines[1] in out
    shares = [float(line[60:68].strip().rstrip("%")) for line in lines[1:]]
    assert shares == sorted(shares, reverse=True)
    assert 50 < sum(shares) <= 100
    assert "aten::" in (folder / "profile" / "memory.txt").read_text()


def test_the_run_keeps_its_worst_samples(trained):
    worst = json.loads((trained[0] / "evaluation.json").read_text())["worst"]
    losses = [sample["loss"] for sample in worst]
    assert len(losses) == 16
    assert losses == sorted(losses, reverse=True)
    assert all(sample["target"] != sample["predicted"] for sample in worst)


def test_its_attention_is_drawn(trained, digits, tmp_path):
    folder, _ = trained
    pictures = [next((digits / "val" / digit).iterdir()) for digit in "37"]
    done = run("image/visualize.py", folder, *pictures, top=2)
    assert done.returncode == 0, done.stderr
    page = folder / "attention" / "index.html"
    assert str(page) in done.stdout
    files = list(page.parent.glob("*.png"))
    assert len(files) == 6  # the evidence and two blocks, of two images
    seen = seen_in(page, tmp_path)
    assert seen["console"] == []
    assert len(seen["widths"]) == 2 + 6
    assert "layer2.nl0.batransform: bilinear attentional transform" in seen["text"]


def test_weights_without_a_run_are_drawn(digits, tmp_path, monkeypatch):
    """As published ones are: the command line says what the network is."""
    size = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
    torch.save(
        timm.create_model("resnet18_bat", num_classes=5, **size).state_dict(), tmp_path / "weights.pth"
    )
    picture = next((digits / "val" / "3").iterdir())
    words = [
        "--model.name=resnet18_bat",
        f"--model.args={json.dumps(size)}",
        "--num_classes=5",
        f"--out={tmp_path}",
    ]
    monkeypatch.setattr(sys, "argv", ["visualize.py", str(tmp_path / "weights.pth"), str(picture), *words])
    assert visualize.main() == 0
    assert (tmp_path / "attention" / "index.html").is_file()


@pytest.mark.parametrize(
    "words, message", [([], "no image after"), (["none.jpg"], "cannot be read as an image")]
)
def test_what_cannot_be_drawn_is_named(trained, words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["visualize.py", str(trained[0]), *words])
    with pytest.raises(UserError, match=message):
        visualize.main()


def test_the_report_opens_in_a_browser(trained, tmp_path):
    page = tmp_path / "report.html"
    done = module("common.report", trained[0], "-o", page)
    assert done.returncode == 0, done.stderr
    seen = seen_in(page, tmp_path)
    assert seen["console"] == []
    assert len(seen["widths"]) == 2 + 16
    assert "Every sample could be read." in seen["text"]


def test_exports_give_what_the_run_gives(trained, tmp_path, monkeypatch):
    folder, _ = trained
    done = module("common.export", folder, tmp_path / "digits.pt2", "--check")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "checked: its logits differ from torch's by at most" in done.stdout
    monkeypatch.setattr(sys, "argv", ["export", str(folder), str(tmp_path / "digits.safetensors")])
    assert export.main() == 0
    model, _ = export.open_model(str(folder))
    with safe_open(tmp_path / "digits.safetensors", "pt") as file:
        about = file.metadata()
        assert set(file.keys()) == set(model.state_dict())
        assert all(torch.equal(file.get_tensor(key), value) for key, value in model.state_dict().items())
    assert about["model"] == "resnet18_bat"
    assert json.loads(about["classes"]) == [str(digit) for digit in range(10)]
    assert about["input_size"] == "3x32x32"
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        logits = torch.export.load(tmp_path / "digits.pt2").module()(x)
        torch.testing.assert_close(logits, model(x), atol=1e-5, rtol=1e-4)


def test_an_export_to_nowhere_is_named(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export", str(trained[0]), str(tmp_path / "digits.caffe")])
    with pytest.raises(UserError, match=r"expected a name that ends in \.safetensors, \.onnx, \.pt2"):
        export.main()
