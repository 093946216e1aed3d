"""The video networks: published counts, layouts and numbers, and timm's API."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

import video.models  # noqa: F401
from common.frames import FrameConv3d
from common.weights import load_published
from tests.parity.fill import fill_state_dict
from tests.parity.golden import check_eval, check_params, check_train, manifest
from video import bench

SMALL = {"num_classes": 10, "layers": (1, 2, 2, 1), "channels": (8, 16, 16, 32), "nonlocal_mod": 2}
NAMES = [
    *(f"c2d_resnet{depth}" for depth in (18, 34, 50, 101)),
    *(f"i3d_resnet{depth}" for depth in (18, 50, 101)),
    *(f"{net}_resnet{d}_{b}" for net in ("c2d", "i3d") for d in (50, 101) for b in ("nl", "bat2d", "bat3d")),
]
PUBLISHED = [
    "c2d_resnet50",
    "c2d_resnet50_bat2d",
    "c2d_resnet50_bat3d",
    "c2d_resnet50_nl",
    "i3d_resnet50",
    "i3d_resnet50_bat2d",
    "i3d_resnet50_nl",
]
GOLDEN = ["c2d_resnet50", "c2d_resnet50_bat3d", "c2d_resnet50_nl", "i3d_resnet50"]
KINDS = ["c2d_resnet50", "c2d_resnet50_bat3d", "c2d_resnet50_nl", "i3d_resnet50_bat2d"]
slow = pytest.mark.slow


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Non-local float32 statistics of one clip depend on the order of sums: the published are 2.3e-5 from double."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def on_meta(name: str, **kwargs: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def small(name: str = "c2d_resnet50_bat3d", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    extra = {"bat_size": 4} if "bat" in name else {}
    model = timm.create_model(name, **SMALL | extra | kwargs)
    for module in model.modules():  # non-local blocks start as the identity
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def close(ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4, check_stride=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters(name: str) -> None:
    with torch.device("meta"):
        check_params(name)
    shapes = {key: list(value.shape) for key, value in on_meta(name).state_dict().items()}
    assert shapes == manifest(name)["state_dict"]


def test_published_checkpoint_loads() -> None:
    model = timm.create_model("i3d_resnet50_bat2d")
    state = fill_state_dict(manifest("i3d_resnet50_bat2d")["state_dict"])
    assert not load_published(model, {"state_dict": {f"module.{key}": v for key, v in state.items()}})


@pytest.mark.parametrize("name", NAMES)
def test_names_and_settings(name: str) -> None:
    model = on_meta(name)
    assert model.pretrained_cfg["architecture"] == name
    assert model.default_cfg["num_classes"] == 400
    assert model.drop_rate == 0.5
    blocks = [n.removeprefix("layer") for n, _ in model.named_modules() if n.count(".") == 1 and ".nl" in n]
    third = 23 if "101" in name else 6
    expected = ["2.nl1", "2.nl3", *(f"3.nl{i}" for i in range(1, third, 2))]
    assert blocks == (expected if name.count("_") == 2 else [])
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout3d)} == (
        {0.2} if "bat" in name else set()
    )
    assert ("layer2.nl1.batransform.conv_t.weight" in model.state_dict()) == name.endswith("bat3d")


@pytest.mark.parametrize(
    "name, stem, patterns",
    [
        ("c2d_resnet101", 1, ("000", "0000", "0" * 23, "000")),
        ("i3d_resnet50", 5, ("111", "1010", "101010", "010")),
        ("i3d_resnet101", 5, ("111", "1010", "10" * 11 + "1", "010")),
        ("i3d_resnet18", 5, ("11", "11", "11", "11")),
    ],
)
def test_kernels_along_time(name: str, stem: int, patterns: tuple[str, ...]) -> None:
    model = on_meta(name)
    space = 3 if name.endswith("18") else 1
    assert model.conv1.weight.shape == (64, 3, stem, 7, 7)
    for number, pattern in enumerate(patterns, 1):
        layer = model.get_submodule(f"layer{number}")
        kernels = [block.conv1.kernel_size for block in layer]
        assert kernels == [(3 if long == "1" else 1, space, space) for long in pattern]
        assert {block.conv2.kernel_size for block in layer} == {(1, 3, 3)}


@pytest.mark.parametrize(
    "name, dtype",
    [
        *((name, torch.float32) for name in GOLDEN),
        *(pytest.param(name, torch.float64, marks=slow) for name in GOLDEN),
    ],
)
def test_published_outputs_at_224_and_256(name: str, dtype: torch.dtype) -> None:
    check_eval(name, dtype)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "name, dtype",
    [
        *((name, torch.float32) for name in GOLDEN),
        *(pytest.param(name, torch.float64, marks=slow) for name in GOLDEN),
    ],
)
def test_published_training_step(name: str, dtype: torch.dtype) -> None:
    options = {"bat_dropout": 0.0} if "bat" in name else {"tol32": 2e-2} if "nl" in name else {}
    check_train(name, dtype, drop_rate=0.0, **options)


def in_3d(model: nn.Module, x: Tensor) -> Tensor:
    """The network with every layer torch's own 3-D one and the head written out, in the published order."""

    def run(module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, FrameConv3d):
            return nn.functional.conv3d(x, module.weight, module.bias, module.stride, module.padding)
        if isinstance(module, nn.BatchNorm2d):
            return nn.functional.batch_norm(
                x, module.running_mean, module.running_var, module.weight, module.bias
            )
        for child in module:
            x = residual(child, x) if hasattr(child, "branch") else run(child, x)
        return x

    def residual(block: nn.Module, x: Tensor) -> Tensor:
        y = run(block.bn1, run(block.conv1, x)).relu()
        y = run(block.bn2, run(block.conv2, y))
        y = run(block.bn3, run(block.conv3, y.relu())) if hasattr(block, "conv3") else y
        return (y + (x if block.downsample is None else run(block.downsample, x))).relu()

    pool = nn.functional.max_pool3d
    x = pool(run(model.bn1, run(model.conv1, x)).relu(), (1, 3, 3), (1, 2, 2))
    x = pool(run(model.layer1, x), (2, 1, 1), (2, 1, 1))
    for layer in (model.layer2, model.layer3, model.layer4):
        x = run(layer, x)
    window = (x.shape[2], min(7, x.shape[3]), min(7, x.shape[4]))
    return run(model.fc, nn.functional.avg_pool3d(x, window, 1)).mean((2, 3, 4))


