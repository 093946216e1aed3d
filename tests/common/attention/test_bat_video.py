"""The transforms of clips against a naive reading of their definition: enlarged matrices, one for every channel."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.bat
from common.attention import bat
from common.attention.bat_video import (
    BATBlock3d,
    BilinearTransform3d,
    fitting_side,
    overlay,
    temporal_transform,
)


def naive_overlay(windows: Tensor) -> Tensor:
    """(s, s, w) → (m, m)."""
    side, _, count = windows.shape
    total = windows.new_zeros(side + count - 1, side + count - 1)
    covered = torch.zeros_like(total)
    for i in range(count):
        total[i : i + side, i : i + side] += windows[:, :, i]
        covered[i : i + side, i : i + side] += 1
    return total / torch.where(covered == 0, 1, covered)


def naive_transform(module: BilinearTransform3d, x: Tensor) -> Tensor:
    """Before ``conv2``: (P ⊗ I) x (Q ⊗ I) of each frame and channel, then (M ⊗ I) at each pixel."""
    n, channels, length, height, width = x.shape
    s, k = module.size, module.groups
    high, wide = height // (height // s), width // (width // s)
    o = module.conv1(x)
    p = module.conv_p(F.adaptive_max_pool3d(o, (length, high, 1))).view(n, k, s, s, length, -1)
    q = module.conv_q(F.adaptive_max_pool3d(o, (length, 1, wide))).view(n, k, s, s, length, -1)
    eye_h, eye_w = (torch.eye(t, dtype=x.dtype) for t in (height // high, width // wide))
    clips = []
    for i in range(n):
        for c in range(channels):
            g = c // (channels // k)
            planes = [
                torch.kron(naive_overlay(p[i, g, :, :, t]).softmax(1), eye_h)
                @ x[i, c, t]
                @ torch.kron(naive_overlay(q[i, g, :, :, t]).softmax(0), eye_w)
                for t in range(length)
            ]
            clips.append(torch.stack(planes))
    y = torch.stack(clips).view(x.shape)
    if module.time_groups:
        ts, tk = module.time_size, module.time_groups
        m = module.conv_t(F.adaptive_avg_pool3d(o, (ts, 1, 1))).view(n, tk, ts, ts).softmax(3)
        y = naive_temporal(y, m)
    return y


def naive_temporal(y: Tensor, m: Tensor) -> Tensor:
    """The enlarged matrix for every channel and pixel, as the published program has it."""
    n, channels, length, height, width = y.shape
    groups, size = m.shape[1], m.shape[-1]
    eye = torch.eye(length // size, dtype=y.dtype)
    large = torch.stack([torch.stack([torch.kron(m[i, g], eye) for g in range(groups)]) for i in range(n)])
    large = large.repeat_interleave(channels // groups, 1)[:, :, None, None]
    large = large.expand(n, channels, height, width, length, length)
    return (large @ y.permute(0, 1, 3, 4, 2)[..., None])[..., 0].permute(0, 1, 4, 2, 3)


def randomised(module: nn.Module) -> nn.Module:
    """``module`` in double, its norms and biases away from their first values."""
    torch.manual_seed(1)
    module = module.double()
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.ndim == 1:
                noise = torch.rand_like(tensor)
                tensor.copy_(noise + 0.5 if name.endswith(("weight", "var")) else tensor + noise)
    return module


def transform(**options: int) -> BilinearTransform3d:
    return randomised(BilinearTransform3d(8, **({"groups": 2, "time_groups": 4} | options)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "size, options",
    [
        ((4, 14, 14), {}),
        ((4, 14, 7), {"time_groups": 0}),
        ((8, 16, 14), {"time_groups": 2}),
        ((4, 18, 20), {"groups": 4}),
        ((2, 4, 3), {"size": 3, "time_size": 2, "time_groups": 1}),
        ((6, 5, 9), {"size": 3, "time_size": 3, "time_groups": 8}),
    ],
)
def test_equals_definition_with_gradients(size: tuple, options: dict, training: bool) -> None:
    module = transform(**options).train(training)
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    wanted = [x, *module.parameters()]
    results = []
    for y in (module(x), module.conv2(naive_transform(module, x))):
        results.append((y, torch.autograd.grad((y * weights).sum(), wanted)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_channels_last_is_the_same() -> None:
    module = transform().eval()
    x = torch.randn(2, 8, 4, 16, 14, dtype=torch.float64)
    last = module.to(memory_format=torch.channels_last_3d)(x.contiguous(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(last, module.conv2(naive_transform(module, x)), check_stride=False)


@pytest.mark.parametrize("groups, size, length", [(4, 4, 4), (2, 4, 8), (1, 2, 6), (8, 1, 3)])
def test_temporal_contraction_equals_expanded_matrices(groups: int, size: int, length: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, length, 3, 2, dtype=torch.float64)
    m = torch.randn(2, groups, size, size, dtype=torch.float64)
    for given in (x, x.contiguous(memory_format=torch.channels_last_3d)):
        torch.testing.assert_close(temporal_transform(given, m), naive_temporal(x, m), rtol=0, atol=1e-12)


def test_temporal_gradients() -> None:
    x = torch.randn(2, 4, 4, 2, 1, dtype=torch.float64, requires_grad=True)
    m = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(temporal_transform, [x, m])


def test_transform_module_gradcheck() -> None:
    module = randomised(BilinearTransform3d(2, size=2, groups=1, time_size=2, time_groups=2)).eval()
    x = torch.randn(1, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation gave, views counted as what they show."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_matrices_are_not_expanded() -> None:
    """Neither the products with the identity nor a matrix for each channel or pixel appear, backward included."""
    module = BilinearTransform3d(32, groups=8, time_groups=4)
    x = torch.randn(1, 32, 8, 16, 16, requires_grad=True)
    with Largest() as seen:
        module(x).sum().backward()
    assert seen.elements == x.numel()
    with Largest() as seen:
        naive_temporal(x.detach(), torch.randn(1, 4, 4, 4))
    assert seen.elements == 8 * x.numel()


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_overlay(count: int) -> None:
    windows = torch.randn(2, 3, 4, 4, count, dtype=torch.float64)
    expected = torch.stack([naive_overlay(w) for w in windows.flatten(0, 1)]).unflatten(0, (2, 3))
    torch.testing.assert_close(overlay(windows), expected)


def test_entries_that_no_window_covers_take_part_in_the_softmax() -> None:
    module = transform().eval()
    p, q = module.matrices(torch.rand(1, 2, 4, 16, 18, dtype=torch.float64))
    assert p.shape == (4, 2, 8, 8)
    assert q.shape == (4, 2, 9, 9)
    assert p.min() > 0
    torch.testing.assert_close(p.sum(3), torch.ones(4, 2, 8, dtype=p.dtype))
    torch.testing.assert_close(q.sum(2), torch.ones(4, 2, 9, dtype=p.dtype))


def test_which_sides_fit() -> None:
    for size in (3, 7):
        for side in range(1, 100):
            published = side >= size and side % (side // (side // size)) == 0
            fit = fitting_side(side, size)
            assert fit == side if published else (fit % size == 0 and side < fit < side + size)
    assert [fitting_side(side, 7) for side in (7, 8, 14, 16, 28, 32)] == [7, 8, 14, 16, 28, 32]
    assert [fitting_side(side, 7) for side in (1, 15, 30, 36)] == [7, 21, 35, 42]


@pytest.mark.parametrize(
    "given, fitting", [((4, 15, 15), (4, 21, 21)), ((6, 14, 12), (8, 14, 12)), ((1, 3, 30), (4, 7, 35))]
)
def test_other_sizes_are_resampled(given: tuple, fitting: tuple) -> None:
    module = transform().eval()
    x = torch.randn(2, 8, *given, dtype=torch.float64)
    grown = F.interpolate(x, size=fitting, mode="trilinear", align_corners=False)
    y = F.interpolate(naive_transform(module, grown), size=given, mode="trilinear", align_corners=False)
    torch.testing.assert_close(module(x), module.conv2(y), rtol=0, atol=1e-11)


def test_fitting_sizes_are_not_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("resampled")

    monkeypatch.setattr(bat.F, "interpolate", refuse)
    assert BilinearTransform3d(8, time_groups=1)(torch.randn(1, 8, 4, 16, 28)).shape == (1, 8, 4, 16, 28)
    assert BilinearTransform3d(8)(torch.randn(1, 8, 3, 14, 14)).shape == (1, 8, 3, 14, 14)
    with pytest.raises(AssertionError, match="resampled"):
        BilinearTransform3d(8, time_groups=1)(torch.randn(1, 8, 3, 14, 14))


def test_block_is_a_residual_of_the_transform() -> None:
    block = randomised(BATBlock3d(16, dropout=0.0, groups=2, time_groups=4)).eval()
    x = torch.randn(1, 16, 4, 7, 7, dtype=torch.float64)
    inner = block.conv1(x)
    expected = x + block.conv2(block.batransform.conv2(naive_transform(block.batransform, inner)))
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-11)


def test_dropout_takes_whole_channels_in_training_only() -> None:
    torch.manual_seed(0)
    block = BATBlock3d(64, dropout=0.5)
    nn.init.ones_(block.conv2[1].bias)
    x = torch.randn(4, 64, 2, 7, 7)
    change = (block(x) - x).abs().amax((2, 3, 4))
    assert 0.3 < (change == 0).float().mean() < 0.7
    block.eval()
    assert torch.equal(block(x), block(x))


def test_initialisation() -> None:
    torch.manual_seed(0)
    block = BATBlock3d(256, time_groups=4)
    t = block.batransform
    for conv in (block.conv1[0], block.conv2[0], t.conv_p, t.conv_q, t.conv_t, t.conv2[0]):
        fan_out = conv.out_channels * conv.weight[0, 0].numel()
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.08)
        assert not conv.bias.any()
    for norm in (block.conv1[1], t.conv1[1], block.conv2[1]):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))


def test_half_precision() -> None:
    torch.manual_seed(0)
    block = BATBlock3d(32, dropout=0.0, time_groups=4).eval()
    x = torch.randn(2, 32, 4, 16, 14)
    exact = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (block(x).float() - exact).norm() < 0.01 * exact.norm()
        block.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("size", [(3, 15, 14), pytest.param((4, 14, 16), marks=pytest.mark.slow)])
def test_one_graph_and_export_with_any_batch(size: tuple) -> None:
    block = BATBlock3d(16, dropout=0.0, time_groups=4).eval()
    x = torch.randn(2, 16, *size)
    torch.testing.assert_close(
        torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x), check_stride=False
    )
    exported = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(exported(x[:1]), block(x[:1]), check_stride=False)


def test_values_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"groups=8 does not divide channels=6: use one of \[1, 2, 3, 6\]"):
        BilinearTransform3d(6)
    with pytest.raises(ValueError, match="groups=3 does not divide channels=8"):
        BilinearTransform3d(8, time_groups=3)
    with pytest.raises(ValueError, match="reduction=2 does not divide channels=9"):
        BATBlock3d(9)
    with pytest.raises(ValueError, match="size=0"):
        BilinearTransform3d(8, size=0)


def test_with_a_kernel_time_is_transformed_by_the_bilinear_operator(monkeypatch):
    """The path that a GPU takes, with the operator's reference in the kernel's place."""
    x = torch.randn(2, 6, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    m = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    wanted = temporal_transform(x, m)
    monkeypatch.setattr(kernels.bat, "runs", lambda *_: True)
    y = temporal_transform(x, m)
    torch.testing.assert_close(y, wanted)
    of_y = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, m), of_y), torch.autograd.grad(wanted, (x, m), of_y)
    )
