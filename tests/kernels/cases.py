"""Inputs of the operators, for the tests on a CPU and for those on a GPU (which have torch, numpy and pytest alone)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of a result, relative to its largest value: what rounding the inputs and results to the type explains."""


class Geometry(NamedTuple):
    """Sizes of the output and the footprint; ``spare`` rows and columns at the end of the map are in none."""

    height: int
    width: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    spare: int = 0

    @property
    def window(self) -> tuple[int, int, int]:
        return self.kernel_size, self.stride, self.dilation

    @property
    def padded(self) -> tuple[int, int]:
        reach = self.dilation * (self.kernel_size - 1) + 1
        return tuple((side - 1) * self.stride + reach + self.spare for side in (self.height, self.width))  # type: ignore[return-value]


class Module(NamedTuple):
    """Channels of a pairwise attention module."""

    inputs: int
    hidden: int
    weights: int
    share: int = 8


SAN_STAGES = [Module(6, 4, 2), Module(18, 16, 8), Module(34, 32, 16), Module(66, 64, 32)]
"""The stages of the published networks that have kernels."""
ON_TENSOR_CORES = [*SAN_STAGES[1:], Module(20, 32, 8, 4), Module(32, 48, 16)]
"""What tensor cores take, in bfloat16."""
SMALL = [Module(4, 2, 1), Module(5, 6, 3, 2), Module(9, 12, 4, 1)]
"""As a test's or a demonstration's networks may have."""

GEOMETRIES = [
    Geometry(5, 7, 3),
    Geometry(6, 11, 7),
    Geometry(4, 3, 3, stride=2),
    Geometry(4, 5, 3, stride=2, spare=1),
    Geometry(5, 4, 3, dilation=2),
    Geometry(3, 3, 5, stride=3, dilation=2),
    Geometry(1, 1, 7),
    Geometry(2, 9, 1),
    Geometry(2, 3, 3, stride=4),  # footprints that do not touch: pixels that none of them sees
]


class Pairwise(NamedTuple):
    """Arguments of ``pairwise_attention`` and a gradient of its result."""

    tensors: list[Tensor]
    statistics: list[Tensor | None]
    rest: tuple
    of_y: Tensor

    def on(self, device: str) -> Pairwise:
        return Pairwise(
            [x.to(device) for x in self.tensors],
            [x if x is None else x.to(device) for x in self.statistics],
            self.rest,
            self.of_y.to(device),
        )

    def exact(self) -> Pairwise:
        """In float64 on the CPU."""
        tensors = [x.cpu().double().requires_grad_() for x in self.tensors]
        statistics = [x if x is None else x.cpu().double() for x in self.statistics]
        return Pairwise(tensors, statistics, self.rest, self.of_y.cpu().double())


