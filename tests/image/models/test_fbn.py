"""FBN networks for ImageNet: the published parameters, the units written out, timm's API."""

from __future__ import annotations

import json
from collections import Counter
from copy import deepcopy

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn import functional as F

import image.models.inception_bn  # noqa: F401
from common.models.convnet import Branches
from common.models.preact import PreActUnit
from common.weights import load_published
from image.models.preact_resnet import EPS, UNITS, InputNorm
from tests.parity.golden import HERE
from tests.parity.mxnet import mxnet_state

PUBLISHED = json.loads((HERE / "fbn_params.json").read_text())
RESNETS = [f"resnet{depth}_{kind}" for depth in UNITS for kind in ("preact", "fbn")]
NAMES = [*RESNETS, "inception_bn", "inception_bn_fbn"]


def ours(published: str) -> tuple[str, dict]:
    """``imagenet_resnet18_fmconv_k20`` → ``resnet18_fbn``, ``{"factors": 20}``."""
    name, _, factors = published.removeprefix("imagenet_").replace("_fmconv", "_fbn").partition("_k")
    return name, {"factors": int(factors)} if factors else {}


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def small(name="resnet18_fbn", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(
        name, num_classes=5, **({"factors": 3} if name.endswith("_fbn") else {}), **kwargs
    )


@pytest.mark.parametrize("published", [key for key in PUBLISHED if key.startswith("imagenet_")])
def test_published_parameters(published):
    name, kwargs = ours(published)
    model, right = on_meta(name, **kwargs), PUBLISHED[published]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == right["params"]
    shapes = Counter(tuple(shape) for *_, shape in right["shapes"])
    shapes -= Counter(tuple(shape) for *_, shape in right["fixed_gamma"])
    assert Counter(tuple(p.shape) for p in model.parameters()) == shapes


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # counters, which MXNet lacks
@pytest.mark.parametrize("published", [key for key in PUBLISHED if key.startswith("imagenet_")])
def test_published_names(published):
    name, kwargs = ours(published)
    state = mxnet_state(PUBLISHED[published]["shapes"], "meta")
    assert not load_published(on_meta(name, **kwargs), state)


@pytest.mark.parametrize(
    ("published", "places"),
    [
        (
            "imagenet_resnet18_fmconv_k20",
            {
                "stem.input_norm.bias": "bn_data_beta",
                "stem.input_norm.norm.running_var": "bn_data_gamma",
                "stages.1.0.norms.1.bias": "stage2_unit1_bn2_beta",
                "stages.1.0.convs.0.weight": "stage2_unit1_conv1_weight",
                "stages.0.0.shortcut.weight": "stage1_unit1_sc_weight",
                "norm.0.weight": "bn1_gamma",
                "head.bilinear.bias": "bilinear1_bias",
            },
        ),
        (
            "imagenet_inception_bn",
            {
                "stem.reduce2.conv.weight": "conv_2_red_weight",
                "stages.1.0.double3.2.conv.bias": "conv_3c_double_3x3_1_bias",
                "stages.2.0.conv3.0.norm.running_mean": "bn_4e_3x3_reduce_gamma",
                "stages.2.2.project.1.conv.weight": "conv_5b_proj_weight",
                "head.fc.weight": "fc1_weight",
            },
        ),
    ],
)
def test_every_published_layer_has_its_place(published, places):
    name, kwargs = ours(published)
    model = timm.create_model(name, **kwargs)
    shapes = PUBLISHED[published]["shapes"]
    load_published(model, mxnet_state(shapes))
    number = {f"{layer}_{kind}": i for i, (layer, kind, _) in enumerate(shapes)}
    state = model.state_dict()
    assert {own: state[own].unique().tolist() for own in places} == {
        own: [number[layer]] for own, layer in places.items()
    }
    load_published(model, state)  # our names are taken as they are


@pytest.mark.parametrize("name", NAMES)
def test_registered(name):
    model = on_meta(name, pretrained_cfg_overlay={"crop_pct": 0.9})
    cfg = model.pretrained_cfg
    assert cfg["architecture"] == name
    assert (cfg["crop_pct"], cfg["input_size"]) == (0.9, (3, 224, 224))
    assert [255 * m for m in cfg["mean"]] == pytest.approx([123.68, 116.779, 103.939])
    assert [255 * s for s in cfg["std"]] == pytest.approx([1, 1, 1])
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    classifier = cfg["classifier"]
    for part in classifier if isinstance(classifier, tuple) else (classifier,):
        assert model.get_submodule(part).weight.shape[0] == 1000


@pytest.mark.parametrize("name", RESNETS)
def test_resnets(name):
    """Depth, the last activation, and the batch norms' constants."""
    model = on_meta(name)
    depth = int(name.removeprefix("resnet").partition("_")[0])
    units = [m for m in model.modules() if isinstance(m, PreActUnit)]
    assert 2 + sum(len(unit.convs) for unit in units) == depth
    assert isinstance(model.norm[-1], nn.Tanh if name.endswith("_fbn") else nn.ReLU)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(2e-5, 0.1)}


