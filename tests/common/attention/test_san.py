"""The fused path of the self-attention modules against their definition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.attention import san, tiles
from common.attention.san import PairwiseAttention, PatchwiseAttention, SelfAttention

KINDS = [PairwiseAttention, PatchwiseAttention]
WINDOWS = [
    {"kernel_size": 3},
    {"kernel_size": 7},
    {"kernel_size": 5, "stride": 2},
    {"kernel_size": 3, "dilation": 2, "stride": 3},
]


def made(kind: type[SelfAttention], dtype: torch.dtype = torch.float64, **window: int) -> SelfAttention:
    """A module with every parameter and running statistic random, so that none hides behind a 0 or 1."""
    torch.manual_seed(0)
    module = kind(12, 4, 16, share=4, **window)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            nn.init.normal_(tensor, 0.1, 0.3)
            if "running_var" in name:
                tensor.abs_().add_(0.5)
    return module.to(dtype)


def run(module: SelfAttention, path: str, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and every gradient and buffer after a step through ``path``."""
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    output = getattr(module, path)(x)
    torch.manual_seed(1)
    (output * torch.randn(output.shape, dtype=torch.float64).to(output.dtype)).sum().backward()
    named = {name: parameter.grad for name, parameter in module.named_parameters()}
    return output, {"x": x.grad, **named, **dict(module.named_buffers())}


