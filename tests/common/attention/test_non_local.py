"""The non-local block against its definition."""

import pytest
import torch
from torch import Tensor, nn

from common.attention.non_local import NonLocal


def naive(block: NonLocal, x: Tensor) -> Tensor:
    """softmax(θᵀφ / √c) over the positions, written out."""
    theta, phi, g = (conv(x).flatten(2) for conv in (block.t, block.p, block.g))
    attention = (theta.mT @ phi / theta.shape[1] ** 0.5).softmax(-1)
    return x + block.bn(block.z((g @ attention.mT).view(x.shape[0], -1, *x.shape[2:])))


def awake(channels: int, **kwargs: int) -> NonLocal:
    """A block whose residual branch is not zero."""
    torch.manual_seed(0)
    block = NonLocal(channels, **kwargs)
    nn.init.uniform_(block.bn.weight, 0.5, 1.5)
    return block


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reduction", [1, 2])
def test_equals_definition_with_gradients(training: bool, reduction: int) -> None:
    block = awake(6, reduction=reduction).double().train(training)
    x = torch.randn(2, 6, 4, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    wanted = [x, *block.parameters()]
    ours = block(x), torch.autograd.grad((block(x) * weights).sum(), wanted)
    expected = naive(block, x), torch.autograd.grad((naive(block, x) * weights).sum(), wanted)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_gradcheck() -> None:
    block = awake(2).double().eval()
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x)


def test_a_new_block_is_the_identity() -> None:
    block, x = NonLocal(8), torch.randn(2, 8, 5, 5)
    assert torch.equal(block(x), x)
    assert torch.equal(block.eval()(x), x)


def test_initialisation() -> None:
    torch.manual_seed(0)
    block = NonLocal(256)
    for conv in (block.t, block.p, block.g, block.z):
        assert conv.weight.std().item() == pytest.approx((2 / conv.out_channels) ** 0.5, rel=0.05)
        assert not conv.bias.any()


def test_half_precision_and_channels_last() -> None:
    block = awake(16).eval()
    x = torch.randn(1, 16, 8, 6)
    exact = block(x)
    torch.testing.assert_close(block(x.to(memory_format=torch.channels_last)), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert (block(x).float() - exact).norm() < 0.02 * exact.norm()


def test_one_graph_and_export_with_any_batch() -> None:
    block = awake(8).eval()
    x = torch.randn(3, 8, 6, 4)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))
    exported = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(exported(x[:1]), block(x[:1]))


@pytest.mark.slow
def test_compiles_for_training_at_several_sizes() -> None:
    torch._dynamo.reset()
    block = awake(8).double()
    compiled = torch.compile(block, fullgraph=True)
    for size in ((7, 7), (14, 7), (6, 10)):  # the second makes the sides symbols
        x = torch.randn(2, 8, *size, dtype=torch.float64)
        ours, wanted = (
            torch.autograd.grad(f(x).square().sum(), list(block.parameters())) for f in (compiled, block)
        )
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_reduction_that_does_not_divide_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"reduction=2 does not divide channels=15: use one of \[1, 3, 5, 15\]"
    ):
        NonLocal(15)
