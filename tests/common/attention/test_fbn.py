"""The factorized bilinear layer against the published numbers, its own definition and its promises."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.attention import fbn
from common.attention.fbn import FactorizedBilinear, FBNHead, factorized_bilinear
from tests.parity.golden import golden

CONV = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}


def tensors(*shapes, dtype=torch.float64, seed=0):
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.standard_normal(s)).to(dtype).requires_grad_() for s in shapes]


def layer(*args, **kwargs):
    torch.manual_seed(0)
    made = FactorizedBilinear(*args, **kwargs)
    torch.nn.init.normal_(made.bias)
    return made


@pytest.fixture
def few_products(monkeypatch):
    """Work one or two outputs at a time, so that small layers go through all parts of the code."""
    monkeypatch.setitem(fbn.PRODUCTS, "cpu", 12)


@pytest.mark.parametrize("mask", ["eval", "train", "ones"])
@pytest.mark.parametrize("products", [12, 2048])
def test_golden(mask, products, monkeypatch):
    monkeypatch.setitem(fbn.PRODUCTS, "cpu", products)
    data = {key: torch.from_numpy(value) for key, value in golden("fb_layer_1x1").items() if value.ndim}
    x, weight, bias = (data[key].requires_grad_() for key in ("input", "weight", "bias"))
    out = factorized_bilinear(x, weight, bias, data[f"{mask}_mask"])
    torch.testing.assert_close(out, data[f"{mask}_output"], rtol=0, atol=1e-12)
    grads = torch.autograd.grad(out, (x, weight, bias), data[f"{mask}_grad_output"])
    for grad, key in zip(grads, ("input", "weight", "bias")):
        torch.testing.assert_close(grad, data[f"{mask}_grad_{key}"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", ["eval", "train", "ones"])
def test_published_gradient_is_reproduced_and_differs(mask):
    data = {key: torch.from_numpy(value) for key, value in golden("fb_layer_1x1").items() if value.ndim}
    x, weight = data["input"].requires_grad_(), data["weight"].requires_grad_()
    out = factorized_bilinear(x, weight, data["bias"], data[f"{mask}_mask"], published_gradient=True)
    torch.testing.assert_close(out, data[f"{mask}_output"], rtol=0, atol=1e-12)
    of_x, of_weight = torch.autograd.grad(out, (x, weight), data[f"{mask}_grad_output"])
    torch.testing.assert_close(of_x, data[f"{mask}_grad_input_cpp"], rtol=0, atol=1e-12)
    torch.testing.assert_close(of_weight, data[f"{mask}_grad_weight"], rtol=0, atol=1e-12)
    true = data[f"{mask}_grad_input"]
    assert (of_x - true).norm() > 0.8 * true.norm()


def by_definition(x, weight, bias, mask, kernel_size, stride, padding, dilation, groups, keep_diagonal):
    """The layer written out for every image, output and position."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel_size, stride, padding, dilation
    padded = F.pad(x, (pw, pw, ph, ph))
    height = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    outputs, channels = weight.shape[0], x.shape[1] // groups
    out = x.new_zeros(x.shape[0], outputs, height, width)
    for n, j, y, z in product(range(x.shape[0]), range(outputs), range(height), range(width)):
        first = j // (outputs // groups) * channels
        column = torch.stack(
            [
                padded[n, c, y * sh + a * dh, z * sw + b * dw]
                for c, a, b in product(range(first, first + channels), range(kh), range(kw))
            ]
        )
        scaled = mask[:, None] * weight[j]
        pairs = scaled.mT @ scaled
        if not keep_diagonal:
            pairs = pairs - pairs.diag().diag()
        out[n, j, y, z] = column @ pairs @ column + bias[j]
    return out


