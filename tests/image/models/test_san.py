"""SAN networks: published numbers, timm's API, input sizes, compilation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import image.models.san  # noqa: F401  registers the models
from common.attention.san import SelfAttention
from tests.parity.golden import check_eval, check_params, check_train

NETWORKS = [f"san{depth}_{kind}" for depth in (10, 15, 19) for kind in ("pairwise", "patchwise")]
SMALL = ["san10_pairwise", "san10_patchwise"]
DTYPES = [torch.float64, torch.float32]
GOLDEN = ["san10_pairwise", "san10_patchwise", pytest.param("san19_pairwise", marks=pytest.mark.slow)]


def small(name: str, **kwargs: object) -> nn.Module:
    """A small network with random norm biases: at 0 the positions' difference of 0 sits on ReLU's kink."""
    torch.manual_seed(0)
    sizes = {"num_classes": 10, "layers": (1, 1, 1), "widths": (32, 64, 128), "kernels": (3, 5, 5)}
    model = timm.create_model(name, **{**sizes, **kwargs})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0.0, 0.2)
    return model


def tolerance(name: str) -> float:
    return 1e-4 if name.endswith("patchwise") else 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GOLDEN)
def test_published_outputs(name: str, dtype: torch.dtype) -> None:
    check_eval(name, dtype, tol32=tolerance(name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GOLDEN)
def test_published_training_step(name: str, dtype: torch.dtype) -> None:
    check_train(name, dtype)


@pytest.mark.parametrize("check", [check_eval, pytest.param(check_train, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SMALL)
def test_published_numbers_by_the_definition(
    name: str, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SelfAttention, "forward", SelfAttention.reference)
    check(name, torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_published_parameter_count(name: str) -> None:
    with torch.device("meta"):
        check_params(name)


@pytest.mark.parametrize("name, count", [("resnet26_1241", 13_696_552), ("resnet38_2352", 19_626_792)])
def test_baselines(name: str, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        assert sum(p.numel() for p in model.parameters()) == count
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    assert model.pretrained_cfg["architecture"] == name
    small = timm.create_model(name, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    assert small.layer1[0].bn3.weight.min() == 1  # as published: no block starts as the identity


@pytest.mark.parametrize("name", NETWORKS)
def test_registry(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7, in_chans=1)
    assert model.pretrained_cfg["architecture"] == name
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert model(torch.zeros(2, 1, 64, 64, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", SMALL)
def test_head(name: str) -> None:
    model = small(name).eval()
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape == (2, 128, 4, 4)
    assert model.num_features == model.head_hidden_size == 128
    torch.testing.assert_close(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    assert model.get_classifier().out_features == 10
    model.reset_classifier(4)
    assert model(x).shape == (2, 4)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    assert small(name, num_classes=0).eval()(x).shape == (2, 128)


def test_features_only() -> None:
    model, x = small("san10_pairwise").eval(), torch.randn(1, 3, 48, 32)
    extractor = small("san10_pairwise", features_only=True).eval()
    extractor.load_state_dict(model.state_dict(), strict=False)
    features = extractor(x)
    assert [f.shape[1:] for f in features] == [(32, 24, 16), (64, 12, 8), (128, 6, 4)]
    assert extractor.feature_info.reduction() == [2, 4, 8]
    torch.testing.assert_close(features[-1], model.forward_features(x))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(64, 64), (96, 96), (112, 112), (37, 70)])
def test_input_sizes(name: str, size: tuple[int, int]) -> None:
    """Five stages: at 64² a footprint of 7² looks at a map of 2²."""
    model = small(name, layers=(1,) * 5, widths=(32,) * 5, kernels=(3, 7, 7, 7, 7)).eval()
    logits = model(torch.randn(1, 3, *size))
    assert logits.shape == (1, 10)
    assert logits.isfinite().all()


def test_too_small_image_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"images have shape \(1, 3, 7, 64\), expected sides of at least 8 pixels"
    ):
        small("san10_pairwise")(torch.zeros(1, 3, 7, 64))


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"widths": (32, 64, 100)}, r"widths is \(32, 64, 100\), expected multiples of 32"),
        ({"kernels": (3, 5)}, r"kernels is \(3, 5\), expected one entry a stage"),
        ({"layers": (1, 0, 1)}, r"layers is \(1, 0, 1\), expected at least 1"),
        ({"layers": ()}, r"layers is \(\), expected"),
        ({"kernels": (3, 4, 5)}, "kernel_size is 4"),
        ({"attention": "both"}, "attention is 'both', expected one of"),
    ],
)
def test_wrong_sizes_are_named(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("san10_pairwise", **sizes)


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_changes_nothing(name: str) -> None:
    """Running statistics included: the second forward pass must not count the batch again."""
    model = small(name).double().train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for network in (model, other):
        network(x).square().sum().backward()
    for (key, parameter), expected in zip(other.named_parameters(), model.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=key)
    for (key, buffer), expected in zip(other.named_buffers(), model.buffers()):
        torch.testing.assert_close(buffer, expected, msg=key)


def test_parameter_groups_follow_depth() -> None:
    model = small("san10_pairwise")
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    order = [
        "conv_in.weight",
        "conv0.weight",
        "layer0.0.conv.weight",
        "conv1.weight",
        "layer2.0.conv.weight",
        "fc.weight",
    ]
    depths = [groups[key] for key in order]
    assert depths == sorted(set(depths))
    assert groups["bn1.weight"] == groups["layer1.0.conv.weight"]
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert [coarse[key] for key in order] == [0, 1, 1, 2, 3, 4]


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_and_autocast(name: str) -> None:
    model, x = small(name).eval(), torch.randn(2, 3, 32, 48)
    expected = model(x)
    last = torch.channels_last
    model, x = model.to(memory_format=last), x.to(memory_format=last)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.train()(x)
        logits.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        logits = model.eval()(x)
    assert logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", SMALL)
def test_export_with_any_batch_size(name: str) -> None:
    model = small(name).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 3):
        x = torch.randn(size, 3, 32, 32)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def check_compiled(name: str, backend: str, training: bool, batches: tuple[int, ...]) -> None:
    model = small(name, layers=(1,), widths=(64,), kernels=(5,)).train(training).requires_grad_(training)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    for batch in batches:
        x = torch.randn(batch, 3, 32, 32)
        logits, expected = compiled(x), model(x)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
        if training:
            for output in (logits, expected):
                output.square().sum().backward()
    for (key, parameter), expected in zip(model.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-2, atol=1e-3, msg=key)
    for (key, buffer), expected in zip(model.named_buffers(), compiled.buffers()):
        torch.testing.assert_close(buffer, expected, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", SMALL)
def test_one_graph(name: str, training: bool) -> None:
    check_compiled(name, "aot_eager", training, batches=(2, 3) if training else (1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", SMALL)
def test_compiled(name: str, training: bool) -> None:
    check_compiled(name, "inductor", training, batches=(2,))
