"""Pairwise self-attention in any type, without tensor cores: starts the kernels of ``cuda/pairwise_simt.cu``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import runtime
from kernels.footprint import Footprint
from kernels.runtime import TYPES, Kernel

SOURCE = "pairwise_simt.cu"

# Warps that share 32 pixels, by hidden channels: each then has 16 hidden values in registers. Above, tiles in shared
# memory are too large for most devices, and matrix products over an expanded tensor compete.
GROUPS = {32: 2, 64: 4}
MOST_HIDDEN_OF_A_WARP, MOST_WEIGHTS_OF_A_WARP, MOST_SHARE = 16, 8, 8
WARPS_OF_A_BLOCK = 4


class Plan(NamedTuple):
    """How a module's channels are spread over warps: the compile-time numbers of the kernels."""

    inputs: int
    hidden: int
    weights: int
    share: int
    groups: int
    tiles: int
    value: torch.dtype
    real: torch.dtype

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        numbers = zip(("IN", "HIDDEN", "WEIGHTS", "SHARE", "GROUPS", "TILES"), map(str, self[:6]))
        return (*numbers, ("VALUE", TYPES[self.value]), ("REAL", TYPES[self.real]))

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads: lanes, warps that share 32 pixels, tiles of 32 pixels."""
        return 32, self.groups, self.tiles

    def blocks(self, pixels: int) -> int:
        """Blocks for so many pixels."""
        return -(-pixels // (32 * self.tiles))

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the layers' weights and the tiles, or the sums at the end, whichever is more."""
        slice_ = (-(-self.inputs // self.groups) + 3) // 4 * 4
        rows, warps = slice_ * self.groups, self.groups * self.tiles
        layers = self.hidden * rows + self.weights * self.hidden + 2 * self.hidden + self.weights
        tiles = self.tiles * 36 * (rows + 2 * self.hidden + self.weights)
        real = self.real.itemsize
        hidden, weights = self.hidden // self.groups, self.weights // self.groups
        sums = warps * 34 * max(2 * hidden * 8, (2 * hidden + weights) * real)
        return max(((layers + 3) // 4 * 4 + tiles) * real, sums)


def plan(inputs: int, hidden: int, weights: int, channels: int, value: torch.dtype) -> Plan | str:
    """The plan for a module of these channels, or why the kernels have none."""
    groups, share = GROUPS.get(hidden, 1), channels // weights
    if value not in TYPES:
        return f"{value} is not a type of the pairwise kernels"
    if (
        hidden // groups > MOST_HIDDEN_OF_A_WARP
        or weights % groups
        or weights // groups > MOST_WEIGHTS_OF_A_WARP
    ):
        return f"pairwise attention with {hidden} hidden and {weights} weight channels goes through matrix products"
    if share > MOST_SHARE:
        return f"pairwise attention with {share} channels a weight has no kernel, at most {MOST_SHARE} have"
    real = torch.promote_types(value, torch.float32)
    return Plan(inputs, hidden, weights, share, groups, max(1, WARPS_OF_A_BLOCK // groups), value, real)


class Passes:
    """The kernels over one set of maps, all contiguous.

    ``layers`` are the second norm as a scale and a shift, ``to_weight`` and ``bias``; for the rest see
    :func:`kernels.reference.pairwise_attention`.
    """

    def __init__(
        self, how: Plan, maps: Footprint, centre: Tensor, around: Tensor, value: Tensor, mix: Tensor
    ) -> None:
        self.how, self.maps = how, maps
        self.centre, self.around, self.value, self.mix = centre, around, value, mix
        self.pixels = centre[:, 0].numel()

    def hidden_moments(self) -> Tensor:
        """Σ h and Σ h² over all pairs, (2, hidden) in float64."""
        partial = self.mix.new_empty((self._tiles(), 2, self.how.hidden), dtype=torch.float64)
        self._launch("hidden_moments", self.pixels, self.centre, self.around, self.mix, partial)
        return partial.sum(0)

    def attend(self, layers: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The results y and log_sum."""
        images, _, *sides = self.centre.shape
        y = self.value.new_empty((images, self.value.shape[1], *sides))
        log_sum = self.centre.new_empty((images, self.how.weights, *sides))
        maps = (self.centre, self.around, self.value, self.mix)
        self._launch("attend", self.pixels, *maps, *layers, y, log_sum)
        return y, log_sum

    def gradient_sums(
        self, layers: tuple[Tensor, ...], log_sum: Tensor, of_y: Tensor, of_y_times_y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Σ of_norm and Σ of_norm · h, (2, hidden) in float64; dL/dbias and dL/dto_weight."""
        maps = (self.centre, self.around, self.value, self.mix)
        self.given = (*maps, *layers, log_sum.contiguous(), of_y.contiguous(), of_y_times_y.contiguous())
        tiles, weights, hidden = self._tiles(), self.how.weights, self.how.hidden
        norm_sums, of_bias, of_to_weight = (
            self.mix.new_empty((tiles, *shape)) for shape in ((2, hidden), (weights,), (weights, hidden))
        )
        self._launch("gradient_sums", self.pixels, *self.given, norm_sums, of_bias, of_to_weight)
        return norm_sums.sum(0, dtype=torch.float64), of_bias.sum(0), of_to_weight.sum(0)

    def gradients(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dL/d of centre, around, value and mix, after :meth:`gradient_sums`.

        With the second norm's batch statistics, dL/dh = scale · of_norm + ``first`` + ``second`` · h.
        """
        given = (*self.given, first, second)
        of_centre, of_around, of_value = (torch.empty_like(x) for x in (self.centre, self.around, self.value))
        of_mix = self.mix.new_empty((self._tiles(), *self.mix.shape))
        self._launch("gradient_centre", self.pixels, *given, of_centre, of_mix)
        self._launch("gradient_around", self.around[:, 0].numel(), *given, of_around, of_value)
        return of_centre, of_around, of_value, of_mix.sum(0)

    def _tiles(self) -> int:
        return self.how.blocks(self.pixels) * self.how.tiles

    def _launch(self, name: str, pixels: int, *arguments: Tensor) -> None:
        how, kernel = self.how, Kernel(SOURCE, name, self.how.defines)
        runtime.launch(kernel, how.blocks(pixels), how.block, how.shared_bytes, *arguments, self.maps)
