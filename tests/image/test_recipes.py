"""Every image recipe is a configuration that trains, with the published settings."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from common.data import augment as augmentation
from common.engine.optim import build_optimizer
from common.engine.schedule import factor
from common.engine.writer import Writer
from common.models.build import build_model
from common.report.summary import Expectation, summarize
from image.train import Config
from tests.recipes import OVERRIDES, parsed, two_steps

FOLDER = Path(__file__).parents[2] / "image" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "digits")

VIT = {"img_size": 32, "depth": 2}
SMALL = {
    "resnet50_bat": (
        32,
        {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "bat_size": 2, "nl_mod": [1, 1, 1000]},
    ),
    "resnet50_nl": (32, {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "nl_mod": [1, 1, 1000]}),
    "san10_pairwise": (64, {"layers": [1] * 5, "widths": [32] * 5, "kernels": [3] * 5}),
    "san15_patchwise": (64, {"layers": [1] * 5, "widths": [32] * 5, "kernels": [3] * 5}),
    "resnet26_1241": (32, {}),
    "resnet18_noah": (64, {}),
    "mobilenetv2_035_noah": (64, {}),
    "mobilenetv3_small_base": (64, {}),
    "shufflenetv2_100_noah": (64, {}),
    "deit_tiny_050_patch16_224_noah": (32, VIT),
    "deit_tiny_patch16_224": (32, VIT),
    "pvt_tiny_050_noah": (64, {"depths": [1, 1, 1, 1]}),
    "mixer_s16_050_224_noah": (32, {"img_size": 32, "num_blocks": 2}),
    "gmlp_ti16_050_224": (32, {"img_size": 32, "num_blocks": 2}),
    "resnet34_fbn": (32, {}),
    "inception_bn": (64, {}),
}


def recipe(name, *arguments):
    return parsed(Config, FOLDER / f"{name}.yaml", *arguments)


@pytest.fixture(scope="module")
def recipes():
    return {name: recipe(name) for name in RECIPES}


def test_every_recipe_names_a_model_a_folder_of_its_own_and_its_data(recipes):
    assert len(recipes) == 73
    for name, config in recipes.items():
        assert timm.is_model(config.model.name), name
        assert name in (config.model.name, f"{config.model.name}_san_baseline")
        assert config.out == f"runs/{name}"
        assert config.data.path == "data/imagenet"
        assert config.augment.size == 224
        comment = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
        assert comment.startswith("# ")
        assert len(comment) <= 120


def test_images_are_prepared_as_the_model_expects(recipes):
    for name, config in recipes.items():
        cfg, augment = timm.get_pretrained_cfg(config.model.name), config.augment
        np.testing.assert_allclose([augment.mean, augment.std], [cfg.mean, cfg.std], atol=1e-9, err_msg=name)
        if not timm.models.model_entrypoint(config.model.name).__module__.startswith("timm."):
            assert (augment.interpolation, augment.crop) == (cfg.interpolation, cfg.crop_pct), name


def test_transforms_make_images_of_the_right_size(recipes):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    for augment in {repr(config.augment): config.augment for config in recipes.values()}.values():
        for transform in (augmentation.train_transform(augment), augmentation.test_transform(augment)):
            assert transform(image).shape == (3, 224, 224)


def test_fbn_subtracts_a_mean_and_scales_nothing(recipes):
    normalize = augmentation.Normalize(recipes["resnet50_fbn"].augment, torch.device("cpu"))
    grey = normalize(torch.full((1, 3, 2, 2), 128, dtype=torch.uint8))[0, :, 0, 0]
    torch.testing.assert_close(grey, 128 - torch.tensor([123.68, 116.779, 103.939]), atol=1e-4, rtol=0)
    assert recipes["resnet50_fbn"].augment.calm_epochs == 10
    assert recipes["inception_bn_fbn"].augment.calm_epochs == 0


# Epochs, batch, optimizer and the learning rate at some epochs, with the beginning and the end.
SETTINGS = {
    "resnet101_bat": (90, 256, "sgd", {0: 0, 2.5: 0.05, 5: 0.1, 30: 0.01, 60: 1e-3, 80: 1e-4, 90: 1e-4}),
    "resnet152_nl": (90, 256, "sgd", {0: 0, 2.5: 0.05, 5: 0.1, 30: 0.01, 60: 1e-3, 80: 1e-4, 90: 1e-4}),
    "san19_patchwise": (100, 256, "sgd", {0: 0.1, 50.9: 0.05, 99: 2.4672e-5}),
    "resnet50_san_baseline": (100, 256, "sgd", {0: 0.1, 50.9: 0.05, 99: 2.4672e-5}),
    "resnet50_noah": (100, 256, "sgd", {0: 0.1, 29.9: 0.1, 30: 0.01, 60: 1e-3, 90: 1e-4}),
    "mobilenetv2_075": (150, 256, "sgd", {0: 0.05, 75: 0.025, 150: 0}),
    "mobilenetv3_small_noah": (150, 256, "sgd", {0: 0.05, 75: 0.025, 150: 0}),
    "shufflenetv2_100_base": (240, 1024, "sgd", {0: 0.5, 60: 0.375, 240: 0}),
    "deit_base_patch16_224": (300, 1024, "adamw", {0: 1e-6, 2.5: 5.005e-4, 150: 5.05e-4, 300: 1e-5}),
    "pvt_tiny_noah": (300, 1024, "adamw", {0: 1e-6, 2.5: 5.005e-4, 150: 5.05e-4, 300: 1e-5}),
    "gmlp_s16_224_noah": (300, 1536, "adamw", {0: 1e-6, 10: 3.505e-4, 150: 3.55e-4, 300: 1e-5}),
    "resnet34_fbn": (120, 256, "nag", {0: 0.01, 0.5: 0.055, 1: 0.1, 60: 0.01, 75: 1e-3, 90: 1e-4}),
    "resnet34_preact": (120, 256, "nag", {0: 0.1, 60: 0.01, 75: 1e-3, 90: 1e-4}),
    "inception_bn_fbn": (55, 128, "nag", {0: 0.01, 1: 0.1, 55: 0.1}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_schedules_are_the_published_ones(recipes, name):
    config = recipes[name]
    epochs, batch, optimizer, rates = SETTINGS[name]
    assert (config.train.epochs, config.train.batch_size, config.optim.name) == (epochs, batch, optimizer)
    assert config.optim.momentum == 0.9
    for epoch, rate in rates.items():
        lr = config.optim.lr * factor(config.schedule, epoch, config.train.epochs)
        assert lr == pytest.approx(rate, rel=1e-4, abs=1e-10), epoch


DECAY = {
    "resnet50_bat": 1e-4,
    "san10_pairwise": 1e-4,
    "mobilenetv2_035": 4e-5,
    "resnet50_fbn": 1e-4,
    "mobilenetv3_small_noah": 4e-5,
    "shufflenetv2_100_noah": 4e-5,
    "deit_tiny_patch16_224_noah": 0.05,
    "pvt_tiny_050": 0.05,
    "mixer_s16_224": 0.067,
}


@pytest.mark.parametrize("name", DECAY)
def test_what_decays(recipes, name):
    """Everything, but in MobileNetV3, ShuffleNetV2, ViTs and MLPs no norm and no bias."""
    with torch.device("meta"):
        model = build_model(recipes[name].model, 10)
    optimizer = build_optimizer(model, recipes[name].optim)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    norms = {
        id(p)
        for m in model.modules()
        if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))
        for p in m.parameters()
    }
    exempt = name.startswith(("mobilenetv3", "shufflenetv2", "deit", "pvt", "mixer"))
    for key, parameter in model.named_parameters():
        embedding = key.endswith(("pos_embed", "cls_token"))
        free = exempt and (id(parameter) in norms or key.endswith("bias") or embedding)
        assert decay[id(parameter)] == (0 if free else DECAY[name]), key


def test_regularisation_is_the_published_one(recipes):
    for name, config in recipes.items():
        vit, mlp = name.startswith(("deit", "pvt")), name.startswith(("mixer", "gmlp"))
        san = name.startswith("san") or name in ("resnet26_1241", "resnet38_2352", "resnet50_san_baseline")
        assert config.loss.smoothing == (0.1 if vit or mlp or san else 0), name
        assert config.loss.smoothing_over == ("others" if san else "all"), name
        assert (config.mixup.mixup, config.mixup.cutmix) == (
            (0.8, 1) if vit else (0.5, 1) if mlp else (0, 0)
        ), name
        assert config.train.ema == (0.99996 if name.startswith("deit") else 0.99992 if mlp else 0), name
        assert (config.optim.clip_norm, config.optim.eps) == ((1, 1e-6) if mlp else (0, 1e-8)), name
        assert config.augment.repeats == (3 if vit else 1), name
        assert config.augment.auto == (
            "rand-m9-mstd0.5-inc1" if vit else "rand-m6-n3-mstd1.0-inc1" if mlp else None
        ), name
        assert config.model.args.get("drop_path_rate", 0) == (0.1 if vit or mlp else 0), name
        if name.endswith("_noah"):
            mobile, shuffle = name.startswith("mobilenet"), name.startswith("shufflenet")
            assert config.model.args["noah_dropout"] == (0.2 if mobile else 0 if shuffle else 0.1), name


@pytest.mark.parametrize("name", SMALL)
def test_two_steps_of_a_small_version(tmp_path, name):
    side, arguments = SMALL[name]
    config = recipe(name, *OVERRIDES, f"--out={tmp_path / 'run'}")
    config.model.args |= arguments
    trainer = two_steps(config, classes=6, shape=(3, side, side))
    assert (trainer.ema is not None) == name.startswith(("deit", "mixer", "gmlp"))


def test_a_run_ends_with_the_published_accuracy_beside_its_own(tmp_path):
    config = recipe("resnet50_bat", *OVERRIDES, f"--out={tmp_path / 'run'}")
    config.model.args |= SMALL["resnet50_bat"][1]
    trainer = two_steps(config, classes=2, shape=(3, 32, 32))
    lines = summarize(trainer.run.folder, trainer.evaluation, config.expect).splitlines()
    assert lines[1] == "  published    top-1 78.3 % (on recompressed images, lower on original JPEG files)"
    without = summarize(trainer.run.folder, trainer.evaluation, Expectation()).splitlines()
    assert without == [lines[0], *lines[2:]]
    config.expect.top1 = None  # may change without making it another run
    assert two_steps(config, classes=2, shape=(3, 32, 32)).progress.step == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_as_published(tmp_path, monkeypatch, name):
    monkeypatch.setattr(Writer, "save", lambda *_: None)  # hundreds of megabytes each, and tested elsewhere
    config = recipe(name, *OVERRIDES, f"--out={tmp_path / 'run'}")
    two_steps(config, classes=1000, shape=(3, 224, 224))