@pytest.mark.parametrize("name", ["c2d_resnet18", "c2d_resnet50", "i3d_resnet18", "i3d_resnet50"])
@pytest.mark.parametrize("size", [(4, 64, 96), (5, 288, 256)])
def test_equals_the_network_in_3d(name: str, size: tuple[int, ...]) -> None:
    model, x = small(name).double(), torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), in_3d(model, x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "size",
    [
        (4, 224, 224),
        (12, 160, 128),
        (16, 96, 96),
        (32, 64, 64),
        (8, 288, 288),
        (8, 320, 256),
        (1, 112, 112),
        (3, 17, 33),
    ],
)
def test_any_length_size_and_aspect(name: str, size: tuple[int, ...]) -> None:
    model = small(name, **({"bat_size": 7} if "bat" in name else {}))
    with torch.no_grad():
        out = model(torch.randn(1, 3, *size))
        one = model.train()(torch.randn(1, 3, *size)) if min(size[1:]) > 32 else out
    assert out.shape == one.shape == (1, 10)
    assert out.isfinite().all()
    assert one.isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_formats_and_precisions(name: str) -> None:
    model, x = small(name), torch.randn(2, 3, 4, 64, 64)
    with torch.no_grad():
        exact = model(x)
        close(model(x[:1]), exact[:1])
        last = x.contiguous(memory_format=torch.channels_last_3d)
        close(model(last), exact)
        close(model.to(memory_format=torch.channels_last_3d)(last), exact)
        assert model.forward_features(last).is_contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x).float() - exact).norm() < 0.03 * exact.norm()
        model.train()(x).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "c2d_resnet50_bat3d",
        pytest.param("c2d_resnet50_nl", marks=slow),
        pytest.param("i3d_resnet18", marks=slow),
    ],
)
def test_one_graph_and_export_with_any_batch(name: str) -> None:
    model, x = small(name), torch.randn(2, 3, 4, 64, 64)
    with torch.no_grad():
        close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        close(exported(x[:1]), model(x[:1]))