def pairwise_case(
    module: Module, geometry: Geometry, value: torch.dtype, training: bool = True, images: int = 2
) -> Pairwise:
    """Random arguments of the sizes that a trained network's have; weights of norms and biases are random too."""
    inputs, hidden, weights, share = module
    real = torch.promote_types(value, torch.float32)
    generator = torch.Generator().manual_seed(hidden + 7 * geometry.height)

    def random(*shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + around
        return x.to(real)

    maps = (geometry.height, geometry.width)
    tensors = [
        random(images, inputs, *maps),
        random(images, inputs, *geometry.padded),
        random(images, share * weights, *geometry.padded).to(value),
        random(hidden, inputs, scale=inputs**-0.5),
        random(hidden, scale=0.3, around=1),
        random(hidden),
        random(weights, hidden, scale=hidden**-0.5),
        random(weights),
    ]
    statistics = [None, None] if training else [random(hidden, scale=0.1), random(hidden).abs() + 0.5]
    of_y = random(images, share * weights, *maps).to(value)
    return Pairwise(tensors, statistics, (1e-5, *geometry.window), of_y)


def coarse(case: Pairwise) -> Pairwise:
    """The case with what is compared in steps of 1/8 and ``mix`` in bfloat16.

    Rounding then changes nothing, and puts no value on the other side of a ReLU, whose gradient is all or nothing.
    """
    centre, around, value, mix, *rest = case.tensors
    centre, around = ((8 * x).round() / 8 for x in (centre, around))
    return case._replace(tensors=[centre, around, value, mix.bfloat16().to(mix.dtype), *rest])


def san_case(geometry: Geometry, dtype: torch.dtype, images: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Two padded maps of six channels, and aggregation weights of three channels for them."""
    generator = torch.Generator().manual_seed(geometry.width)
    maps = torch.randn(2, images, 6, *geometry.padded, generator=generator).to(dtype)
    pixels = geometry.height * geometry.width
    weight = torch.randn(images, 3, geometry.kernel_size**2, pixels, generator=generator).to(dtype)
    return maps[0], maps[1], weight


def patches_case(geometry: Geometry, dtype: torch.dtype, outputs: int, inputs: int = 5) -> list[Tensor]:
    """A padded map, scale, shift and mix, and a gradient."""
    generator = torch.Generator().manual_seed(outputs)
    sides = (geometry.height, geometry.width)
    footprints = (inputs, geometry.kernel_size**2)
    shapes = [
        (2, inputs, *geometry.padded),
        footprints,
        footprints,
        (outputs, *footprints),
        (2, outputs, *sides),
    ]
    x, scale, shift, mix, of_h = (torch.randn(shape, generator=generator) for shape in shapes)
    real = torch.promote_types(dtype, torch.float32)
    weights = [scale, shift, mix * footprints[0] ** -0.5 / geometry.kernel_size]
    return [x.to(dtype), *(t.to(real) for t in weights), of_h.to(dtype)]


def norm_case(
    shape: tuple[int, int, int, int], window: int, dtype: torch.dtype, training: bool = True
) -> tuple[list[Tensor], list[Tensor | None], Tensor]:
    """A channels-last map, gamma and beta; mean and variance; a gradient."""
    generator = torch.Generator().manual_seed(shape[1])
    images, channels, height, width = shape
    real = torch.promote_types(dtype, torch.float32)
    x = 2 * torch.randn(shape, generator=generator) + 3
    gamma, beta, mean, variance = torch.randn(4, channels, generator=generator).to(real)
    of_y = torch.randn(images, channels, height // window, width // window, generator=generator)
    x, of_y = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, of_y))
    return [x, gamma, beta], [None, None] if training else [mean, variance.abs() + 0.5], of_y


NORMED = [
    # shape, window
    ((2, 16, 6, 8), 1),
    ((2, 64, 6, 8), 2),
    ((3, 5, 7, 5), 2),  # a channel at a time, and borders that no window has
    ((1, 48, 3, 9), 2),  # columns that are no power of two
    ((2, 24, 1, 1), 1),
    ((1, 3, 7, 9), 3),
    ((1, 2056, 2, 3), 1),  # more channels than a block has
]


def transform_case(sizes: tuple, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A map, P and Q with rows that sum to 1, and a gradient: see TRANSFORMS."""
    images, groups, channels, cells, sides = sizes
    generator = torch.Generator().manual_seed(channels)
    maps = [
        torch.randn(images, channels, cells[0] * sides[0], cells[1] * sides[1], generator=generator)
        for _ in "xy"
    ]
    real = torch.promote_types(dtype, torch.float32)
    p, q = (
        torch.randn(images, groups, side, side, generator=generator).softmax(-1).to(real) for side in sides
    )
    return maps[0].to(dtype), p, q, maps[1].to(dtype)


TRANSFORMS = [
    # images, groups, channels, (t, u), (rows, columns) of P and Q
    (2, 2, 6, (2, 1), (3, 4)),
    (1, 4, 8, (2, 2), (7, 7)),
    (3, 1, 5, (1, 3), (2, 2)),
    (2, 1, 70, (2, 2), (3, 3)),  # more matrices than threads in a block
]


def steps(x: Tensor) -> list[int]:
    """The strides that say anything."""
    return [stride for size, stride in zip(x.shape, x.stride()) if size > 1]


def assert_close(
    result: Tensor, exact: Tensor, dtype: torch.dtype, name: str, like: Tensor | None = None
) -> None:
    """``result`` is the float64 ``exact`` but for the rounding of ``dtype``, relative to the largest of ``like``."""
    assert result.shape == exact.shape, name
    if exact.numel():
        worst = (
            (result.cpu().double() - exact).abs().max()
            / (exact if like is None else like).abs().max().clamp_min(1)
        ).item()
        assert worst <= TOLERANCES[dtype], f"{name}: {worst:.1e} of the largest value"
