"""Every CIFAR recipe is a configuration that trains, with the published settings."""

from pathlib import Path

import pytest

from cifar.train import Config
from common.engine.schedule import factor
from common.engine.writer import Writer
from tests.recipes import OVERRIDES, parsed, two_steps

FOLDER = Path(__file__).parents[2] / "cifar" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "digits")


def recipe(name, *arguments):
    return parsed(Config, FOLDER / f"{name}.yaml", *arguments)


# Epochs and the learning rate at some of them.
SETTINGS = {
    "inception_bn_small": (400, {0: 0.2, 200: 0.02, 300: 2e-3}),
    "inception_bn_small_bilinear": (400, {0: 0.2, 200: 0.02, 300: 2e-3}),
    "inception_bn_small_fbn": (400, {0: 0.02, 1.5: 0.11, 3: 0.2, 200: 0.02, 300: 2e-3}),
    "resnet164": (200, {0: 0.01, 0.99: 0.01, 1: 0.1, 100: 0.01, 150: 1e-3}),
    "resnet164_fbn": (200, {0: 0.01, 1.5: 0.055, 3: 0.1, 100: 0.01, 150: 1e-3}),
    "resnet1001": (200, {0: 0.01, 0.99: 0.01, 1: 0.1, 100: 0.01, 150: 1e-3}),
    "resnet1001_fbn": (200, {0: 0.01, 1.5: 0.055, 3: 0.1, 100: 0.01, 150: 1e-3}),
}


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("model", SETTINGS)
def test_settings_are_the_published_ones(model, classes):
    config, (epochs, rates) = recipe(f"{model}_cifar{classes}"), SETTINGS[model]
    assert (config.model.name, config.out) == (model, f"runs/{model}_cifar{classes}")
    assert config.model.args == ({"factors": 20, "drop_factor": 0.5} if model.endswith("_fbn") else {})
    assert (config.train.epochs, config.train.batch_size) == (epochs, 128)
    optim = config.optim
    assert (optim.name, optim.momentum, optim.weight_decay, optim.clip_value) == ("sgd", 0.9, 1e-4, 10)
    assert optim.decay_norm
    assert optim.decay_bias
    for epoch, rate in rates.items():
        assert optim.lr * factor(config.schedule, epoch, epochs) == pytest.approx(rate), epoch


def test_there_are_no_others():
    assert {f"{model}_cifar{classes}" for model in SETTINGS for classes in (10, 100)} == set(RECIPES)


@pytest.mark.parametrize("name", ["resnet164_fbn_cifar100", "inception_bn_small_bilinear_cifar10"])
def test_two_steps_of_a_small_version(tmp_path, name):
    config = recipe(name, *OVERRIDES, f"--out={tmp_path / 'run'}")
    if name.startswith("resnet"):
        config.model.args["depth"] = 11
    two_steps(config, classes=6, shape=(3, 16, 16))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_as_published(tmp_path, monkeypatch, name):
    monkeypatch.setattr(Writer, "save", lambda *_: None)  # written elsewhere, and only a copy of the weights
    config = recipe(name, *OVERRIDES, f"--out={tmp_path / 'run'}")
    two_steps(config, classes=int(name.rpartition("cifar")[2]), shape=(3, 32, 32))