def test_default_factors():
    assert on_meta("resnet50_fbn").head.bilinear.factors == 50
    assert on_meta("inception_bn_fbn").head.bilinear.factors == 20


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_unit_by_definition(bottleneck, stride):
    """The first unit of a stage: projection of the first activation, the stride on the first 3×3."""
    unit = PreActUnit(8, 16, stride, True, bottleneck, strided=int(bottleneck), bias=False, eps=EPS)
    unit = unit.double().eval()
    for norm in unit.norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)

    def act(i, y):
        n = unit.norms[i]
        return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, eps=2e-5).relu()

    weights = [conv.weight for conv in unit.convs]
    first = act(0, x)
    if bottleneck:
        y = F.conv2d(act(1, F.conv2d(first, weights[0])), weights[1], stride=stride, padding=1)
        y = F.conv2d(act(2, y), weights[2])
    else:
        y = F.conv2d(first, weights[0], stride=stride, padding=1)
        y = F.conv2d(act(1, y), weights[1], padding=1)
    expected = y + F.conv2d(first, unit.shortcut.weight, stride=stride)
    torch.testing.assert_close(unit(x), expected, rtol=0, atol=1e-12)


def test_later_unit_adds_its_input():
    unit = PreActUnit(16, 16, 1, False, True, strided=1, bias=False, eps=EPS).eval()
    nn.init.zeros_(unit.convs[-1].weight)
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(unit(x), x)


def test_every_stage_begins_with_a_projection():
    for name in ("resnet18_preact", "resnet50_preact"):
        for stage in on_meta(name).stages:
            assert [unit.shortcut is not None for unit in stage] == [True] + [False] * (len(stage) - 1)


def test_input_norm_learns_no_gain():
    norm = InputNorm(3)
    nn.init.normal_(norm.bias)
    x = 40 * torch.randn(4, 3, 8, 8) + 7
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    expected = (x - mean) / (variance + 2e-5).sqrt() + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-4)
    assert [tuple(p.shape) for p in norm.parameters()] == [(3,)]


def test_inception_blocks():
    """Average pools count the padding, the last block pools by maximum, tanh ends only its branches."""
    blocks = [block for stage in on_meta("inception_bn_fbn").stages for block in stage]
    assert len(blocks) == 10
    assert all(isinstance(block, Branches) for block in blocks)
    pools = [block["project"][0] for block in blocks if "project" in block]
    assert [type(pool) for pool in pools] == [nn.AvgPool2d] * 7 + [nn.MaxPool2d]
    assert all(pool.count_include_pad for pool in pools[:-1])
    last = blocks[-1]
    ends = [last["single"], last["conv3"][-1], last["double3"][-1], last["project"][-1]]
    assert all(isinstance(end.act, nn.Tanh) for end in ends)
    model = on_meta("inception_bn_fbn")
    assert sum(isinstance(m, nn.Tanh) for m in model.modules()) == 4
    assert not any(isinstance(m, nn.Tanh) for m in on_meta("inception_bn").modules())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}


@pytest.mark.parametrize("name", ["resnet18_fbn", "resnet50_preact", "inception_bn", "inception_bn_fbn"])
def test_feature_sizes(name):
    """At 224², as published; stem pools of Inception-BN are unpadded and floor."""
    model = on_meta(name, features_only=True)
    maps = model(torch.empty(1, 3, 224, 224, device="meta"))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    sizes = [112, 56, 28, 14, 7] if "resnet" in name else [112, 55, 27, 14, 7]
    assert [m.shape[-1] for m in maps] == sizes


def test_last_feature_is_what_the_head_sees():
    model, features = small().eval(), small(features_only=True).eval()
    features.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(features(x)[-1], model.forward_features(x))


@pytest.mark.parametrize("size", [(64, 64), (224, 192)])
@pytest.mark.parametrize("name", ["resnet18_fbn", "resnet18_preact", "inception_bn_fbn"])
def test_forward(name, size):
    model = small(name).eval()
    with torch.inference_mode():
        x = torch.randn(1, 3, *size)
        features = model.forward_features(x)
        logits = model(x)
        torch.testing.assert_close(model.forward_head(features), logits)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, features.mean((2, 3)))
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(x) - logits).abs().max() < 0.1 * logits.abs().max()
    assert logits.shape == (1, 5)
    if name.endswith("_fbn"):
        assert features.abs().max() <= 1


@pytest.mark.parametrize("name", ["resnet18_fbn", "resnet18_preact", "inception_bn_fbn"])
def test_resetting_the_classifier(name):
    model = small(name).eval()
    x = torch.randn(1, 3, 64, 64)
    features = model.forward_features(x)
    model.reset_classifier(7)
    assert model(x).shape == (1, 7)
    assert all(p.shape[0] == 7 for p in model.get_classifier().parameters())
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features.mean((2, 3)))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (1, 3)
    assert not model.head.training
    assert on_meta(name, num_classes=0).num_features == model.head_hidden_size == features.shape[1]


def test_four_channels_in():
    assert small(in_chans=4).eval()(torch.randn(1, 4, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize("name", ["resnet50_fbn", "resnet50_preact", "inception_bn_fbn"])
def test_layer_decay_finds_every_parameter(name):
    model = on_meta(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scales) == len(list(model.parameters()))
    assert {scales[id(p)] for p in model.head.parameters()} == {1.0}
    assert max(scales[id(p)] for p in model.stem.parameters()) == min(scales.values())


@pytest.mark.parametrize("name", ["resnet18_fbn", "inception_bn_fbn"])
def test_checkpointing_changes_nothing(name):
    plain = small(name, drop_factor=0.0).train()
    saving = deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64)
    for model in (plain, saving):
        model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    for (key, a), b in zip(plain.named_buffers(), saving.buffers()):
        assert torch.equal(a, b), key


def test_compile_and_export():
    model = small().eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), logits)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=16)},))
        torch.testing.assert_close(program.module()(x[:1].repeat(3, 1, 1, 1)), logits[:1].expand(3, -1))