@pytest.fixture(params=[None, 3000, 200], ids=["one tile", "groups of rows", "single rows"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setitem(san.TILE_VALUES, "cpu", request.param)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("tile")
def test_fused_is_the_definition(kind: type[SelfAttention], window: dict[str, int], training: bool) -> None:
    module = made(kind, **window).train(training)
    x = torch.randn(3, 12, 7, 9, dtype=torch.float64)
    output, after = run(module, "fused", x)
    expected, expected_after = run(module, "reference", x)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-11)
    assert after.keys() == expected_after.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, expected_after[name], rtol=1e-9, atol=1e-10, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(module.fused(x), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_footprint_larger_than_the_map(kind: type[SelfAttention], side: int) -> None:
    module = made(kind, kernel_size=7)
    x = torch.randn(3, 12, side, 5, dtype=torch.float64)
    torch.testing.assert_close(run(module, "fused", x)[0], run(module, "reference", x)[0])
    module.eval()
    assert module(x[:1]).shape == (1, 16, side, 5)
    assert module(x[:0]).shape == (0, 16, side, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_many_channels_and_short_rows(kind: type[SelfAttention]) -> None:
    """As in a network's last stage: other convolutions, and channels side by side in memory."""
    torch.manual_seed(0)
    module, x = kind(96, 64, 128, share=2, kernel_size=3), torch.randn(3, 96, 4, 5)
    output, after = run(module, "fused", x)
    expected, expected_after = run(module.double(), "reference", x.double())
    for name, tensor in {"output": output, **after}.items():
        exact = {"output": expected, **expected_after}[name].double()
        error = (tensor.double() - exact).norm()
        # A bias before a softmax or a norm has a gradient of nothing but rounding.
        assert error <= 1e-5 * exact.norm() + 1e-4, f"{name}: {error:.2g} of {exact.norm():.2g}"


@pytest.mark.parametrize("channels", [(96, 64), (64, 80), (8, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conv1x1(channels: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(2, channels[0], 3, 4, 5, dtype=dtype)
    weight, bias = (
        torch.randn(channels[1], channels[0], 1, 1, dtype=dtype),
        torch.randn(channels[1], dtype=dtype),
    )
    expected = torch.einsum("oc,nckhw->nokhw", weight.flatten(1).double(), x.double())
    expected = expected + bias.double().view(-1, 1, 1, 1)
    torch.testing.assert_close(tiles.conv1x1(x, weight, bias).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("total, most, expected", [(4, 3, 2), (56, 24, 19), (7, 0, 1), (5, 9, 5), (0, 3, 1)])
def test_equal_parts(total: int, most: int, expected: int) -> None:
    assert tiles.evenly(total, most) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_float32_training(kind: type[SelfAttention]) -> None:
    """Small differences of large features: where sums of squares would lose all digits."""
    module = made(kind, torch.float32, kernel_size=5)
    nn.init.constant_(module.conv1.bias, 30.0)
    nn.init.constant_(module.conv2.bias, 30.0)
    x = 0.1 * torch.randn(2, 12, 16, 16)
    _, after = run(module, "fused", x)
    _, exact = run(module.double(), "reference", x.double())
    for name in ("x", "conv3.weight", "conv_w.2.weight", "conv_w.0.running_var", "conv_w.3.running_var"):
        error = (after[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < 2e-3 if name in ("x", "conv_w.2.weight") else error < 1e-5, f"{name}: {error:.2g}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change", [{"momentum": None}, {"momentum": 0.3}, {"track_running_stats": False}], ids=str
)
def test_running_statistics_follow_torch(kind: type[SelfAttention], change: dict[str, object]) -> None:
    module = made(kind, kernel_size=3)
    for norm in (module.conv_w[0], module.conv_w[3]):
        for name, value in change.items():
            setattr(norm, name, value)
    other = copy.deepcopy(module)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
        module.fused(x), other.reference(x)
    for (name, tensor), expected in zip(module.named_buffers(), other.buffers()):
        torch.testing.assert_close(tensor, expected, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_norms(kind: type[SelfAttention]) -> None:
    module = made(kind, kernel_size=3).train()
    module.conv_w[0].eval()
    x = torch.randn(2, 12, 5, 6, dtype=torch.float64)
    (output, after), (expected, expected_after) = run(module, "fused", x), run(module, "reference", x)
    torch.testing.assert_close(output, expected)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, expected_after[name], msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_other_norms_take_the_definition(kind: type[SelfAttention], monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.SyncBatchNorm.convert_sync_batchnorm(made(kind, kernel_size=3)).eval()
    monkeypatch.setattr(kind, "fused", None)
    assert module(torch.randn(1, 12, 4, 4, dtype=torch.float64)).shape == (1, 16, 4, 4)


class LargestTensor(TorchDispatchMode):
    """Remembers how many values the largest tensor has that any operation makes."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, Tensor):
                self.values = max(self.values, tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_expands_a_tile_at_a_time(
    kind: type[SelfAttention], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(san.TILE_VALUES, "cpu", 30_000)
    module = made(kind, kernel_size=7).eval()
    x = torch.randn(2, 12, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        with LargestTensor() as definition:
            module.reference(x)
        with LargestTensor() as fused:
            module(x)
    assert definition.values >= 2 * 16 * 49 * 32 * 32
    projections = 2 * (2 * module.conv1.out_channels + 16) * 32 * 32
    assert fused.values <= max(2 * 16 * 38 * 38, projections), "larger than the maps and than a tile"


@pytest.mark.parametrize("path", ["fused", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast(kind: type[SelfAttention], path: str) -> None:
    module = made(kind, torch.float32, kernel_size=3)
    x = torch.randn(2, 12, 64, 64)
    expected, expected_after = run(module, path, x)
    with torch.autocast("cpu", torch.bfloat16):
        output, after = run(module, path, x)
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).norm() < 0.02 * expected.norm()
    for name in ("conv_w.0.running_var", "conv_w.3.running_var"):
        torch.testing.assert_close(after[name], expected_after[name], rtol=0.02, atol=0.0)


def test_bfloat16_sums_are_exact() -> None:
    """49 products of 1 and 1/256: added up in bfloat16 they would stay at 1."""
    weight, value = torch.ones(1, 1, 49, 1, 1), torch.full((1, 1, 7, 7), 1 / 256)
    value[0, 0, 0, 0] = 1.0
    total = san.aggregated(weight.bfloat16(), value.bfloat16(), 7, 1, 1)
    assert total.item() == torch.tensor(1 + 48 / 256).bfloat16().item()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights(kind: type[SelfAttention]) -> None:
    module = made(kind, torch.float32, kernel_size=3).eval()
    x = torch.randn(2, 12, 8, 8)
    expected = module(x)
    output = module.bfloat16()(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last(kind: type[SelfAttention]) -> None:
    module = made(kind, kernel_size=5)
    x = torch.randn(2, 12, 6, 7, dtype=torch.float64)
    expected, expected_after = run(module, "forward", x)
    last = torch.channels_last
    output, after = run(module.to(memory_format=last), "forward", x.contiguous(memory_format=last))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(after["conv_w.2.weight"], expected_after["conv_w.2.weight"])


def test_pairwise_weights_sum_to_one() -> None:
    module = made(PairwiseAttention, kernel_size=3, stride=2)
    weight = module.attention(torch.randn(2, 12, 5, 6, dtype=torch.float64))
    assert weight.shape == (2, 4, 9, 9)
    torch.testing.assert_close(weight.sum(2), torch.ones_like(weight[:, :, 0]))


def test_position_map() -> None:
    position = san.position_map(torch.zeros(5, 7, 3, 5), torch.float64)
    assert position.shape == (1, 2, 3, 5)
    assert position.dtype == torch.float64
    assert position[0, 0].tolist() == [[-1, -0.5, 0, 0.5, 1]] * 3
    assert position[0, 1].T.tolist() == [[-1, 0, 1]] * 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"kernel_size": 4}, "kernel_size is 4, expected an odd number"),
        ({"stride": 0}, "stride is 0"),
        ({"dilation": 0}, "dilation 0"),
        ({"rel_channels": 0}, "rel_channels is 0"),
        ({"out_channels": 12}, "out_channels is 12, expected a multiple of share = 8"),
    ],
)
def test_wrong_sizes_are_named(kind: type[SelfAttention], sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**{"in_channels": 8, "rel_channels": 4, "out_channels": 16, **sizes})


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_operators_are_the_definition(
    kind: type[SelfAttention], window: dict[str, int], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path that a GPU takes, with the operators' reference in the kernels' place."""
    monkeypatch.setattr(san.pairwise, "runs", lambda *_: True)
    monkeypatch.setattr(tiles.san, "runs", lambda *_: True)
    monkeypatch.setattr(san.patchwise, "runs", lambda *_: True)
    called: list[str] = []
    for room, operator in ((san.pairwise, "pairwise_attention"), (tiles.san, "padded_aggregation")):
        original = getattr(room, operator)
        monkeypatch.setattr(room, operator, lambda *a, o=original: (called.append(o), o(*a))[1])
    module = made(kind, **window).train(training)
    x = torch.randn(3, 12, 7, 9, dtype=torch.float64)
    output, after = run(module, "forward", x)
    assert called
    expected, expected_after = run(module, "reference", x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(after, expected_after)


@pytest.mark.parametrize("kind", [PairwiseAttention, PatchwiseAttention])
def test_the_result_lies_in_memory_as_the_input_does(kind: type[SelfAttention]) -> None:
    module, x = kind(16, 4, 8, kernel_size=3), torch.randn(2, 16, 5, 6)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert module(x.contiguous(memory_format=layout)).is_contiguous(memory_format=layout)
