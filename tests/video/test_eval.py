"""Evaluation over many views: real processes, one and several."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.order import Draw
from common.data.video.clips import ClipConfig, ClipNormalize, VideoDataConfig, open_videos
from common.data.video.views import VIEWS, ViewAverage, ViewSet
from common.engine.worst import THUMBNAIL
from common.errors import ConfigError
from common.evaluation import parse_checkpoint
from common.models.build import ModelConfig, build_model
from common.weights import load_weights
from tests.processes import run
from tests.video.runs import SMALL
from video.eval import EvalConfig

pytestmark = pytest.mark.xdist_group("video")


def evaluate(reference, *, processes=1, **options):
    done = run("video/eval.py", reference, processes=processes, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((reference / "eval.json").read_text()), done


def test_views_are_averaged_and_scores_saved(reference, digits, tmp_path):
    file = tmp_path / "scores" / "scores.npz"
    result, done = evaluate(reference, views="10x3", view_batch=7, data__workers=1, save_scores=file)
    scores = np.load(file)
    assert scores["logits"].shape == (12, 12)
    assert scores["labels"].tolist() == list(range(12))
    assert scores["paths"][3] == "val/moves_down/0000.mp4"
    assert result["top1"] == pytest.approx(100 * (scores["logits"].argmax(1) == scores["labels"]).mean())
    assert f"mean class {result['mean_class']:.2f} %" in done.stdout
    assert (reference / "eval_confusion.png").stat().st_size > 0
    check_page(reference, result, scores)
    model = build_model(ModelConfig(SMALL["model.name"], json.loads(SMALL["model.args"])), 12).eval()
    load_weights(model, reference)
    clip = ClipConfig(2, 4, 5, 32, 32)
    videos = open_videos(VideoDataConfig(path=str(digits)), "val")
    normalize = ClipNormalize("rgb", "video", torch.device("cpu"))
    network = ViewAverage(model, VIEWS["10x3"].boxes(32), normalize, 1000)
    with torch.no_grad():
        for index in (0, 5, 11):
            logits = network(ViewSet(videos, 10, clip).row(Draw(0, index)).inputs[None])
            np.testing.assert_allclose(logits[0].numpy(), scores["logits"][index], rtol=1e-4, atol=1e-4)


def check_page(folder, result, scores):
    """All 12 videos are shown, the worst first, with their names and eight frames each."""
    page = (folder / "eval.html").read_text()
    losses = -torch.from_numpy(scores["logits"]).log_softmax(1)[range(12), scores["labels"]]
    order = losses.argsort(descending=True).tolist()
    assert [sample["index"] for sample in result["worst"]] == order
    assert re.findall(r"<figcaption>(val/\S+\.mp4): ", page) == [scores["paths"][index] for index in order]
    strips = [Image.open(io.BytesIO(base64.b64decode(sample["png"]))) for sample in result["worst"]]
    assert {strip.size for strip in strips} == {(8 * THUMBNAIL, THUMBNAIL)}
    assert "Every sample could be read." in page
    assert "<script" not in page


def test_an_unreadable_video_counts_as_wrong_and_is_named(reference, digits, tmp_path):
    path = shutil.copytree(digits, tmp_path / "digits")
    (path / "val" / "grows" / "0000.mp4").write_bytes(b"")
    run_folder = shutil.copytree(reference, tmp_path / "run")
    result, done = evaluate(run_folder, views="1x1", data__path=path, data__workers=0)
    assert (result["samples"], result["unreadable"]) == (12, 1)
    named = json.loads((run_folder / "eval_quarantine.jsonl").read_text())
    assert named["where"].endswith("val/grows/0000.mp4")
    assert named["reason"] == "empty"
    assert "eval_quarantine.jsonl" in done.stdout
    assert "val/grows/0000.mp4" in (run_folder / "eval.html").read_text()
    evaluate(run_folder, views="1x1", data__path=digits, data__workers=0)
    assert "Every sample could be read." in (run_folder / "eval.html").read_text(), "repaired since"


@pytest.mark.slow
@pytest.mark.parametrize("views", ["1x1", "25x10"])
def test_several_processes_give_the_same_numbers(reference, digits, tmp_path, views):
    """12 videos on 5 processes: some of them get fillers."""
    alone, several = tmp_path / "alone.npz", tmp_path / "several.npz"
    options = {"views": views, "clip__size": 28, "data__workers": 0}
    first, _ = evaluate(reference, save_scores=alone, **options)
    second, _ = evaluate(reference, processes=5, save_scores=several, **options)
    np.testing.assert_allclose(np.load(alone)["logits"], np.load(several)["logits"], rtol=1e-5, atol=1e-5)
    assert np.load(alone)["paths"].tolist() == np.load(several)["paths"].tolist()
    for key in ("top1", "top5", "samples", "confusion"):
        assert first[key] == second[key]
    assert [worst["index"] for worst in first["worst"]] == [worst["index"] for worst in second["worst"]]
    assert first["loss"] == pytest.approx(second["loss"])


def test_a_mistake_is_one_line(reference):
    for option, message in (
        ("--views=3x3", "views: '3x3' is not valid"),
        ("--view_batch=0", "view_batch = 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_checkpoint(EvalConfig, [str(reference), option], None)