@pytest.mark.parametrize("keep_diagonal", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        CONV,
        {"kernel_size": (1, 1), "stride": (2, 3), "padding": (0, 0), "dilation": (1, 1), "groups": 1},
        {"kernel_size": (1, 1), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 1), "groups": 2},
    ],
)
def test_convolution_options_by_definition(options, keep_diagonal, few_products):
    kernel = options["kernel_size"][0] * options["kernel_size"][1]
    x, weight, bias = tensors((2, 4, 5, 6), (6, 3, 4 // options["groups"] * kernel), (6,))
    mask = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    arguments = (x, weight, bias, mask)
    out = factorized_bilinear(*arguments, **options, keep_diagonal=keep_diagonal)
    expected = by_definition(*arguments, **options, keep_diagonal=keep_diagonal)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, (x, weight, bias), cotangent)
    for grad, right in zip(grads, torch.autograd.grad(expected, (x, weight, bias), cotangent)):
        torch.testing.assert_close(grad, right, rtol=0, atol=1e-11)


def test_a_single_input_has_no_pair():
    """Of one channel alone only the diagonal is left, so the layer gives its bias."""
    x, weight, bias = tensors((2, 1, 3, 3), (4, 5, 1), (4,))
    out = factorized_bilinear(x, weight, bias)
    torch.testing.assert_close(out, bias.view(1, 4, 1, 1).expand_as(out), rtol=0, atol=1e-12)
    kept = factorized_bilinear(x, weight, bias, keep_diagonal=True)
    squares = torch.einsum("jkc,nchw->njhw", weight.square(), x.square())
    torch.testing.assert_close(kept, squares + bias.view(-1, 1, 1))


@pytest.mark.parametrize("keep_diagonal", [False, True])
def test_gradcheck(keep_diagonal, few_products):
    def run(x, weight, bias):
        return factorized_bilinear(x, weight, bias, mask, **CONV, keep_diagonal=keep_diagonal)

    mask = torch.tensor([0.7, 0.0, 1.4], dtype=torch.float64)
    assert torch.autograd.gradcheck(run, tensors((2, 4, 4, 3), (4, 3, 12), (4,)))


@pytest.mark.parametrize("frozen", [0, 1])
def test_gradient_of_one_side_only(frozen, few_products):
    arguments = tensors((2, 4, 3, 3), (5, 3, 4), (5,))
    full = torch.autograd.grad(factorized_bilinear(*arguments).square().sum(), arguments[1 - frozen])[0]
    arguments[frozen].requires_grad_(False)
    alone = torch.autograd.grad(factorized_bilinear(*arguments).square().sum(), arguments[1 - frozen])[0]
    torch.testing.assert_close(alone, full, rtol=0, atol=0)


def test_parts_do_not_change_the_result(monkeypatch):
    results = []
    for products in (1, 21, 10**9):
        monkeypatch.setitem(fbn.PRODUCTS, "cpu", products)
        x, weight, bias = tensors((2, 8, 5, 5), (7, 6, 8), (7,))
        out = factorized_bilinear(x, weight, bias)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, weight, bias))))
    for other in results[:2]:
        for a, b in zip(other, results[2]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operator gave."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


def test_products_are_never_whole_in_memory():
    images, outputs, factors, channels, side = 4, 400, 50, 16, 7
    x = torch.randn(images, channels, side, side, requires_grad=True)
    made = FactorizedBilinear(channels, outputs, factors).train()
    saved = []
    with Largest() as largest:
        with saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            out = made(x)
        out.sum().backward()
    rows = images * side * side
    assert largest.numel <= max(made.weight.numel(), rows * fbn.PRODUCTS["cpu"])
    assert largest.numel < rows * outputs * factors / 8
    # Kept for the backward pass: inputs, weights and their diagonal; never anything of outputs × positions.
    assert sum(saved) <= x.numel() + made.weight.numel() + outputs * channels + factors


def test_unbiased_evaluation_is_the_expectation_of_training():
    x, weight, bias = tensors((2, 5, 3, 3), (4, 3, 5), (4,))
    keep = 0.75
    mean = torch.zeros(())
    for mask in product([0.0, 1.0], repeat=3):
        kept = torch.tensor(mask, dtype=torch.float64)
        share = keep ** kept.sum() * (1 - keep) ** (3 - kept.sum())
        mean = mean + share * factorized_bilinear(x, weight, bias, kept / keep**0.5)
    torch.testing.assert_close(factorized_bilinear(x, weight, bias), mean)


def test_evaluation_scales():
    x = torch.randn(2, 6, 4, 4)
    unbiased = layer(6, 5, 4, drop=0.25).eval()
    published = layer(6, 5, 4, drop=0.25, eval_scale="published").eval()
    bias = unbiased.bias.view(-1, 1, 1)
    assert torch.equal(bias, published.bias.view(-1, 1, 1))
    torch.testing.assert_close(published(x) - bias, 0.75 * (unbiased(x) - bias))
    torch.testing.assert_close(unbiased(x), factorized_bilinear(x, unbiased.weight, unbiased.bias))


def test_mask_is_one_vector_a_pass_from_the_default_generator():
    made = layer(6, 5, 200, drop=0.25).train()
    x = torch.randn(3, 6, 4, 4)
    state = torch.get_rng_state()
    first, second = made(x), made(x)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    mask = made.mask()
    torch.testing.assert_close(factorized_bilinear(x, made.weight, made.bias, mask), first)
    torch.testing.assert_close(made(x), second)
    assert mask.shape == (200,)
    assert set(mask.tolist()) == {0.0, mask.max().item()}
    assert mask.max().item() == pytest.approx(0.75**-0.5)
    assert 120 <= int(mask.count_nonzero()) <= 180


def test_masks_of_processes_follow_their_own_seeds():
    made = layer(6, 5, 50).train()
    masks = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        masks.append(made.mask())
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])


