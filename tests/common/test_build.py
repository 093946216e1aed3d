"""A model from a recipe: arguments, attached mechanisms, and one line for what does not fit."""

import pytest
import torch

from common.config import parse
from common.errors import ConfigError
from common.models.build import build_model, refuse_misfit
from image.train import DIGITS, Config


def build(*options):
    config, _ = parse(Config, options, default_recipe=DIGITS)
    return build_model(config.model, 10)


def test_a_mechanism_is_attached_from_the_command_line():
    model = build("--model.name=convnext_atto", "--model.attach.noah.heads=4").eval()
    assert model.get_classifier().heads == 4
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)


def test_blocks_and_a_head_together():
    model = build(
        "--model.name=resnet10t", "--model.attach={bat: {after: [layer2.0], size: 4}, fbn: {factors: 3}}"
    )
    assert model.layer2[0].bat.batransform.size == 4
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            ["--model.name=resnet50_bta"],
            "model.name = 'resnet50_bta': no such model; did you mean 'resnet50_bat'?",
        ),
        (["--model.args.depht=3"], "model.args of resnet18_bat: .*depht"),
        (["--model.name=resnet10t", "--model.attach.noha.heads=4"], "model.attach.noha on resnet10t: .*noah"),
        (
            ["--model.name=resnet10t", "--model.attach.noah.heads=7"],
            "model.attach.noah on resnet10t: heads=7.*use",
        ),
        (
            ["--model.name=resnet10t", "--model.attach.bat.after=[layer9]"],
            "model.attach.bat on .*'layer9'.*nearest",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(options, expected):
    with pytest.raises(ConfigError, match=expected) as error:
        build(*options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224_noah"])
def test_a_network_of_one_size_refuses_others(name):
    model = build(f"--model.name={name}", "--model.args={depth: 1}")
    with pytest.raises(
        ConfigError, match="augment.size = 64: .*; try --augment.size 224, or --model.args.img_size 64"
    ):
        refuse_misfit(model, 64, "augment.size")
    refuse_misfit(model, 224, "augment.size")
    refuse_misfit(build(f"--model.name={name}", "--model.args={depth: 1, img_size: 64}"), 64, "augment.size")


def test_a_network_of_any_size_is_not_tried():
    refuse_misfit(torch.nn.Identity(), 64, "augment.size")
