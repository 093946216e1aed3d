"""The table of models against the published programs, the papers, the recipes, the models, and its own document."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import yaml

from common.errors import ConfigError
from common.models.__main__ import describe, overview
from common.models.table import (
    PAPERS,
    ROOT,
    activation_bytes,
    count_macs,
    count_params,
    import_models,
    layers,
    markdown,
    meta_model,
    read_rows,
)

ROWS = read_rows()
PARITY = ROOT / "tests" / "parity"
MODELS = list(dict.fromkeys((row.model, row.classes) for row in ROWS))
BY_MODEL = {(row.model, row.classes): row for row in ROWS}
FEW = ["resnet50_bat", "resnet50_nl", "san10_pairwise", "san10_patchwise", "mobilenetv2_035_noah"]
FEW += ["deit_tiny_patch16_224_noah", "pvt_tiny_050", "gmlp_ti16_050_224_noah", "resnet34_fbn"]
FEW += ["inception_bn_fbn", "inception_bn_small_bilinear"]

# The published programs themselves differ from their papers' tables here.
OFF = {f"deit_tiny_{width}_patch16_224{head}" for width in ("050", "075") for head in ("", "_noah")}
OFF |= {"deit_base_patch16_224", "deit_base_patch16_224_noah", "deit_small_patch16_224"}
OFF |= {"gmlp_ti16_075_224", "gmlp_ti16_075_224_noah"}
OFF |= {"resnet164_fbn", "resnet1001", "resnet1001_fbn"}

import_models()


@cache
def published_programs():
    """Model → (parameters, MACs) of the published program."""
    found = {}
    for path in (PARITY / "manifest").glob("*.json"):
        manifest = json.loads(path.read_text())
        found[path.stem] = found[path.stem.removesuffix("_base")] = (
            manifest["params"],
            manifest["macs_at_input"],
        )
    return found


def test_rows_are_what_the_published_programs_have():
    compared = 0
    for row in ROWS:
        if row.model in published_programs():
            params, macs = published_programs()[row.model]
            assert row.params == params, row.model
            assert row.macs == pytest.approx(macs, rel=0.01), row.model
            compared += 1
    assert compared > 60


def test_macs_differ_from_the_published_programs_only_where_that_is_known():
    """BAT's contraction needs no enlarged matrices; SAN's position map is written out, not a convolution."""
    for row in ROWS:
        if row.model not in published_programs():
            continue
        difference = published_programs()[row.model][1] - row.macs
        if row.model.endswith("_bat"):
            assert difference > 0
            assert row.model != "resnet50_bat" or difference == 21_073_920
        elif row.model.endswith("_pairwise"):
            assert 0 < difference < 1e-4 * row.macs
        else:
            assert difference == 0, row.model


def test_fbn_rows_have_the_published_parameters():
    published = json.loads((PARITY / "fbn_params.json").read_text())
    found = set()
    for row in ROWS:
        name = row.model.replace("_fbn", "_fmconv")
        keys = (f"cifar{row.classes}_{name}", f"imagenet_{name}_k50", f"imagenet_{name}")
        for key in set(keys) & set(published):
            assert row.params == published[key]["params"], key
            found.add(key)
    assert {key for key in published if not key.endswith("_k20")} == found


def test_rows_round_to_the_papers_figures():
    off = set()
    for row in ROWS:
        for value, figure in ((row.params / 1e6, row.paper_params), (row.macs / 1e9, row.paper_macs)):
            if not figure or (row.paper == "SAN" and figure.endswith("G")):  # SAN's counts norms and more
                continue
            number, unit = figure[:-1], figure[-1]
            assert unit in "MG"
            digit = 10 ** -len(number.partition(".")[2])
            if unit == "G":
                assert value == pytest.approx(float(number), rel=0.015), row.model
            elif abs(value - float(number)) > 1.01 * digit:
                off.add(row.model)
    assert off <= OFF, off - OFF


@pytest.mark.parametrize("task", ["image", "cifar"])
def test_every_recipe_has_its_row(task):
    paths = {str(path.relative_to(ROOT)) for path in (ROOT / task / "recipes").glob("*.yaml")}
    rows = {row.recipe: row for row in ROWS if row.recipe.startswith(f"{task}/")}
    assert set(rows) == {path for path in paths if not path.endswith("digits.yaml")}
    for path, row in rows.items():
        recipe = yaml.safe_load((ROOT / path).read_text())
        assert recipe["model"]["name"] == row.model
        assert recipe["data"]["path"].endswith(
            {10: "cifar10", 100: "cifar100", 1000: "imagenet"}[row.classes]
        )


def test_no_row_stands_twice():
    assert len({(row.recipe, row.model) for row in ROWS}) == len(ROWS)
    assert {row.paper for row in ROWS} <= set(PAPERS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: Path(row.recipe).stem or row.model)
def test_parameters_are_exact(row):
    """Built as the recipe says, whose arguments must not change the size."""
    recipe = yaml.safe_load((ROOT / row.recipe).read_text()) if row.recipe else {"model": {}}
    model = meta_model(row.model, row.classes, **recipe["model"].get("args", {}))
    assert count_params(model) == row.params


@pytest.mark.parametrize(
    "model, classes",
    [
        pytest.param(*key, id="-".join(map(str, key)), marks=() if key[0] in FEW else pytest.mark.slow)
        for key in MODELS
    ],
)
def test_macs(model, classes):
    assert count_macs(meta_model(model, classes)) == BY_MODEL[model, classes].macs


def test_counting_leaves_the_model_as_it_was():
    model = meta_model("san10_pairwise")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert layers(model)[0].macs > 0
    assert all(p.requires_grad for p in model.parameters())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks == 0


def test_parts_sum_up_to_the_whole():
    whole, *parts = layers(meta_model("resnet50_bat"))
    top = [part for part in parts if "." not in part.name]
    assert [part.name for part in top] == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert sum(part.params for part in top) == whole.params == 30_234_220
    assert sum(part.macs for part in top) == whole.macs
    block = next(part for part in parts if part.name == "layer2.nl1")
    assert (block.kind, block.shape, block.params) == ("BATBlock", (512, 28, 28), 343_156)


def test_a_mechanism_costs_what_its_equation_says():
    # FB: the K factors of every class, and its diagonal, times every position; once, the diagonal from the factors.
    head = {part.name: part for part in layers(meta_model("resnet34_fbn"))}["head.bilinear"]
    assert head.macs == 1000 * (50 + 1) * 512 * 7 * 7 + 1000 * 50 * 512
    noah = {part.name: part for part in layers(meta_model("resnet18_noah"))}["fc"]
    assert (
        noah.macs == 1000 * 512 * 7 * 7
    )  # query and value: half of the channels each, for all heads together


def test_the_document_is_up_to_date():
    document = (ROOT / "docs" / "models.md").read_text()
    assert document == markdown(ROWS), "run: python -m common.models --write docs/models.md"
    for link in re.findall(r"\]\(\.\./([^)]+)\)", document):
        assert (ROOT / link).is_file(), link
    assert "| 30,234,220 | 5.386 G | 30.2M, 5.4G | 78.30 |" in document


def test_description():
    text = describe("resnet50_bat", ROWS)
    for line in ("input       3×224×224", "parameters  30,234,220", "MACs        5.386 G"):
        assert line in text.splitlines()
    assert "published   top-1 78.3 % (" in text
    assert "image/recipes/resnet50_bat.yaml" in text
    assert re.search(r"^layer3\.nl5 +BATBlock +1024×14×14 +1,330,292 +0\.259 G$", text, re.M)
    both = describe("resnet50", ROWS)
    assert all(f"image/recipes/{name}.yaml" in both for name in ("resnet50", "resnet50_san_baseline"))


@pytest.mark.parametrize("name", ["convnext_atto", "cait_xxs24_224"])
def test_description_of_any_timm_model(name):
    assert "published" not in describe(name, ROWS)
    assert "10 classes" in describe(name, ROWS, num_classes=10)


def test_activations_are_what_autograd_keeps():
    """Of a real network on real memory: its saved tensors, without the weights."""
    model = timm.create_model("resnet18_bat", layers=[1] * 4, channels=[8] * 4, num_classes=5)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(torch.randn(2, 3, 224, 224))
    real = sum(storage.nbytes() for place, storage in kept.items() if place not in own) / 2
    meta = meta_model("resnet18_bat", layers=[1] * 4, channels=[8] * 4, num_classes=5)
    assert activation_bytes(meta) == pytest.approx(real, rel=0.02)
    assert not meta.training


@pytest.mark.parametrize("name", ["c2d_resnet50_bat3d", "i3d_resnet50"])
def test_description_of_video_models(name):
    lines = describe(name, ROWS).splitlines()
    assert "input       3×8×224×224" in lines
    assert re.search(r"^activations \d+\.\d MiB ", "\n".join(lines), re.M)


def test_description_of_no_model():
    with pytest.raises(ConfigError, match="'resnet50_bt': no such model; did you mean 'resnet50_bat'"):
        describe("resnet50_bt", ROWS)


def test_overview_has_every_row():
    lines = overview(ROWS).splitlines()
    assert len(lines) == len(ROWS) + 1
    line = next(line for line in lines if line.startswith("san10_pairwise "))
    assert line.split()[1:] == [
        "1000",
        "10,531,848",
        "2.044",
        "G",
        "74.90",
        "image/recipes/san10_pairwise.yaml",
    ]


def test_accuracies_are_those_of_the_papers():
    top = {Path(row.recipe).stem: (row.expect.top1, row.expect.top5) for row in ROWS if row.recipe}
    assert top["resnet152_bat"] == (79.4, None)
    assert top["san19_patchwise"] == (78.2, 93.9)
    assert top["deit_base_patch16_224_noah"] == (82.22, None)
    assert top["resnet50_fbn"] == (76.0, 92.9)
    assert top["resnet1001_fbn_cifar100"] == (80.33, None)
    assert (top["resnet50"][0], top["resnet50_san_baseline"][0]) == (76.23, 76.9)
