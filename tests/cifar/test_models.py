"""Networks for 32² images: the published parameters, the definition's constants, timm's API, small versions."""

from __future__ import annotations

import json
from collections import Counter
from copy import deepcopy

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

import cifar.models  # noqa: F401
from cifar.models.inception_bn_small import BilinearHead
from common.models.preact import PreActUnit
from common.weights import WeightsError, load_published
from tests.parity.golden import HERE
from tests.parity.mxnet import mxnet_state

PUBLISHED = {
    k: v for k, v in json.loads((HERE / "fbn_params.json").read_text()).items() if k.startswith("cifar")
}
NAMES = sorted({key.split("_", 1)[1].replace("fmconv", "fbn") for key in PUBLISHED})
SMALL = {
    "resnet164": {"depth": 20},
    "resnet164_fbn": {"depth": 20, "factors": 3},
    "inception_bn_small": {},
    "inception_bn_small_fbn": {"factors": 3},
    "inception_bn_small_bilinear": {},
}


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL[name], **kwargs)


@pytest.mark.parametrize("published", PUBLISHED)
def test_published_parameters(published):
    data, name = published.replace("fmconv", "fbn").split("_", 1)
    model, right = on_meta(name, num_classes=int(data.removeprefix("cifar"))), PUBLISHED[published]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == right["params"]
    shapes = Counter(tuple(shape) for *_, shape in right["shapes"])
    assert Counter(tuple(p.shape) for p in model.parameters()) == shapes


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # counters, which MXNet lacks
@pytest.mark.parametrize("published", PUBLISHED)
def test_published_names(published):
    data, name = published.replace("fmconv", "fbn").split("_", 1)
    model = on_meta(name, num_classes=int(data.removeprefix("cifar")))
    state = mxnet_state(PUBLISHED[published]["shapes"], "meta")
    assert not load_published(model, state)
    last = next(key for key in state if key.endswith("_bias"))
    del state[last]
    with pytest.raises(WeightsError, match="1 missing: "):
        load_published(model, state)


def test_every_published_layer_has_its_place():
    shapes = PUBLISHED["cifar10_resnet164_fmconv"]["shapes"]
    model = timm.create_model("resnet164_fbn")
    load_published(model, mxnet_state(shapes))
    number = {f"{layer}_{kind}": i for i, (layer, kind, _) in enumerate(shapes)}
    for own, published in {
        "stem.bias": "convolution0_bias",
        "stages.0.0.convs.0.weight": "convolution1_weight",
        "stages.0.0.shortcut.weight": "convolution2_weight",
        "stages.0.0.convs.1.weight": "convolution3_weight",
        "stages.0.0.convs.2.weight": "convolution4_weight",
        "stages.0.1.norms.2.weight": "batchnorm5_gamma",
        "stages.0.1.norms.2.running_var": "batchnorm5_gamma",
        "stages.1.0.shortcut.bias": "convolution57_bias",
        "norm.0.running_mean": "batchnorm162_gamma",
        "head.fc.weight": "convolution166_weight",
        "head.bilinear.weight": "bilinear_weight",
    }.items():
        assert model.state_dict()[own].unique().tolist() == [number[published]], own
    assert model.stages[0][0].norms[0].num_batches_tracked == 0
    load_published(model, model.state_dict())  # our names are taken as they are


@pytest.mark.parametrize("name", NAMES)
def test_registered(name):
    model = on_meta(name)
    cfg = model.pretrained_cfg
    assert (cfg["architecture"], cfg["num_classes"], model.num_classes) == (name, 10, 10)
    assert (cfg["crop_pct"], cfg["input_size"]) == (1.0, (3, 32, 32))
    assert [255 * m for m in cfg["mean"]] == pytest.approx([123.68, 116.779, 103.939])
    assert [255 * s for s in cfg["std"]] == pytest.approx([1, 1, 1])
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}
    assert sum(isinstance(m, nn.Tanh) for m in model.modules()) == (
        0 if not name.endswith("_fbn") else 2 if "inception" in name else 1
    )


@pytest.mark.parametrize("name", ["resnet164", "resnet1001"])
def test_resnets(name):
    model = on_meta(name)
    units = [m for m in model.modules() if isinstance(m, PreActUnit)]
    assert 2 + sum(len(unit.convs) for unit in units) == int(name.removeprefix("resnet"))
    for i, stage in enumerate(model.stages):
        assert [unit.shortcut is not None for unit in stage] == [True] + [False] * (len(stage) - 1)
        assert [conv.stride for conv in stage[0].convs] == [(min(i, 1) + 1,) * 2, (1, 1), (1, 1)]
        assert stage[0].shortcut.stride == (min(i, 1) + 1,) * 2


