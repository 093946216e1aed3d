"""What is said before a training, and what is refused."""

from itertools import repeat

import pytest
import timm
from accelerate import Accelerator

import image.models  # noqa: F401  (registers the models)
from common.engine.config import EngineConfig, TrainConfig
from common.engine.trainer import Data
from common.errors import ConfigError
from common.report.summary import Expectation
from common.training import opening, run_training


def data(*classes):
    return Data(
        samples=1234,
        classes=classes,
        train=lambda step: repeat(None),
        val=lambda: iter([]),
        fingerprint="",
        max_unreadable=0.0,
    )


@pytest.fixture(scope="module")
def model():
    return timm.create_model("resnet18_bat", num_classes=2, layers=[1] * 4, channels=[16] * 4)


def test_one_class_is_no_task(model, tmp_path):
    config = EngineConfig(out=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="one class only, 'cat'; a classifier needs two or more"):
        run_training(config, Accelerator(cpu=True), model, data("cat"), Expectation())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("batch_size, warned", [(1234, False), (1235, True)])
def test_a_batch_of_more_than_all_samples_is_worth_a_warning(
    batch_size, warned, model, tmp_path, monkeypatch, capsys
):
    class Started(Exception):
        pass

    def trainer(*arguments):
        raise Started

    monkeypatch.setattr("common.training.Trainer", trainer)
    config = EngineConfig(out=str(tmp_path), train=TrainConfig(batch_size=batch_size))
    with pytest.raises(Started):
        run_training(config, Accelerator(cpu=True), model, data("cat", "dog"), Expectation())
    assert (
        "warning: train.batch_size = 1235: more than the 1,234 training samples" in capsys.readouterr().err
    ) == warned


def test_the_first_line_says_what_is_trained_on_what(model):
    line = opening(EngineConfig(out="runs/x"), Accelerator(cpu=True), model, data("cat", "dog"))
    count = sum(p.numel() for p in model.parameters())
    assert line == (
        f"resnet18_bat, {count:,} parameters; 1,234 training samples of 2 classes; cpu, fp32; run in runs/x"
    )
