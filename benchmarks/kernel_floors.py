"""What the kernels must move and compute at least, and the time that takes: `python benchmarks/kernel_floors.py`.

Counted from the sources in kernels/cuda for the published networks' layers, values in bfloat16, the rest in float32.
A floor is the largest of three times: every byte once at the rate of a device copy, every multiply-accumulate at the
rate of the device's float32 units, every one within a bfloat16 product of matrices at that of its tensor cores. It is
arithmetic, not a measurement.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

STAGES = {
    "c64 112² 3×3": (64, 112, 3),
    "c256 56² 7×7": (256, 56, 7),
    "c512 28² 7×7": (512, 28, 7),
    "c1024 14² 7×7": (1024, 14, 7),
}


class Work(NamedTuple):
    """Bytes moved, multiply-accumulates done, and those done on tensor cores."""

    bytes: float
    macs: float
    products: float = 0


def main() -> None:
    """Print the table of docs/performance.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--copy", type=float, default=4.3, help="TB/s of a device copy (an H200's, measured)")
    parser.add_argument(
        "--fma", type=float, default=33.4, help="float32 TMAC/s (an H200's: 132 · 128 · 1.98 GHz)"
    )
    parser.add_argument(
        "--products", type=float, default=395, help="bfloat16 TMAC/s of matrix products (an H200's, measured)"
    )
    arguments = parser.parse_args()
    rates = Work(arguments.copy, arguments.fma, arguments.products)
    print("| operator | MB | GMAC | in products | floor, ms |\n|---|---|---|---|---|")
    for name, work in operators(arguments.batch).items():
        floor = max(amount / rate / 1e9 for amount, rate in zip(work, rates))
        macs = " | ".join(f"{amount / 1e9:.1f}" for amount in work[1:])
        print(f"| {name} | {work.bytes / 1e6:.0f} | {macs} | {floor:.2f} |")


def operators(batch: int) -> dict[str, Work]:
    """Every operator at every size of the published networks where a kernel runs."""
    found = {}
    for name, (width, side, kernel_size) in STAGES.items():
        forward, backward = pairwise(batch, width, side, kernel_size)
        found[f"pairwise attention, {name}"] = forward
        found[f"its gradients, {name}"] = backward
    for name, (width, side, kernel_size) in {**STAGES, "c2048 7² 7×7": (2048, 7, 7)}.items():
        found[f"footprints mixed, {name}"], found[f"their gradients, {name}"] = patchwise(
            batch, width, side, kernel_size
        )
        found[f"aggregation, {name}"] = aggregation(batch, width, side, kernel_size)
    # y = P·x·Q of ResNet-50+BAT's 14² maps of 256 channels, and NOAH's 4 heads of 1000 classes, batch 128.
    x = 128 * 256 * 14 * 14
    found["P·x·Q, 256 channels, 14², N 128"] = Work(2 * 2 * x, 2 * 7 * x)
    for channels, side, window in ((64, 224, 2), (64, 112, 1), (64, 112, 2), (256, 56, 1)):
        name = f"c{channels} {side}²" + (f", pooled {window}×{window}" if window > 1 else "")
        found[f"norm and ReLU, {name}"], found[f"its gradients, {name}"] = norm(batch, channels, side, window)
    rows = 128 * 4 * 1000
    found["weighted sum, 4 × 1000 maps, 7², N 128"] = Work(2 * 2 * 49 * rows, 49 * rows)
    return found


def pairwise(batch: int, width: int, side: int, kernel_size: int) -> tuple[Work, Work]:
    """The moments and the attention; then the three passes over the pairs that make the gradients."""
    hidden, channels, weights = width // 16, width // 4, width // 32
    inputs, out, padded = hidden + 2, batch * side**2, batch * (side + kernel_size - 1) ** 2
    compared, values = 4 * inputs * (out + padded), 2 * channels * padded
    result, per_weight = 2 * channels * out, 4 * weights * out
    forward_bytes = 2 * compared + values + result + per_weight
    pairs, around = out * kernel_size**2, padded * kernel_size**2
    first, second = inputs * hidden, hidden * weights
    backward_bytes = 3 * (compared + values + result + 2 * per_weight) + compared + values
    if hidden % 16:  # no tensor cores: cuda/pairwise_simt.cu
        again = first + second + channels + second  # up to the gradient of the second norm's output
        forward_macs = pairs * (2 * first + second + channels)
        backward_macs = pairs * (2 * again + second + 2 * first) + around * (again + first + channels)
        return Work(forward_bytes, forward_macs), Work(backward_bytes, backward_macs)
    again = first + 2 * second
    forward = Work(forward_bytes, pairs * channels, pairs * (2 * first + second))
    products = pairs * (2 * again + second + 2 * first) + around * (again + first)
    sums = 2 * pairs + 2 * around
    if weights > 16:  # more than a warp's registers hold: a fourth pass, for the values
        products += around * (first + second)
        backward_bytes += compared + result + 2 * per_weight
    return forward, Work(backward_bytes, sums * channels, products)


def patchwise(batch: int, width: int, side: int, kernel_size: int) -> tuple[Work, Work]:
    """The first layer of the patchwise module's mapping; then the passes for the map's gradient and the weights'."""
    inputs, outputs, out = width // 16, width // 32, batch * side**2
    padded = batch * (side + kernel_size - 1) ** 2
    one = 2 * (inputs * padded + outputs * out)
    macs = out * kernel_size**2 * inputs * outputs
    return Work(one, macs), Work(2 * one + 2 * inputs * padded, macs * padded / out + 2 * macs)


def norm(batch: int, channels: int, side: int, window: int) -> tuple[Work, Work]:
    """Batch norm, ReLU and pooling, which read the map for its statistics and again; then its gradients, likewise."""
    x = batch * channels * side**2
    y = x / window**2
    return Work(2 * (2 * x + y), 2 * x), Work(2 * (3 * x + 2 * y), 4 * x)


def aggregation(batch: int, width: int, side: int, kernel_size: int) -> Work:
    """The sum over the footprint with the weights of the patchwise module."""
    channels, out = width // 4, batch * side**2
    padded = batch * (side + kernel_size - 1) ** 2
    weights = channels // 8 * kernel_size**2 * out
    return Work(2 * (channels * (padded + out) + weights), channels * kernel_size**2 * out)


if __name__ == "__main__":
    main()