def test_options_reach_the_blocks() -> None:
    options = {"bat_size": 2, "bat_groups": 2, "bat_reduction": 4, "bat_dropout": 0.3, "bat_time_groups": 2}
    model = small(**options, bat_time_size=3, in_chans=1, nonlocal_mod=(1, 2), drop_rate=0.1)
    block = model.layer2.nl0
    assert block.batransform.conv_p.weight.shape == (2 * 2 * 2, 2, 1, 2, 1)
    assert block.batransform.conv_t.weight.shape == (3 * 3 * 2, 2, 3, 1, 1)
    assert block.conv1[0].weight.shape == (16, 64, 1, 1, 1)
    assert block.dropout.p == 0.3
    assert [n for n, _ in model.layer3.named_children()] == ["0", "1", "nl1"]
    assert model(torch.randn(1, 1, 6, 32, 32)).shape == (1, 10)
    block = small("c2d_resnet50_nl", nl_heads=2, nl_per_frame=True, nl_sub_sample=False).layer2.nl1
    assert (block.heads, block.per_frame, block.phi.weight.ndim) == (2, True, 5)


def test_dropout_can_be_switched_off() -> None:
    x = torch.randn(4, 3, 4, 64, 64)
    for options, same in (
        ({}, False),
        ({"drop_rate": 0.0}, False),
        ({"drop_rate": 0.0, "bat_dropout": 0.0}, True),
    ):
        model = small(**options).train()
        assert torch.equal(model(x), model(x)) == same


def test_wrong_values_are_named() -> None:
    for wrong in ((1, 2, 3), 0, ()):
        with pytest.raises(ValueError, match="nonlocal_mod=.*two for layer2, layer3"):
            small(nonlocal_mod=wrong)
    with pytest.raises(ValueError, match="global_pool='max'"):
        small(global_pool="max")
    with pytest.raises(ValueError, match=r"shape \(1, 3, 64, 64\): clips must be \(N, 3, T, H, W\)"):
        small()(torch.randn(1, 3, 64, 64))


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = timm.create_model("i3d_resnet50_nl")
    for conv in (model.conv1, model.layer2[0].conv1, model.layer4[0].conv2, model.fc):
        time, height, _ = conv.kernel_size
        expected = (2 / (time * height * conv.out_channels)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.03)
    assert model.layer2.nl1.W[0].weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert model.layer3.nl1.theta.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.03)
    assert model.layer1[0].bn3.weight.min() == 1


def test_head_api() -> None:
    model, x = small(), torch.randn(2, 3, 4, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2, 2)
    assert torch.equal(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3, 4)))
    model.double().reset_classifier(3)
    assert model(x.double()).shape == (2, 3)
    assert model.get_classifier().out_channels == 3
    model.reset_classifier(0)
    torch.testing.assert_close(model(x.double()).float(), pooled, rtol=1e-4, atol=1e-5)
    assert small(num_classes=0)(x).shape == (2, model.head_hidden_size)
    assert small(global_pool="")(x).shape == (2, 10, 2, 2, 2)


def test_gradient_checkpointing_gives_the_same_gradients_and_statistics() -> None:
    x = torch.randn(2, 3, 4, 64, 64)
    plain, saving = small().train(), small().train()
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        torch.manual_seed(1)
        model(x).square().sum().backward()
    for ours, wanted in zip(saving.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, wanted.grad)
    for ours, wanted in zip(saving.buffers(), plain.buffers()):
        torch.testing.assert_close(ours, wanted)


def test_parameter_groups_know_the_blocks() -> None:
    model = small()
    for coarse, groups in ((False, 8), (True, 6)):
        members = group_parameters(model, model.group_matcher(coarse=coarse))
        assert len(members) == groups
        group_of = {name: group for group, names in members.items() for name in names}
        assert group_of["layer3.nl1.conv1.0.weight"] == group_of["layer3.1.conv1.weight"]


def test_features_only() -> None:
    features, whole = small(features_only=True), small()
    whole.load_state_dict(features.state_dict(), strict=False)
    x = torch.randn(1, 3, 4, 64, 64)
    maps = features(x)
    assert [m.shape[1] for m in maps] == features.feature_info.channels() == [8, 32, 64, 64, 128]
    torch.testing.assert_close(maps[-1], whole.forward_features(x))


def test_benchmark_prints_json() -> None:
    command = [sys.executable, "-m", "video.bench", "--cpu", "c2d_resnet50_bat3d"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)["results"]["c2d_resnet50_bat3d"]
    assert result["clips_s"] == pytest.approx(2e3 / result["ms"])
    assert result["published"]["bf16"]["clips_s"] == 157.8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_benchmark_without_a_gpu_is_one_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit) as stop:
        bench.run_main(bench.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: no GPU found: the benchmark measures a GPU; --cpu runs a small version without one"
    ]