@pytest.mark.parametrize("depth", [2, 18, 22])
def test_depth_that_does_not_fit(depth):
    with pytest.raises(ValueError, match=rf"depth={depth}: must be 9·n \+ 2"):
        timm.create_model("resnet164", depth=depth)


@pytest.mark.parametrize("name", SMALL)
def test_forward(name):
    model = small(name).eval()
    for size in ((32, 32), (40, 36)):
        x = torch.randn(1, 3, *size)
        with torch.inference_mode():
            features = model.forward_features(x)
            logits = model(x)
            torch.testing.assert_close(model.forward_head(features), logits)
            last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
            torch.testing.assert_close(last, logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())
            with torch.autocast("cpu", torch.bfloat16):
                assert (model(x) - logits).abs().max() < 0.1 * logits.abs().max()
        assert features.shape[2:] == (size[0] // 4, size[1] // 4)
        assert logits.shape == (1, 10)


@pytest.mark.parametrize("name", SMALL)
def test_resetting_the_classifier(name):
    model = small(name).eval()
    x = torch.randn(1, 3, 32, 32)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    model.reset_classifier(7)
    assert model(x).shape == (1, 7)
    assert all(p.shape[0] == 7 for p in model.get_classifier().parameters())
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features.mean((2, 3)))
    assert model.num_features == model.head_hidden_size == features.shape[1]


@pytest.mark.parametrize("name", SMALL)
def test_dropout_before_the_classifier(name):
    options = {"drop_factor": 0.0} if name.endswith("_fbn") else {}
    model = small(name, drop_rate=0.5, **options).eval()
    x = torch.randn(1, 3, 32, 32)
    features = model.forward_features(x)
    assert torch.equal(model(x), small(name, **options).eval()(x))
    model.train()
    assert not torch.equal(model.forward_head(features), model.forward_head(features))


@pytest.mark.parametrize("name", SMALL)
def test_features_only(name):
    features = small(name, features_only=True).eval()
    maps = features(torch.randn(1, 3, 32, 32))
    assert [m.shape[-1] for m in maps] == [32, 16, 8]
    assert [m.shape[1] for m in maps] == features.feature_info.channels()


@pytest.mark.parametrize("name", SMALL)
def test_layer_decay_finds_every_parameter(name):
    model = on_meta(name, **SMALL[name])
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scales) == len(list(model.parameters()))
    assert {scales[id(p)] for p in model.head.parameters()} == {1.0}


def test_bilinear_head_by_definition():
    head = BilinearHead(6, 4).double()
    x = torch.rand(2, 6, 3, 3, dtype=torch.float64)
    for features, logits in zip(x, head(x)):
        z = features.flatten(1) @ features.flatten(1).T
        root = z.sign() * (z + 1e-5).abs().sqrt()
        torch.testing.assert_close(logits, head.fc.weight @ (root / root.norm()).flatten() + head.fc.bias)


def test_bilinear_head_survives_dead_features():
    head = BilinearHead(6, 4)
    x = torch.zeros(2, 6, 3, 3, requires_grad=True)
    head(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpointing_changes_nothing_but_memory(compiled):
    plain = small("resnet164_fbn", drop_factor=0.0).train()
    saving = deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(2, 3, 32, 32)
    kept = []
    for model in (plain, saving):
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        sizes: list[int] = []
        with saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            F.cross_entropy(run(x), torch.tensor([1, 2])).backward()
        kept.append(sum(sizes))
    for a, b in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    for (key, a), b in zip(plain.named_buffers(), saving.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=key)
    if not compiled:
        assert kept[1] < kept[0] / 3


def test_checkpointing_leaves_frozen_norms_alone():
    model = small("resnet164").train()
    model.set_grad_checkpointing()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    before = deepcopy(dict(model.named_buffers()))
    x = torch.randn(2, 3, 32, 32)
    model(x).sum().backward()
    grad = model.stem.weight.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing(False)
    model(x).sum().backward()
    torch.testing.assert_close(grad, model.stem.weight.grad)
    assert all(torch.equal(before[key], value) for key, value in model.named_buffers())


@pytest.mark.parametrize("name", ["resnet164_fbn", "inception_bn_small_bilinear"])
def test_compile_and_export(name):
    model = small(name).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), logits)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=16)},))
        torch.testing.assert_close(program.module()(x[:1].repeat(3, 1, 1, 1)), logits[:1].expand(3, -1))


@pytest.mark.slow
def test_resnet1001_trains_two_steps_with_checkpointing():
    torch.manual_seed(0)
    model = timm.create_model("resnet1001_fbn").train()
    model.set_grad_checkpointing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, targets = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    before = deepcopy(model.stem.weight.detach())
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), targets)
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert not torch.equal(model.stem.weight, before)
