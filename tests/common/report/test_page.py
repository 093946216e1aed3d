"""The report of runs: what is on the page, that data cannot become markup, and that a browser shows it."""

import base64
import io
import json

import pytest
import yaml
from PIL import Image

from common.errors import UserError
from common.report.page import write_report
from tests.browser import seen_in

EVIL = "<script>alert(1)</script>"


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def a_run(folder, seed, top1):
    folder.mkdir()
    config = {"out": str(folder), "model": {"name": EVIL}, "train": {"seed": seed}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rates = {"samples_per_s": 10.0, "data_wait": 0.1, "memory_gib": 1.0, "lr": 0.1, "loss": 1.0, "top1": 50.0}
    entries = [{"split": "train", "step": s, "epoch": s / 10, "time": 100.0 + s} | rates for s in (10, 20)]
    entries.append({"split": "val", "step": 20, "epoch": 2.0, "time": 121.0, "loss": 0.5, "top1": top1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    worst = [{"loss": 3.0, "target": 0, "predicted": 1, "share": 0.9, "png": png()}]
    evaluation = {"top1": top1, "top5": 100.0, "mean_class": top1, "loss": 0.5, "classes": [EVIL, "$x_{$"]}
    evaluation |= {"confusion": [[3, 1], [0, 4]], "per_class": [75.0, 100.0], "worst": worst}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "starts.jsonl").write_text(json.dumps({"versions": {"torch": "2.14.1"}}) + "\n")
    sample = {"where": f"a/{EVIL}.jpg", "reason": "truncated", "detail": "&", "shard": "train_0.rec"}
    (folder / "quarantine.jsonl").write_text(json.dumps(sample) + "\n" + '{"where": "cut o')
    return folder


@pytest.fixture
def page(tmp_path):
    runs = [
        a_run(tmp_path / f"{seed}{EVIL.replace('/', '')}", seed, top1)
        for seed, top1 in ((0, 87.5), (1, 90.5))
    ]
    return write_report(runs, tmp_path / "report.html")


def test_the_page_holds_everything_and_loads_nothing(page):
    text = page.read_text()
    for wanted in (
        "89.00 ± 2.12",
        "1 truncated",
        "<td>train_0.rec</td><td>1</td>",
        "torch",
        "loss 3.00",
        "75.0",
    ):
        assert wanted in text
    assert "<script" not in text
    assert 'src="data:image/png' in text
    assert not any(word in text for word in ("http://", "https://", 'src="/', 'href="/'))


def test_a_browser_shows_it_without_a_complaint(page, tmp_path):
    seen = seen_in(page, tmp_path)
    assert seen["console"] == []
    assert len(seen["widths"]) == 1 + 2 * 2  # curves, and of each run the confusion and one sample
    assert min(seen["widths"]) >= 8
    assert seen["scripts"] == 1  # the one that looks
    assert EVIL in seen["text"]


def test_what_is_not_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="is not a run's folder"):
        write_report([tmp_path], tmp_path / "r.html")
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match="no evaluation.json"):
        write_report([tmp_path], tmp_path / "r.html")