def test_no_drop_is_the_same_in_training_and_evaluation():
    made = layer(6, 5, 4, drop=0.0, eval_scale="published")
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(made.train()(x), made.eval()(x))


def test_initial_deviation():
    made = FactorizedBilinear(40, 50, 20, kernel_size=3)
    assert made.weight.std().item() == pytest.approx((2 / (20 * 40 * 9)) ** 0.5, rel=0.01)
    assert made.bias.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, few_products):
    made = layer(64, 10, 8).eval()
    x = torch.randn(4, 64, 5, 5).tanh().requires_grad_()
    right = torch.autograd.grad(made(x).square().mean(), (x, made.weight))
    with torch.autocast("cpu", dtype):
        out = made(x)
        loss = out.float().square().mean()
    assert out.dtype == dtype
    assert (out - made(x)).abs().max() < 0.02 * made(x).abs().max()
    for grad, expected in zip(torch.autograd.grad(loss, (x, made.weight)), right):
        assert grad.dtype == torch.float32
        assert (grad - expected).norm() < 0.02 * expected.norm()


def test_half_precision_layer():
    made = layer(64, 10, 8).eval()
    x = torch.randn(4, 64, 5, 5).tanh()
    right = made(x)
    out = made.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out - right).abs().max() < 0.02 * right.abs().max()
    out.sum().backward()
    assert made.weight.grad.dtype == torch.bfloat16


def test_memory_formats_agree():
    made = layer(8, 5, 4, kernel_size=3, padding=1).eval()
    x = torch.randn(2, 8, 6, 7)
    out = made(x)
    last = made.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, out)
    torch.testing.assert_close(made(x.mT.contiguous().mT), out)


@pytest.mark.parametrize("training", [False, True])
def test_compile(training, few_products):
    made = layer(6, 5, 4, kernel_size=3, padding=1).train(training)
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    right = torch.autograd.grad(made(x).square().sum(), (x, *made.parameters()))
    torch.manual_seed(1)
    for grad, expected in zip(
        torch.autograd.grad(compiled(x).square().sum(), (x, *made.parameters())), right
    ):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16


@pytest.mark.slow
def test_compile_with_inductor(few_products):
    made = layer(6, 5, 4).eval()
    x = torch.randn(2, 6, 4, 5)
    right = torch.autograd.grad(made(x).square().sum(), list(made.parameters()))
    out = torch.compile(made, fullgraph=True)(x)
    for grad, expected in zip(torch.autograd.grad(out.square().sum(), list(made.parameters())), right):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_export_with_any_batch(few_products):
    made = layer(6, 5, 4, kernel_size=3).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(made, (torch.randn(2, 6, 4, 5),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 6, 4, 5)
    torch.testing.assert_close(program.module()(x), made(x))


def test_meta_device_gives_shapes():
    with torch.device("meta"):
        assert FactorizedBilinear(6, 5, 4, kernel_size=3, stride=2)(torch.empty(2, 6, 9, 8)).shape == (
            2,
            5,
            4,
            3,
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"in_channels": 0}, "in_channels=0"),
        ({"factors": 0}, "factors=0"),
        ({"groups": 4}, r"groups=4 .* \[1, 2\] would"),
        ({"groups": 0}, "groups=0"),
        ({"drop": 1.0}, r"drop=1.0: must be in \[0, 1\)"),
        ({"eval_scale": "none"}, "eval_scale='none'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FactorizedBilinear(**{"in_channels": 6, "out_channels": 8} | arguments)


def test_head_is_linear_plus_bilinear_averaged():
    torch.manual_seed(0)
    head = FBNHead(6, 5, factors=4).eval()
    x = torch.randn(2, 6, 3, 4)
    maps = F.conv2d(x, head.fc.weight, head.fc.bias) + factorized_bilinear(x, head.bilinear.weight)
    torch.testing.assert_close(head.class_maps(x), maps)
    torch.testing.assert_close(head(x), maps.mean((2, 3)))
    torch.testing.assert_close(head(x.flatten(2)), head(x))
    bounded = FBNHead(6, 5, factors=4, tanh=True).eval()
    bounded.load_state_dict(head.state_dict())
    torch.testing.assert_close(bounded(x), head(x.tanh()))


def test_head_hands_its_options_on():
    head = FBNHead(6, 5, 4, drop=0.25, keep_diagonal=True, eval_scale="published").eval()
    assert (head.bilinear.factors, head.bilinear.keep_diagonal) == (4, True)
    torch.testing.assert_close(head.bilinear.mask(), torch.full((4,), 0.75**0.5))
