"""The bilinear attentional transform against a naive reading of its definition."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.attention import bat
from common.attention.bat import BATBlock, BilinearTransform, bilinear_transform


def naive_transform(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """``(P ⊗ I) · x · (Q ⊗ I)`` with the enlarged matrices written out, one image and channel at a time."""
    groups, size = p.shape[1], p.shape[-1]
    per_group = x.shape[1] // groups
    rows = torch.eye(x.shape[2] // size, dtype=x.dtype)
    columns = torch.eye(x.shape[3] // size, dtype=x.dtype)
    y = torch.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            g = c // per_group
            y[n, c] = torch.kron(p[n, g], rows) @ x[n, c] @ torch.kron(q[n, g], columns)
    return y


def naive_module(module: BilinearTransform, x: Tensor) -> Tensor:
    """The whole transform, word for word."""
    s, k = module.size, module.groups
    o = module.conv1(x)
    p = module.conv_p(F.adaptive_max_pool2d(o, (s, 1))).view(-1, k, s, s).sigmoid()
    q = module.conv_q(F.adaptive_max_pool2d(o, (1, s))).view(-1, k, s, s).sigmoid()
    y = naive_transform(x, p / p.sum(3, keepdim=True), q / q.sum(2, keepdim=True))
    return module.conv2(y)


def random_inputs(*shape: int, groups: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    p, q = torch.randn(2, shape[0], groups, size, size, dtype=torch.float64)
    return x, p, q


def randomised(module: nn.Module) -> nn.Module:
    """``module`` in double, its norms and biases away from their first values."""
    torch.manual_seed(1)
    module = module.double()
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.ndim == 1:
                tensor.copy_(
                    torch.rand_like(tensor) + 0.5 if name.endswith(("weight", "var")) else tensor + 0.3
                )
    return module


@pytest.mark.parametrize(
    "shape, groups, size",
    [
        ((2, 8, 28, 28), 4, 7),
        ((2, 8, 14, 14), 2, 7),
        ((1, 4, 7, 7), 1, 7),
        ((1, 4, 14, 28), 4, 7),
        ((3, 6, 9, 6), 3, 3),
    ],
)
def test_contraction_equals_kronecker_matrices(shape: tuple[int, ...], groups: int, size: int) -> None:
    x, p, q = random_inputs(*shape, groups=groups, size=size)
    torch.testing.assert_close(bilinear_transform(x, p, q), naive_transform(x, p, q), rtol=0, atol=1e-12)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(bilinear_transform(last, p, q), naive_transform(x, p, q), rtol=0, atol=1e-12)


def test_contraction_gradients() -> None:
    inputs = [t.requires_grad_() for t in random_inputs(2, 4, 6, 3, groups=2, size=3)]
    assert torch.autograd.gradcheck(bilinear_transform, inputs)
    assert torch.autograd.gradgradcheck(bilinear_transform, inputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 8, 14, 14), (2, 8, 7, 21)])
def test_transform_equals_definition_with_gradients(shape: tuple[int, ...], training: bool) -> None:
    module = randomised(BilinearTransform(8, size=7, groups=4)).train(training)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = [x, *module.parameters()]
    weights = torch.randn(shape, dtype=torch.float64)
    ours = module(x), torch.autograd.grad((module(x) * weights).sum(), wanted)
    naive = naive_module(module, x), torch.autograd.grad((naive_module(module, x) * weights).sum(), wanted)
    torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-10)


def test_transform_module_gradcheck() -> None:
    module = randomised(BilinearTransform(2, size=2, groups=1)).eval()
    x = torch.randn(1, 2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)


def test_matrices_are_averages() -> None:
    p, q = randomised(BilinearTransform(8)).matrices(torch.randn(2, 8, 14, 14, dtype=torch.float64))
    ones = torch.ones(2, 4, 7, dtype=torch.float64)
    assert p.min() > 0
    assert q.min() > 0
    torch.testing.assert_close(p.sum(3), ones)
    torch.testing.assert_close(q.sum(2), ones)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrices_stay_finite_in_half_precision(dtype: torch.dtype) -> None:
    module = BilinearTransform(8).to(dtype).eval()
    nn.init.constant_(module.conv_p.bias, -200.0)
    nn.init.constant_(module.conv_q.bias, -200.0)
    for matrix in module.matrices(torch.randn(1, 8, 7, 7, dtype=dtype)):
        torch.testing.assert_close(matrix.sum((2, 3)).float(), torch.full((1, 4), 7.0), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    "given, multiple", [((12, 12), (14, 14)), ((32, 36), (35, 42)), ((3, 14), (7, 14)), ((1, 1), (7, 7))]
)
def test_other_sizes_are_resampled_to_the_next_multiples(
    given: tuple[int, int], multiple: tuple[int, int]
) -> None:
    module = randomised(BilinearTransform(8)).eval()
    x = torch.randn(2, 8, *given, dtype=torch.float64)
    grown = F.interpolate(x, size=multiple, mode="bilinear", align_corners=False)
    y = F.interpolate(
        naive_transform(grown, *module.matrices(grown)), size=given, mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(module(x), module.conv2(y), rtol=0, atol=1e-12)


def test_multiples_are_not_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("resampled")

    monkeypatch.setattr(bat.F, "interpolate", refuse)
    module = BilinearTransform(8)
    assert module(torch.randn(2, 8, 14, 28)).shape == (2, 8, 14, 28)
    with pytest.raises(AssertionError, match="resampled"):
        module(torch.randn(2, 8, 14, 27))


def test_block_is_a_residual_of_the_transform() -> None:
    block = randomised(BATBlock(8, dropout=0.0, groups=2)).eval()
    x = torch.randn(1, 8, 14, 14, dtype=torch.float64)
    expected = x + block.conv2(naive_module(block.batransform, block.conv1(x)))
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
    nn.init.zeros_(block.conv2[1].weight)
    nn.init.zeros_(block.conv2[1].bias)
    assert torch.equal(block(x), x)


def test_dropout_takes_whole_channels_in_training_only() -> None:
    torch.manual_seed(0)
    block = BATBlock(64, dropout=0.5)
    nn.init.ones_(block.conv2[1].bias)
    x = torch.randn(4, 64, 7, 7)
    change = (block(x) - x).abs().amax((2, 3))
    assert 0.3 < (change == 0).float().mean() < 0.7
    block.eval()
    assert torch.equal(block(x), block(x))


def test_initialisation() -> None:
    torch.manual_seed(0)
    block = BATBlock(256)
    for conv in (block.conv1[0], block.conv2[0], block.batransform.conv_p, block.batransform.conv2[0]):
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        assert conv.bias.abs().max() > 0  # torch's own initialisation, not zero
    for norm in (block.conv1[1], block.batransform.conv1[1], block.conv2[1]):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert not norm.bias.any()


def test_half_precision_autocast_and_channels_last() -> None:
    torch.manual_seed(0)
    block = BATBlock(32, dropout=0.0).eval()
    x = torch.randn(2, 32, 14, 14)
    exact = block(x)
    torch.testing.assert_close(block(x.to(memory_format=torch.channels_last)), exact)
    torch.testing.assert_close(block.to(memory_format=torch.channels_last)(x), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert (block(x).float() - exact).norm() < 0.01 * exact.norm()
        block.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("side", [14, 12])
def test_compiles_to_one_graph(side: int) -> None:
    block = BATBlock(16, dropout=0.0).eval()
    x = torch.randn(2, 16, side, side)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


@pytest.mark.slow
def test_compiles_for_training_at_several_sizes() -> None:
    torch._dynamo.reset()
    block = randomised(BATBlock(16, dropout=0.0, groups=2))
    compiled = torch.compile(block, fullgraph=True)
    for size in ((14, 14), (28, 14), (12, 20)):  # the second makes the sides symbols
        x = torch.randn(2, 16, *size, dtype=torch.float64)
        ours, wanted = (
            torch.autograd.grad(f(x).square().sum(), list(block.parameters())) for f in (compiled, block)
        )
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_exports_with_any_batch() -> None:
    block = BATBlock(16, dropout=0.0).eval()
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(block, (torch.randn(2, 16, 14, 12),), dynamic_shapes=(batch,)).module()
    for n in (1, 5):
        x = torch.randn(n, 16, 14, 12)
        torch.testing.assert_close(exported(x), block(x))


def test_values_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"groups=4 does not divide channels=6: use one of \[1, 2, 3, 6\]"):
        BilinearTransform(6)
    with pytest.raises(ValueError, match=r"groups=4 does not divide channels=6"):
        BATBlock(12)
    with pytest.raises(ValueError, match=r"reduction=2 does not divide channels=9: use one of \[1, 3, 9\]"):
        BATBlock(9)
    with pytest.raises(ValueError, match="size=0"):
        BilinearTransform(8, size=0)
