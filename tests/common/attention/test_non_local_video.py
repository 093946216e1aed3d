"""The 3-D non-local block against its definition."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.attention.non_local import NonLocal3d


def naive(block: NonLocal3d, x: Tensor) -> Tensor:
    """softmax(θᵀφ / √c) over the positions of the clip, or of a frame, one head after the other."""

    def convolved(layer: nn.Module) -> Tensor:
        if isinstance(layer, nn.Sequential):
            sides = [min(2, side) for side in x.shape[3:]]
            return layer[1](F.max_pool3d(x, (1, *sides), (1, *sides)))
        return layer(x)

    parts = [convolved(layer) for layer in (block.theta, block.phi, block.g)]
    groups = [[y[:, :, t : t + 1] for y in parts] for t in range(x.shape[2])] if block.per_frame else [parts]
    clips = []
    for group in groups:
        heads = []
        for theta, phi, g in zip(*(y.flatten(2).chunk(block.heads, 1) for y in group)):
            attention = (theta.mT @ phi / theta.shape[1] ** 0.5).softmax(-1)
            heads.append(g @ attention.mT)
        clips.append(torch.cat(heads, 1).view(group[0].shape))
    return x + block.W(torch.cat(clips, 2))


def awake(channels: int, **kwargs: object) -> NonLocal3d:
    """A block whose residual branch is not zero."""
    torch.manual_seed(0)
    block = NonLocal3d(channels, **kwargs)
    nn.init.uniform_(block.W[1].weight, 0.5, 1.5)
    nn.init.normal_(block.W[0].weight)
    return block


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "size, options",
    [
        ((3, 4, 7), {}),
        ((2, 4, 4), {"heads": 2}),
        ((3, 4, 5), {"sub_sample": False, "reduction": 1}),
        ((3, 4, 4), {"per_frame": True, "heads": 4}),
        ((2, 1, 3), {}),
    ],
)
def test_equals_definition_with_gradients(size: tuple, options: dict, training: bool) -> None:
    block = awake(8, **options).double().train(training)
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    wanted = [x, *block.parameters()]
    results = [(y, torch.autograd.grad((y * weights).sum(), wanted)) for y in (block(x), naive(block, x))]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9, check_stride=False)


def test_a_new_block_is_the_identity() -> None:
    block, x = NonLocal3d(8), torch.randn(2, 8, 3, 5, 5)
    assert torch.equal(block(x), x)
    assert torch.equal(block.eval()(x), x)


def test_initialisation() -> None:
    torch.manual_seed(0)
    block = NonLocal3d(256)
    for conv in (block.theta, block.phi[1], block.g[1]):
        assert conv.weight.std().item() == pytest.approx((2 / conv.out_channels) ** 0.5, rel=0.05)
        assert not conv.bias.any()
    assert block.W[0].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not block.W[0].bias.any()


def test_half_precision_and_channels_last() -> None:
    block = awake(16).eval()
    x = torch.randn(1, 16, 4, 8, 6)
    exact = block(x)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(block(last), exact, check_stride=False, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (block(x).float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("per_frame", [False, True])
def test_one_graph_and_export_with_any_batch(per_frame: bool) -> None:
    block = awake(8, per_frame=per_frame).eval()
    x = torch.randn(3, 8, 2, 6, 4)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))
    exported = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(exported(x[:1]), block(x[:1]))


def test_values_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="reduction=2 does not divide channels=15"):
        NonLocal3d(15)
    with pytest.raises(ValueError, match=r"heads=3 does not divide 4 channels: use one of \[1, 2, 4\]"):
        NonLocal3d(8, heads=3)
