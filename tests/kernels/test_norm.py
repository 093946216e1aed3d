"""Batch norm, ReLU and pooling: the operator, and its CUDA source run on the CPU (see test_emulated.py)."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from kernels import gradients, norm, reference, runtime
from tests.kernels import emulator
from tests.kernels.cases import NORMED, TOLERANCES, assert_close, norm_case, steps

pytestmark = pytest.mark.xdist_group("emulator")
EPS = 1e-5


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "launch", emulator.launch)


@pytest.mark.parametrize("training", [True, False])
def test_the_reference_is_torch_s_modules(training: bool) -> None:
    (x, gamma, beta), (mean, variance), _ = norm_case((3, 5, 7, 6), 2, torch.float64, training)
    y, found_mean, found_variance = reference.norm_relu(x, gamma, beta, mean, variance, EPS, 2)
    if training:
        mean, variance = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    want = F.batch_norm(x, mean, variance, gamma, beta, training, momentum=1.0, eps=EPS)
    torch.testing.assert_close(y, F.max_pool2d(F.relu(want), 2))
    assert mean is not None
    assert variance is not None
    torch.testing.assert_close(found_mean, mean)
    count = x[:, 0].numel()
    torch.testing.assert_close(found_variance * (count / (count - 1) if training else 1), variance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape, window", NORMED, ids=str)
def test_kernels(
    shape: tuple, window: int, dtype: torch.dtype, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "ITEMS", 1)  # as many parts as a large map has
    monkeypatch.setattr(norm, "PARTS", 7)
    tensors, statistics, of_y = norm_case(shape, window, dtype, training)
    results = norm.norm_relu_by_kernels(*tensors, *statistics, EPS, window)
    of_inputs = norm.gradients_by_kernels(of_y, *tensors, *results[1:], training, EPS, window)

    exact = [t.double().requires_grad_() for t in tensors]
    given = [t if t is None else t.double() for t in statistics]
    wanted = reference.norm_relu(*exact, *given, EPS, window)
    real = tensors[1].dtype
    for name, result, want in zip(("y", "mean", "variance"), results, wanted):
        assert_close(result, want.detach(), dtype if name == "y" else real, name)
    of_exact = torch.autograd.grad(wanted[0], exact, of_y.double())
    for name, result, want in zip(("x", "gamma", "beta"), of_inputs, of_exact):
        assert_close(result, want, dtype if name == "x" else real, f"gradient of {name}")

    with FakeTensorMode() as mode:  # where they lie is what a compiler is told
        fake = [mode.from_tensor(t) for t in (*tensors, of_y)]
        given = [t if t is None else mode.from_tensor(t) for t in statistics]
        told = norm.norm_relu(*fake[:3], *given, EPS, window)
        of_told = norm.norm_relu_gradients(fake[3], *fake[:3], *told[1:], training, EPS, window)
    for result, expected in zip((*results, *of_inputs), (*told, *of_told), strict=True):
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        assert steps(result) == steps(expected)


def test_the_order_of_threads_and_other_layouts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, gamma, beta), _, of_y = norm_case((2, 16, 6, 8), 2, torch.float32)

    def results(x: torch.Tensor, of_y: torch.Tensor) -> list[torch.Tensor]:
        y, *moments = norm.norm_relu_by_kernels(x, gamma, beta, None, None, EPS, 2)
        return [y, *moments, *norm.gradients_by_kernels(of_y, x, gamma, beta, *moments, True, EPS, 2)]

    wanted = results(x, of_y)
    of_expanded = of_y[:, :, :1, :1].expand_as(of_y)
    assert all(map(torch.equal, results(x, of_expanded.clone()), results(x, of_expanded)))
    unaligned = torch.empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(x)
    for other in (x.contiguous(), unaligned):  # an address that is no multiple of 16: a channel at a time
        for result, want in zip(results(other, of_y), wanted):
            torch.testing.assert_close(result, want)
    monkeypatch.setattr(emulator, "BACKWARDS", True)
    assert all(map(torch.equal, results(x, of_y), wanted))


def test_a_large_mean_does_not_cancel_the_variance() -> None:
    x = (torch.randn(2, 4, 30, 30) * 1e-2 + 1e3).contiguous(memory_format=torch.channels_last)
    _, mean, variance = norm.norm_relu_by_kernels(x, torch.ones(4), torch.zeros(4), None, None, EPS, 1)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.double().var((0, 2, 3), correction=0).float(), rtol=1e-4, atol=0)


def test_of_equal_values_the_first_has_the_gradient_and_a_nan_stays() -> None:
    x = torch.ones(1, 2, 2, 2)
    x[0, 1, 1, 0] = torch.nan
    arguments = (x, torch.ones(2), torch.zeros(2), torch.zeros(2), torch.ones(2))
    for function in (reference.norm_relu, norm.norm_relu_by_kernels):
        y = function(*arguments, 0.0, 2)[0]
        assert y[0, 0, 0, 0] == 1
        assert y[0, 1, 0, 0].isnan()
    for function in (gradients.norm_relu, norm.gradients_by_kernels):
        of_x = function(torch.ones(1, 2, 1, 1), *arguments, False, 0.0, 2)[0]
        assert of_x[0, 0].tolist() == [[1, 0], [0, 0]]


def test_an_empty_batch() -> None:
    tensors, statistics, of_y = norm_case((0, 4, 3, 3), 1, torch.float32, False)
    y, *moments = norm.norm_relu_by_kernels(*tensors, *statistics, EPS, 1)
    assert y.shape == (0, 4, 3, 3)
    of_x, of_gamma, of_beta = norm.gradients_by_kernels(of_y, *tensors, *moments, False, EPS, 1)
    assert of_x.shape == y.shape
    assert not of_gamma.any()
    assert not of_beta.any()


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_a_good_citizen(training: bool, window: int) -> None:
    tensors, statistics, _ = norm_case((2, 3, 4, 5), window, torch.float64, training)
    tensors = [t.requires_grad_() for t in tensors]
    rest = (*statistics, EPS, window)
    # Only y has a gradient: torch's own check of gradients would ask for those of all results.
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(norm.norm_relu, (*tensors, *rest), test_utils=utilities)
    assert torch.autograd.gradcheck(lambda *inputs: norm.norm_relu(*inputs, *rest)[0], tuple(tensors))


@pytest.mark.parametrize(
    "x, gamma, window, message",
    [
        (torch.ones(2, 4, 3), torch.ones(4), 1, r"x has shape \(2, 4, 3\)"),
        (torch.ones(2, 4, 1, 5), torch.ones(4), 2, r"x has shape \(2, 4, 1, 5\), .* sides of at least 2"),
        (torch.ones(2, 4, 3, 3), torch.ones(3), 1, r"gamma, shape \(3,\), .* expected \(4,\), torch.float32"),
        (torch.ones(2, 4, 3, 3), torch.ones(4).half(), 1, "gamma, .* is torch.float16"),
        (torch.ones(0, 4, 3, 3), torch.ones(4), 1, "no pixel to take statistics of"),
    ],
)
def test_arguments_that_make_no_sense(
    x: torch.Tensor, gamma: torch.Tensor, window: int, message: str
) -> None:
    for function in (reference.norm_relu, norm.norm_relu_by_kernels):
        with pytest.raises(ValueError, match=message):
            function(x, gamma, torch.ones(4), None, None, EPS, window)
