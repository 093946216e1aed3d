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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernels import pairwise, patchwise, san
from kernels.differences import difference_moments
from kernels.footprint import output_side, same_padding
from kernels.reference import aggregation, footprint, pad, reflected, subtraction2

Grid = list[list[Tensor]]

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
        return self.fused(x) if self._can_fuse(x) else self.reference(x)

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
            return [layer(x) for layer in layers]
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        return list(F.conv2d(x, weight, bias).split([layer.out_channels for layer in layers], 1))

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
        rows, images = min(max(budget // row, 1), height), max(budget // (row * height), 1)
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

        scale1, shift1 = folded(norm1, count, lambda: difference_moments(centre, around, *self._window))
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
        scale2, shift2 = folded(norm2, count, lambda: merged(over(moments, hidden)))
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
        if norm.training and norm.track_running_stats:
            count = centre[:, 0].numel() * self.kernel_size**2
            update_running(norm, mean, variance * (count / (count - 1)))
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
        of_centre = conv1x1(centre.to(value.dtype), mix.weight[:, :rel])
        scale, shift = (t[rel:].view(rel, positions, 1, 1) for t in (scale, shift))

        if patchwise.runs(around.device, self.kernel_size, around.dtype):
            exact = torch.promote_types(around.dtype, torch.float32)
            weights = (scale.flatten(1), shift.flatten(1), mix.weight[:, rel:].reshape(-1, rel, positions))
            patches = patchwise.mix_patches(around, *(w.to(exact) for w in weights), *self._window)
            return self._summed(act(norm2(patches + of_centre)), value)

        def hidden_of(of_centre: Tensor, around: Tensor) -> Tensor:
            normed = torch.addcmul(shift, scale, Footprint.apply(around, *self._window)).relu_()
            return conv1x1(normed.flatten(1, 2).to(value.dtype), mix.weight[:, rel:]).add_(of_centre)

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
        centre, around = centre.double(), around.double()
        at_centre = torch.stack((centre, centre.square())).mean((1, 3, 4))
        at_position = torch.stack((around.mean(0), around.square().mean(0)))
        for dim, side in ((2, centre.shape[2]), (3, centre.shape[3])):
            under = at_position.unfold(dim, self.stride * (side - 1) + 1, self.dilation)[..., :: self.stride]
            at_position = under.mean(-1).narrow(dim, 0, self.kernel_size)
        mean, square = torch.cat((at_centre, at_position.flatten(1)), 1)
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


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1×1 convolution over any number of trailing dimensions, (n, c, …) → (n, o, …)."""
    return F.conv2d(x.flatten(3), weight, bias).unflatten(3, x.shape[3:])


def per_channel(x: Tensor, trailing: int = 2) -> Tensor:
    """(C,) → (C, 1, …) with ``trailing`` ones."""
    return x.view(-1, *[1] * trailing)


def shifted(padded: Tensor, kernel_size: int, stride: int, dilation: int) -> list[Tensor]:
    """Per footprint position the padded map as every output pixel sees it: K views of shape (n, C, h, w)."""
    height, width = (output_side(side, kernel_size, stride, 0, dilation) for side in padded.shape[2:])
    offsets = [(dilation * u, dilation * v) for u in range(kernel_size) for v in range(kernel_size)]
    rows, columns = stride * (height - 1) + 1, stride * (width - 1) + 1
    return [padded[:, :, u : u + rows : stride, v : v + columns : stride] for u, v in offsets]


class Reflected(torch.autograd.Function):
    """:func:`kernels.reference.pad` of a map, with a backward pass that folds the borders back, a strip at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: int) -> Tensor:
        ctx.padding = padding
        return pad(x, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        for dim in (2, 3):
            grad = folded_back(grad, dim, ctx.padding)
        return grad, None


def folded_back(grad: Tensor, dim: int, padding: int) -> Tensor:
    """What a map's gradient along ``dim`` is, given that of the map with ``padding`` reflected pixels on both sides."""
    side = grad.shape[dim] - 2 * padding
    if padding >= side:  # pixels come more than once on a side
        once = grad.new_zeros((*grad.shape[:dim], side, *grad.shape[dim + 1 :]))
        return once.index_add_(dim, reflected(side, padding, grad.device), grad)
    inside = grad.narrow(dim, padding, side).clone()
    inside.narrow(dim, 1, padding).add_(grad.narrow(dim, 0, padding).flip(dim))
    inside.narrow(dim, side - 1 - padding, padding).add_(grad.narrow(dim, padding + side, padding).flip(dim))
    return inside


class Footprint(torch.autograd.Function):
    """:func:`kernels.reference.footprint` of a padded map, with a backward pass without a map per position."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, *window: int) -> Tensor:
        ctx.shape, ctx.window = padded.shape, window
        return torch.stack(shifted(padded, *window), 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_padded = grad.new_zeros(ctx.shape)
        for view, at_position in zip(shifted(of_padded, *ctx.window), grad.unbind(2)):
            view.add_(at_position)
        return of_padded, None, None, None


class Aggregation(torch.autograd.Function):
    """:func:`kernels.reference.aggregation` of a padded map (n, Cv, …), weights (n, Cw, K, h, w); expands nothing."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, padded: Tensor, *window: int) -> Tensor:
        ctx.save_for_backward(weight, padded)
        ctx.window = window
        values, weights = grouped(padded, weight.shape[1], window), weight.unsqueeze(1).unbind(3)
        total = weights[0] * values[0]
        for at_position, value in zip(weights[1:], values[1:]):
            total.addcmul_(at_position, value)
        return total.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, padded = ctx.saved_tensors
        grad = grad.unflatten(1, (-1, weight.shape[1]))
        values = grouped(padded, weight.shape[1], ctx.window)
        of_weight = torch.stack([(grad * value).sum(1) for value in values], 2)
        of_padded = torch.zeros_like(padded)
        for view, at_position in zip(
            grouped(of_padded, weight.shape[1], ctx.window), weight.unsqueeze(1).unbind(3)
        ):
            view.addcmul_(at_position, grad)
        return of_weight, of_padded, None, None, None


def grouped(padded: Tensor, weight_channels: int, window: tuple[int, ...]) -> list[Tensor]:
    """:func:`shifted` views with the channels that share weights apart: (n, share, Cw, h, w)."""
    return [view.unflatten(1, (-1, weight_channels)) for view in shifted(padded, *window)]


def aggregated(weight: Tensor, padded: Tensor, *window: int) -> Tensor:
    """Aggregation of the dtype of ``padded``, summed in float32 if that is finer."""
    if san.runs(padded.device, padded.dtype):
        return san.padded_aggregation(padded, weight.flatten(3).to(padded.dtype), *window)
    exact = torch.promote_types(padded.dtype, torch.float32)
    return Aggregation.apply(weight.to(exact), padded.to(exact), *window).to(padded.dtype)


def over(function: Callable[..., Tensor], *grids: Grid) -> Grid:
    """``function`` of every tile; for the backward pass only its arguments are kept."""
    if torch.is_grad_enabled():
        function = recomputed(function)
    return [[function(*tiles) for tiles in zip(*rows)] for rows in zip(*grids)]


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function``, run again in the backward pass."""
    return lambda *tiles: checkpoint(function, *tiles, use_reentrant=False, preserve_rng_state=False)


def joined(tiles: Grid) -> Tensor:
    """The map from its tiles."""
    return torch.cat([torch.cat(group, 2) for group in tiles])


def uses_batch(norm: nn.BatchNorm2d) -> bool:
    """Whether ``norm`` takes its statistics from the batch."""
    return norm.training or norm.running_mean is None


def folded(
    norm: Any, count: int, batch_moments: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """``norm`` as a scale and shift per channel, of its parameters' dtype or float32 if that is finer.

    In training from ``batch_moments()``, the mean and biased variance over ``count`` samples, which
    also go into the running statistics by torch's rules.
    """
    if uses_batch(norm):
        mean, variance = batch_moments()
        if norm.training and norm.track_running_stats:
            update_running(norm, mean, variance * (count / (count - 1)))
    else:
        mean, variance = norm.running_mean, norm.running_var
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return scale.to(dtype), (norm.bias - mean * scale).to(dtype)


def update_running(norm: Any, mean: Tensor, unbiased_variance: Tensor) -> None:
    """The running statistics of ``norm`` after a batch."""
    norm.num_batches_tracked.add_(1)  # torch.compile returns it in place of the result when it is `+= 1`
    momentum = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased_variance)):
        running.mul_(1 - momentum).add_((batch.detach() * momentum).to(running.dtype))


def moments(x: Tensor) -> Tensor:
    """(n, C, …) → (3, C): number of samples, mean and biased variance per channel."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
    count = x[:, 0].numel()
    mean = x.sum((0, 2)) / count
    variance = (x - mean.unsqueeze(1)).square().sum((0, 2)) / count
    return torch.stack((torch.full_like(mean, count), mean, variance))


def merged(tiles: Grid) -> tuple[Tensor, Tensor]:
    """Mean and variance over all samples from the :func:`moments` of tiles."""
    count, means, variances = torch.stack([tile for group in tiles for tile in group], 1)
    share = count / count.sum(0)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)
