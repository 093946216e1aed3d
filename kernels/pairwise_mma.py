"""Pairwise self-attention for bfloat16 values on tensor cores: starts the kernels of ``cuda/pairwise_mma*.cu``.

Maps have channels last there, and so do the results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import runtime
from kernels.footprint import Footprint
from kernels.runtime import Kernel

SOURCE, GRADIENTS = "pairwise_mma.cu", "pairwise_mma_gradients.cu"
PIXELS_OF_A_WARP, WARPS_OF_A_BLOCK = 16, 4
# What registers hold beside the rest: tiles of 8 weights whose channels are summed, and 16 × 8 tiles of dL/dmix.
WEIGHT_TILES, MIX_TILES = 2, 12
MOST_HIDDEN = 64


class Plan(NamedTuple):
    """The compile-time numbers of the kernels."""

    inputs: int
    hidden: int
    weights: int
    share: int

    @property
    def weight_slices(self) -> int:
        """Warps that share the weights of 16 pixels."""
        return max(1, self.weights // 8 // WEIGHT_TILES)

    @property
    def mix_slices(self) -> int:
        """Warps that share the channels of 16 pixels, where dL/dmix is summed."""
        return -(-self.padded_inputs // 8 // max(1, MIX_TILES // (self.hidden // 16)))

    @property
    def padded_inputs(self) -> int:
        """Channels of the compared maps in memory."""
        return -(-self.inputs // 8) * 8

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        names = ("IN", "HIDDEN", "WEIGHTS", "SHARE", "WEIGHT_SLICES", "MIX_SLICES", "WARPS")
        return tuple(
            zip(names, map(str, (*self, self.weight_slices, self.mix_slices, WARPS_OF_A_BLOCK)), strict=True)
        )

    def tiles(self, pixels: int) -> int:
        """Groups of 16 pixels, filled up to whole blocks."""
        return -(-pixels // (PIXELS_OF_A_WARP * WARPS_OF_A_BLOCK)) * WARPS_OF_A_BLOCK

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: fragments of 256 bytes, for 16 rows and 8 columns of a matrix, and vectors."""
        in_tiles, hidden_tiles, weight_tiles = self.padded_inputs // 8, self.hidden // 8, self.weights // 8
        mix = -(-in_tiles // 2) * hidden_tiles + self.hidden // 16 * in_tiles
        to_weight = self.hidden // 16 * weight_tiles + -(-weight_tiles // 2) * hidden_tiles
        return 256 * (mix + to_weight) + 4 * (4 * self.hidden + self.weights)


def plan(inputs: int, hidden: int, weights: int, channels: int, value: torch.dtype) -> Plan | None:
    """The plan for a module of these channels, if tensor cores take it."""
    share = channels // weights
    fits = (
        hidden % 16 == 0
        and hidden <= MOST_HIDDEN
        and weights % 8 == 0
        and share in (4, 8)
        and inputs % 2 == 0
    )
    whole = weights // 8 <= WEIGHT_TILES or weights // 8 % WEIGHT_TILES == 0
    return Plan(inputs, hidden, weights, share) if value == torch.bfloat16 and fits and whole else None


class Passes:
    """The kernels over one set of maps; see :class:`kernels.pairwise_simt.Passes`."""

    def __init__(
        self, how: Plan, maps: Footprint, centre: Tensor, around: Tensor, value: Tensor, mix: Tensor
    ) -> None:
        self.how, self.maps, self.mix = how, maps, mix
        self.images, self.sides, self.padded_sides = centre.shape[0], centre.shape[2:], around.shape[2:]
        self.centre, self.around = self._filled(centre), self._filled(around)
        self.value = self._sorted(value)
        self.pixels = centre[:, 0].numel()

    def hidden_moments(self) -> Tensor:
        """Σ h and Σ h² over all pairs, (2, hidden) in float64."""
        partial = self.mix.new_empty((self.how.tiles(self.pixels), 2, self.how.hidden), dtype=torch.float64)
        self._launch("hidden_moments", self.pixels, 1, self.centre, self.around, self.mix, partial)
        return partial.sum(0)

    def attend(self, layers: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The results y and log_sum, with the second norm's scale and shift, ``to_weight`` and ``bias``."""
        channels = self.how.share * self.how.weights
        y = self.value.new_empty((self.images, *self.sides, channels))
        log_sum = self.centre.new_empty((self.images, *self.sides, self.how.weights))
        maps = (self.centre, self.around, self.value, self.mix)
        self._launch("attend", self.pixels, self.how.weight_slices, *maps, *layers, y, log_sum)
        return _channels_first(y), _channels_first(log_sum)

    def gradient_sums(
        self, layers: tuple[Tensor, ...], log_sum: Tensor, of_y: Tensor, of_y_times_y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Σ of_norm and Σ of_norm · h, (2, hidden) in float64; dL/dbias and dL/dto_weight."""
        self.of_y = self._sorted(of_y)
        both = torch.stack((log_sum, of_y_times_y), 2).unflatten(1, (-1, 2))
        # (N, H, W, pairs of weights, which of both, weight)
        self.softmax = both.permute(0, 4, 5, 1, 3, 2).contiguous()
        tiles = self.how.tiles(self.pixels)
        norm_sums = self.mix.new_empty((tiles, 2, self.how.hidden))
        of_bias = self.mix.new_empty((tiles, self.how.weights))
        of_to_weight = self.mix.new_empty((tiles, self.how.hidden, self.how.weights))
        self.layers = layers
        self._launch("gradient_sums", self.pixels, 1, *self._given(), norm_sums, of_bias, of_to_weight)
        return norm_sums.sum(0, dtype=torch.float64), of_bias.sum(0), of_to_weight.sum(0).t().contiguous()

    def gradients(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dL/d of centre, around, value and mix, after :meth:`gradient_sums`."""
        how, given = self.how, (*self._given(), first, second)
        padded_pixels = self.around[..., 0].numel()
        of_centre = self.centre.new_empty((self.images, *self.sides, how.inputs))
        of_around = self.centre.new_empty((self.images, *self.padded_sides, how.inputs))
        of_mix = self.mix.new_empty((how.tiles(self.pixels), how.hidden, how.inputs))
        of_value = torch.empty_like(self.value)
        self._launch("gradient_centre", self.pixels, how.mix_slices, *given, of_centre, of_mix)
        self._launch("gradient_around", padded_pixels, 1, *given, of_around, of_value)
        if how.weight_slices > 1:
            maps = (self.centre, self.around, self.mix, *self.layers, self.softmax, self.of_y, of_value)
            self._launch("gradient_value", padded_pixels, how.weight_slices, *maps)
        in_order = of_value.permute(0, 1, 2, 4, 3, 5).flatten(3)
        return (
            _channels_first(of_centre),
            _channels_first(of_around),
            _channels_first(in_order),
            of_mix.sum(0),
        )

    def _given(self) -> tuple[Tensor, ...]:
        return self.centre, self.around, self.value, self.mix, *self.layers, self.softmax, self.of_y

    def _filled(self, x: Tensor) -> Tensor:
        """(N, IN, H, W) → (N, H, W, INP) with zeros behind."""
        return F.pad(x.permute(0, 2, 3, 1), (0, self.how.padded_inputs - self.how.inputs)).contiguous()

    def _sorted(self, x: Tensor) -> Tensor:
        """(N, share · weights, H, W) → (N, H, W, weights / 2, share, 2): what a lane reads lies together."""
        channels = x.unflatten(1, (self.how.share, -1, 2))
        return channels.permute(0, 4, 5, 2, 1, 3).contiguous()

    def _launch(self, name: str, pixels: int, slices: int, *arguments: Tensor) -> None:
        how = self.how
        blocks = how.tiles(pixels) // WARPS_OF_A_BLOCK * slices
        source = GRADIENTS if name.startswith("gradient") else SOURCE
        kernel, block = Kernel(source, name, how.defines), (32, WARPS_OF_A_BLOCK, 1)
        runtime.launch(kernel, blocks, block, how.shared_bytes, *arguments, self.maps)


def _channels_first(x: Tensor) -> Tensor:
    """The same memory as (N, C, H, W)."""
    return x.permute(0, 3, 1, 2)
