"""Norm, activation and pooling, by one operator where it runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from common.attention.norms import normed
from kernels import norm as kernel


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the operator run on a CPU, where it is the reference; counts its calls."""
    calls: list[int] = []

    def counted(*arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        return own(*arguments)

    own = kernel.norm_relu
    monkeypatch.setattr(kernel, "norm_relu", counted)
    monkeypatch.setattr(kernel, "runs", lambda device, dtype: True)
    return calls


def made(momentum: float | None = 0.1, track: bool = True) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(6, momentum=momentum, track_running_stats=track).double()
    nn.init.uniform_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(2)])
@pytest.mark.parametrize("momentum, track", [(0.1, True), (None, True), (0.1, False)])
def test_as_the_modules(
    momentum: float | None, track: bool, pool: nn.Module | None, training: bool, operator: list[int]
) -> None:
    norm = made(momentum, track).train(training)
    other = copy.deepcopy(norm)
    for _ in range(2):
        x = image(3, 6, 5, 4).requires_grad_()
        y, wanted = normed(x, norm, nn.ReLU(), pool), (pool or nn.Identity())(other(x).relu())
        torch.testing.assert_close(y, wanted)
        of_y = torch.randn_like(y)
        results = torch.autograd.grad(y, [x, *norm.parameters()], of_y)
        torch.testing.assert_close(results, torch.autograd.grad(wanted, [x, *other.parameters()], of_y))
    for buffer, want in zip(norm.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, want)
    assert len(operator) == 2


@pytest.mark.parametrize(
    "norm, act, pool",
    [
        (nn.GroupNorm(2, 6), nn.ReLU(), None),
        (nn.BatchNorm2d(6, affine=False), nn.ReLU(), None),
        (nn.BatchNorm2d(6), nn.GELU(), None),
        (nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2)),
        (nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        (nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),
    ],
    ids=str,
)
def test_other_modules_do_what_they_do(
    norm: nn.Module, act: nn.Module, pool: nn.Module | None, operator: list[int]
) -> None:
    x = image(2, 6, 5, 5).float()
    torch.testing.assert_close(normed(x, norm, act, pool), (pool or nn.Identity())(act(norm(x))))
    assert not operator


def test_channels_first_maps_and_single_values_are_left_to_torch(operator: list[int]) -> None:
    norm = made()
    normed(image(2, 6, 5, 5).contiguous(), norm, nn.ReLU())
    assert not operator
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        normed(image(1, 6, 1, 1), norm, nn.ReLU())
