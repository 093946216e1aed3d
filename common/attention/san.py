"""Self-attention modules (SAM), pairwise and patchwise.

Zhao, Jia, Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020, section 3.

Each module has two paths with the same result. ``reference`` is the definition, written with the operators
of :mod:`kernels.reference`; it holds several tensors with a value per pixel *and* footprint position.
``fused`` goes through the map in tiles that fit the cache, with the batch norms folded into scales and shifts.
In evaluation it never holds such a tensor whole; in training at most one, and recomputes the others. Where the
operators of :mod:`kernels` have a kernel, it calls them instead of going through tiles.

Shapes: K = kernel_size², P = H'·W' output pixels, Cw = out_channels / share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common.attention.norms import folded, update_running, uses_batch
from common.attention.tiles import (
    BatchMoments,
    Footprint,
    Grid,
    NormedFootprint,
    Reflected,
    aggregated,
    conv1x1,
    evenly,
    joined,
    merged,
    moments_of_differences,
    over,
)
from kernels import pairwise, patchwise
from kernels.footprint import same_padding
from kernels.reference import aggregation, footprint, per_channel, subtraction2

# Values of the expanded tensor in one tile: what a core's cache holds on a CPU, elsewhere what fills the device.
TILE_VALUES = {"cpu": 1 << 20}
TILE_VALUES_ELSEWHERE = 1 << 26


class SelfAttention(nn.Module):
    """What both modules share; use :class:`PairwiseAttention` or :class:`PatchwiseAttention`.

    Args:
        in_channels: channels of the input.
        rel_channels: channels in which pixels are compared.
        out_channels: channels of the output, a multiple of ``share``.
        share: how many output channels share one attention weight.
        kernel_size: side of the footprint in pixels, odd.
        stride, dilation: of the footprint, in pixels.

    Raises:
        ValueError: a size that makes no sense.
    """

    conv_w: nn.Sequential

    def __init__(
        self,
        in_channels: int,
        rel_channels: int,
        out_channels: int,
        share: int = 8,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}, expected an odd number")
        if stride < 1 or dilation < 1:
            raise ValueError(f"stride is {stride} and dilation {dilation}, expected at least 1")
        if rel_channels < 1:
            raise ValueError(f"rel_channels is {rel_channels}, expected at least 1")
        if out_channels < 1 or share < 1 or out_channels % share:
            raise ValueError(f"out_channels is {out_channels}, expected a multiple of share = {share}")
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.conv1 = nn.Conv2d(in_channels, rel_channels, 1)
        self.conv2 = nn.Conv2d(in_channels, rel_channels, 1)
        self.conv3 = nn.Conv2d(in_channels, out_channels, 1)
        self._build(rel_channels, out_channels // share)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) → (N, out_channels, H', W') with H' = (H − 1) // stride + 1."""
        y = self.fused(x) if self._can_fuse(x) else self.reference(x)
        last = x.is_contiguous(memory_format=torch.channels_last)
        return y.contiguous(memory_format=torch.channels_last) if last else y

    def reference(self, x: Tensor) -> Tensor:
        """The definition: the values under the footprint, summed with the attention weights."""
        value = self.conv3(x)
        weight = self.attention(x).to(value.dtype)
        return aggregation(value, weight, self.kernel_size, self.stride, dilation=self.dilation)

    def _build(self, rel_channels: int, weights: int) -> None:
        """Set ``conv_w``, which maps what is compared to ``weights`` weight channels."""
        raise NotImplementedError

    def attention(self, x: Tensor) -> Tensor:
        """The attention weights, (N, Cw, K, P)."""
        raise NotImplementedError

    def fused(self, x: Tensor) -> Tensor:
        """The same as :meth:`reference`, in tiles."""
        raise NotImplementedError

    def _can_fuse(self, x: Tensor) -> bool:
        """Norms of other kinds (synchronised ones) need the definition; a compiler finds its own tiles."""
        norms = (self.conv_w[0], self.conv_w[3])
        plain = all(type(norm) is nn.BatchNorm2d and norm.affine for norm in norms)
        return plain and (not torch.compiler.is_compiling() or self._runs_kernel(x))

    def _runs_kernel(self, value: Tensor) -> bool:
        """Whether :mod:`kernels` has what makes tiles of ``value`` unnecessary."""
        return False

    def _projected(self, x: Tensor) -> list[Tensor]:
        """``conv1``, ``conv2`` and ``conv3`` of ``x``.

        By one convolution, which reads ``x`` once, and once backward, unless copying the weights costs more.
        """
        layers = [self.conv1, self.conv2, self.conv3]
        if x.numel() < sum(layer.weight.numel() for layer in layers):
            return [conv1x1(x, layer.weight, layer.bias) for layer in layers]
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        return list(conv1x1(x, weight, bias).split([layer.out_channels for layer in layers], 1))

    def _at_centre(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride].contiguous()

    def _padded(self, x: Tensor) -> Tensor:
        return Reflected.apply(x.contiguous(), same_padding(self.kernel_size, self.dilation))

    @property
    def _window(self) -> tuple[int, int, int]:
        return self.kernel_size, self.stride, self.dilation

    def _tiles(self, output: Tensor, padded: list[Tensor], channels: int) -> list[Grid]:
        """Tiles of maps: some rows of ``output`` and, of each padded map, the rows under their footprints.

        Per map a grid, indexed by group of images, then from top to bottom. ``channels`` is how many values the
        expanded tensor has for a pixel and footprint position.
        """
        height, width = output.shape[2:]
        budget = TILE_VALUES.get(output.device.type, TILE_VALUES_ELSEWHERE)
        row = channels * self.kernel_size**2 * width
        rows, images = evenly(height, budget // row), evenly(len(output), budget // (row * height))
        reach = self.dilation * (self.kernel_size - 1) + 1
        spans = [(top, min(top + rows, height)) for top in range(0, height, rows)]
        under = [(top * self.stride, (bottom - 1) * self.stride + reach) for top, bottom in spans]
        return [
            [[group[:, :, first:last] for first, last in bounds] for group in maps.split(images)]
            for maps, bounds in [(output, spans), *((maps, under) for maps in padded)]
        ]


class PairwiseAttention(SelfAttention):
    """Pairwise self-attention: the weight of a pixel comes from its and the centre's difference, in value and position.

    Section 3.1, with the subtraction relation and position encoding. The weights of a footprint sum to 1.
    """

    def _build(self, rel_channels: int, weights: int) -> None:
        self.conv_w = weight_mapping(rel_channels + 2, rel_channels, weights)
        self.conv_p: Any = nn.Conv2d(2, 2, 1)

    def attention(self, x: Tensor) -> Tensor:
        first, second = self._with_position(self.conv1(x), self.conv2(x))
        difference = subtraction2(first, second, self.kernel_size, self.stride, dilation=self.dilation)
        return self.conv_w(difference).softmax(2)

    def fused(self, x: Tensor) -> Tensor:
        first, second, value = self._projected(x)
        first, second = self._with_position(first, second)
        centre, around, value = self._at_centre(first), self._padded(second), self._padded(value)
        layers: Any = self.conv_w
        norm1, _, mix, norm2, _, to_weight = layers
        count = centre[:, 0].numel() * self.kernel_size**2

        scale1, shift1 = folded(norm1, count, lambda: moments_of_differences(centre, around, *self._window))
        centre, around = per_channel(scale1) * centre + per_channel(shift1), per_channel(-scale1) * around
        if self._runs_kernel(value):
            return self._by_kernel(centre, around, value)
        centres, arounds, values = self._tiles(centre, [around, value], centre.shape[1])

        def hidden_of(centre: Tensor, around: Tensor) -> Tensor:
            difference = Footprint.apply(around, *self._window).add_(centre.unsqueeze(2))
            return conv1x1(difference.relu_().to(value.dtype), mix.weight)

        def output_of(hidden: Tensor, value: Tensor) -> Tensor:
            normed = torch.addcmul(per_channel(shift2, 3), per_channel(scale2, 3), hidden).relu_()
            weight = conv1x1(normed.to(value.dtype), to_weight.weight, to_weight.bias).softmax(2)
            return aggregated(weight, value, *self._window)

        hidden = over(hidden_of, centres, arounds) if uses_batch(norm2) else []
        scale2, shift2 = folded(norm2, count, lambda: merged(hidden))
        if hidden:
            return joined(over(output_of, hidden, values))
        return joined(over(lambda c, a, v: output_of(hidden_of(c, a), v), centres, arounds, values))

    def _runs_kernel(self, value: Tensor) -> bool:
        to_weight: Any = self.conv_w[5]
        weights, hidden = to_weight.weight.shape[:2]
        channels = self.conv3.out_channels
        return pairwise.runs(value.device, hidden + 2, hidden, weights, channels, value.dtype)

    def _by_kernel(self, centre: Tensor, around: Tensor, value: Tensor) -> Tensor:
        layers: Any = self.conv_w
        mix, norm, to_weight = layers[2], layers[3], layers[5]
        known = (None, None) if uses_batch(norm) else (norm.running_mean, norm.running_var)
        weights = (mix.weight.flatten(1), norm.weight, norm.bias, to_weight.weight.flatten(1), to_weight.bias)
        exact = torch.promote_types(value.dtype, torch.float32)
        centre, around, *parameters = (x.to(exact) for x in (centre, around, *weights))
        y, _, mean, variance = pairwise.pairwise_attention(
            centre, around, value, *parameters, *known, norm.eps, *self._window
        )
        update_running(norm, mean, variance, centre[:, 0].numel() * self.kernel_size**2)
        return y

    def _with_position(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """What is subtracted from each other: features and, as two more channels, the mapped position.

        The convolution of the position is written out, which autocast leaves alone: neighbours differ by
        less than bfloat16 resolves.
        """
        weight, bias = self.conv_p.weight, self.conv_p.bias
        position = (weight * position_map(first, weight.dtype)).sum(1) + per_channel(bias)
        position = position.expand(first.shape[0], -1, -1, -1)
        return torch.cat((first, position), 1), torch.cat((second, position), 1)


class PatchwiseAttention(SelfAttention):
    """Patchwise self-attention: one look at the centre and the whole footprint gives all its weights.

    Section 3.2, with the concatenation relation. The weights are not normalised.
    """

    def _build(self, rel_channels: int, weights: int) -> None:
        positions = self.kernel_size**2
        self.conv_w = weight_mapping(rel_channels * (positions + 1), weights, positions * weights)

    def attention(self, x: Tensor) -> Tensor:
        centre = self._at_centre(self.conv1(x))
        around = footprint(self.conv2(x), self.kernel_size, self.stride, dilation=self.dilation)
        weight = self.conv_w(torch.cat((centre, around.flatten(1, 2)), 1))
        return weight.flatten(2).unflatten(1, (-1, self.kernel_size**2))

    def fused(self, x: Tensor) -> Tensor:
        first, second, value = self._projected(x)
        centre, around, value = self._at_centre(first), self._padded(second), self._padded(value)
        layers: Any = self.conv_w
        norm1, _, mix, norm2, act, _ = layers
        rel, positions = centre.shape[1], self.kernel_size**2

        scale, shift = folded(norm1, centre[:, 0].numel(), lambda: self._concatenated_moments(centre, around))
        centre = (per_channel(scale[:rel]) * centre + per_channel(shift[:rel])).relu_()
        to_centre, to_around = (part.contiguous() for part in mix.weight.tensor_split([rel], 1))
        of_centre = conv1x1(centre.to(value.dtype), to_centre)
        scale, shift = (t[rel:].view(rel, positions) for t in (scale, shift))

        if patchwise.runs(around.device, self.kernel_size, around.dtype):
            exact = torch.promote_types(around.dtype, torch.float32)
            weights = (scale, shift, to_around.view(-1, rel, positions))
            patches = patchwise.mix_patches(around, *(w.to(exact) for w in weights), *self._window)
            return self._summed(act(norm2(patches + of_centre)), value)

        def hidden_of(of_centre: Tensor, around: Tensor) -> Tensor:
            normed = NormedFootprint.apply(around, scale, shift, *self._window)
            return conv1x1(normed.flatten(1, 2).to(value.dtype), to_around).add_(of_centre)

        hidden = joined(over(hidden_of, *self._tiles(of_centre, [around], rel)))
        return self._summed(act(norm2(hidden)), value)

    def _summed(self, hidden: Tensor, value: Tensor) -> Tensor:
        """The values of the padded map, summed with the weights that come from the mapping's hidden layer."""
        layers: Any = self.conv_w
        to_weight = layers[5]

        def output_of(hidden: Tensor, value: Tensor) -> Tensor:
            weight = conv1x1(hidden, to_weight.weight, to_weight.bias).unflatten(1, (-1, self.kernel_size**2))
            return aggregated(weight, value, *self._window)

        return joined(over(output_of, *self._tiles(hidden, [value], to_weight.in_channels)))

    def _runs_kernel(self, value: Tensor) -> bool:
        return patchwise.runs(value.device, self.kernel_size, value.dtype)

    def _concatenated_moments(self, centre: Tensor, around: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the centre's channels, then of each channel at each footprint position."""
        at_centre, at_position = (BatchMoments.apply(x) for x in (centre, around))
        for dim, side in ((2, centre.shape[2]), (3, centre.shape[3])):
            under = at_position.unfold(dim, self.stride * (side - 1) + 1, self.dilation)[..., :: self.stride]
            at_position = under.mean(-1).narrow(dim, 0, self.kernel_size)
        mean, square = torch.cat((at_centre.mean((2, 3)), at_position.flatten(1)), 1)
        return mean, square - mean.square()


def weight_mapping(in_channels: int, hidden: int, out_channels: int) -> nn.Sequential:
    """The mapping γ of the paper: norm, ReLU and linear, twice."""
    return nn.Sequential(
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_channels, hidden, 1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, out_channels, 1),
    )


def position_map(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Column and row coordinate of every pixel of ``like`` (N, C, H, W), both from −1 to 1: (1, 2, H, W)."""
    height, width = like.shape[2:]
    rows, columns = (torch.linspace(-1, 1, side, dtype=dtype, device=like.device) for side in (height, width))
    return torch.stack((columns.expand(height, width), rows.unsqueeze(1).expand(height, width))).unsqueeze(0)
