"""The reference operators against loops over NumPy arrays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kernels.reference import aggregation, footprint, pad, subtraction, subtraction2

# height, width, kernel_size, stride, padding, dilation
GEOMETRIES = [
    (5, 7, 3, 1, None, 1),
    (6, 5, 3, 2, None, 1),
    (9, 4, 3, 1, None, 2),
    (8, 11, 5, 3, None, 2),
    (7, 6, 3, 1, 0, 1),
    (4, 5, 3, 2, 3, 1),
    (6, 5, 2, 1, None, 1),
    (7, 7, 4, 2, None, 1),
    (4, 3, 1, 2, None, 1),
    (3, 4, 7, 1, None, 1),
    (2, 3, 7, 1, None, 2),
    (1, 4, 7, 1, None, 1),
    (1, 1, 7, 1, None, 1),
]
PAD_MODES = ["reflect", "zero"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def looped(geometry: tuple, pad_mode: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``a`` at the footprint's centre (N, C, P) and ``b`` under the footprint (N, C, K, P), pixel by pixel."""
    height, width, k, stride, padding, dilation = geometry
    p = (dilation * (k - 1) + 1) // 2 if padding is None else padding
    mode = {"reflect": "reflect", "zero": "constant"}[pad_mode]
    a, b = (np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)), mode=mode) for x in (a, b))
    tops = range(0, height + 2 * p - dilation * (k - 1), stride)
    lefts = range(0, width + 2 * p - dilation * (k - 1), stride)
    centres, footprints = [], []
    for top, left in itertools.product(tops, lefts):
        middle = dilation * ((k - 1) // 2)
        centres.append(a[:, :, top + middle, left + middle])
        footprints.append(
            np.stack(
                [b[:, :, top + dilation * u, left + dilation * v] for u in range(k) for v in range(k)], axis=2
            )
        )
    return np.stack(centres, axis=2), np.stack(footprints, axis=3)


@pytest.mark.parametrize("pad_mode", PAD_MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_subtraction_is_the_loop(geometry: tuple, pad_mode: str) -> None:
    height, width, *window = geometry
    a, b = random(2, 3, height, width), random(2, 3, height, width, seed=1)
    centre, around = looped(geometry, pad_mode, a.numpy(), b.numpy())
    expected = torch.from_numpy(centre[:, :, None] - around)
    torch.testing.assert_close(subtraction2(a, b, *window, pad_mode), expected, rtol=0, atol=1e-14)
    centre, around = looped(geometry, pad_mode, a.numpy(), a.numpy())
    expected = torch.from_numpy(centre[:, :, None] - around)
    torch.testing.assert_close(subtraction(a, *window, pad_mode), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("pad_mode", PAD_MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_aggregation_is_the_loop(geometry: tuple, pad_mode: str) -> None:
    height, width, *window = geometry
    value = random(2, 6, height, width)
    _, around = looped(geometry, pad_mode, value.numpy(), value.numpy())
    weight = np.random.default_rng(1).standard_normal((2, 3, *around.shape[2:]))
    expected = np.zeros((2, 6, around.shape[3]))
    for channel in range(6):
        expected[:, channel] = (weight[:, channel % 3] * around[:, channel]).sum(1)
    output = aggregation(value, torch.from_numpy(weight), *window, pad_mode)
    torch.testing.assert_close(output.flatten(2), torch.from_numpy(expected), rtol=0, atol=1e-13)
    stride = geometry[3]
    if geometry[2] % 2 and geometry[4] is None:
        assert output.shape[2:] == ((height - 1) // stride + 1, (width - 1) // stride + 1)


@pytest.mark.parametrize("pad_mode", PAD_MODES)
@pytest.mark.parametrize("geometry", [(4, 5, 3, 1, None, 1), (5, 4, 3, 2, None, 2), (2, 3, 5, 1, None, 1)])
def test_gradients(geometry: tuple, pad_mode: str) -> None:
    height, width, *window = geometry
    a, b = (random(1, 2, height, width, seed=seed).requires_grad_() for seed in (0, 1))
    weight = random(*subtraction(a, *window, pad_mode).shape)[:, :1].requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: subtraction2(a, b, *window, pad_mode), (a, b))
    assert torch.autograd.gradcheck(lambda a: subtraction(a, *window, pad_mode), (a,))
    assert torch.autograd.gradcheck(lambda v, w: aggregation(v, w, *window, pad_mode), (a, weight))
    assert torch.autograd.gradgradcheck(lambda v, w: aggregation(v, w, *window, pad_mode), (a, weight))


def test_reflection_repeats() -> None:
    row = torch.arange(3.0).view(1, 1, 1, 3)
    assert pad(row, 5)[0, 0, 0].tolist() == [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1]
    assert pad(torch.ones(1, 1, 1, 1), 4).shape == (1, 1, 9, 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_follows_the_input(dtype: torch.dtype) -> None:
    value, weight = random(2, 4, 6, 5), random(2, 2, 9, 30)
    exact = aggregation(value, weight, 3)
    output = aggregation(value.to(dtype), weight.to(dtype), 3)
    assert output.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), exact, rtol=tolerance, atol=9 * tolerance)
    assert subtraction(value.to(dtype), 3).dtype == dtype


def test_memory_layout_does_not_matter() -> None:
    value, weight = random(2, 4, 6, 5), random(2, 2, 9, 30)
    expected = aggregation(value, weight, 3)
    strided = value.transpose(2, 3).contiguous().transpose(2, 3)
    for layout in (value.to(memory_format=torch.channels_last), strided):
        assert torch.equal(aggregation(layout, weight, 3), expected)
        assert torch.equal(subtraction(layout, 3), subtraction(value, 3))


def test_empty_batch() -> None:
    assert subtraction(torch.zeros(0, 4, 6, 5), 3).shape == (0, 4, 9, 30)
    assert aggregation(torch.zeros(0, 4, 6, 5), torch.zeros(0, 2, 9, 30), 3).shape == (0, 4, 6, 5)
    assert footprint(torch.zeros(0, 4, 6, 5), 3, stride=2).shape == (0, 4, 9, 3, 3)


X = torch.zeros(2, 4, 6, 5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: subtraction(X[0], 3), r"a has shape \(4, 6, 5\), expected \(N, C, H, W\)"),
        (lambda: subtraction(X[:, :, :0], 3), r"a has shape \(2, 4, 0, 5\)"),
        (lambda: subtraction(X, 0), "kernel_size is 0"),
        (lambda: subtraction(X, 3, 0), "stride is 0"),
        (lambda: subtraction(X, 3, dilation=0), "dilation is 0"),
        (lambda: subtraction(X, 3, padding=-1), "padding is -1"),
        (lambda: subtraction(X, 3, pad_mode="edge"), "pad_mode is 'edge'"),
        (lambda: subtraction(X, 7, padding=0), r"\(2, 4, 6, 5\): too small for kernel_size 7"),
        (lambda: subtraction2(X, X[:, :2], 3), r"b has shape \(2, 2, 6, 5\), expected \(2, 4, 6, 5\)"),
        (lambda: subtraction2(X, X.double(), 3), r"b, shape \(2, 4, 6, 5\), is torch.float64"),
        (lambda: subtraction2(X, X.to("meta"), 3), r"b, shape .* on meta, expected .* on cpu as a"),
        (lambda: aggregation(X[0], torch.zeros(2, 2, 9, 30), 3), r"value has shape \(4, 6, 5\)"),
        (lambda: aggregation(X, torch.zeros(2, 2, 9, 30).double(), 3), "weight, shape .* is torch.float64"),
        (
            lambda: aggregation(X, torch.zeros(2, 2, 9, 29), 3),
            r"weight has shape \(2, 2, 9, 29\), .* \(2, 9, 30\)",
        ),
        (lambda: aggregation(X, torch.zeros(2, 2, 25, 30), 3), r"weight has shape \(2, 2, 25, 30\)"),
        (lambda: aggregation(X, torch.zeros(1, 2, 9, 30), 3), r"weight has shape \(1, 2, 9, 30\)"),
        (lambda: aggregation(X, torch.zeros(2, 9, 30), 3), r"weight has shape \(2, 9, 30\)"),
        (lambda: aggregation(X, torch.zeros(2, 3, 9, 30), 3), "its 3 channels do not divide the 4 of value"),
        (lambda: aggregation(X, torch.zeros(2, 0, 9, 30), 3), "its 0 channels do not divide"),
    ],
)
def test_wrong_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
