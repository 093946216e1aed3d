"""Speed and memory of the mechanisms: `python -m kernels.bench` on a GPU, `python -m kernels.bench --cpu` on a CPU.

On a GPU: whole training steps (forward, cross entropy, backward, SGD, synthetic data) of the networks in the papers'
tables, with the kernels and without them, and plain timm networks beside them, all in one run; then every operator on
its own. Each line stands beside what the published programs reach on an H200, where that is known
(benchmarks/results/published_h200.json). Needs torch, CuPy, NumPy and timm, nothing else.

On a CPU: the attention modules' own path against their definition, which unfolds the map: processor time of one thread
and peak memory of a training step, each in a fresh process.

Only here does this room look at those above it, by name, when the program runs: what is measured are their networks.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels import bat, noah, norm, pairwise, runtime, san

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PUBLISHED: dict[str, Any] = json.loads((RESULTS / "published_h200.json").read_text())
WARM_UP, REPEATS = 5, 8
MODES = ("fp32", "bf16/channels_last", "bf16/channels_last/compile")
SAN_MODES = (*MODES, "bf16/channels_last/compile/graphs")  # a SAN starts many small kernels


class Network(NamedTuple):
    """A network to measure, and what its line in the published numbers is called."""

    name: str
    batch: int
    published: str
    modes: tuple[str, ...] = MODES
    without_kernels: bool = True


NETWORKS = [
    Network("san10_pairwise", 64, "san10_pairwise", SAN_MODES),
    Network("san19_pairwise", 64, "san19_pairwise", SAN_MODES, without_kernels=False),
    Network("san10_patchwise", 64, "san10_patchwise", SAN_MODES),
    Network("san19_patchwise", 64, "san19_patchwise", SAN_MODES, without_kernels=False),
    Network("resnet50_bat", 128, "resnet50_bat"),
    Network("timm/resnet50", 128, "timm_resnet50", without_kernels=False),
    Network("resnet18_noah", 128, "resnet18_noah", ("bf16/channels_last",)),
    Network("timm/resnet18", 128, "resnet18_base", ("bf16/channels_last",), without_kernels=False),
    Network("resnet50_noah", 128, "resnet50_noah", ("fp32",), without_kernels=False),
]
# The attention modules of a SAN: input channels, side of the map, kernel size.
STAGES = [(64, 112, 3), (256, 56, 7), (512, 28, 7), (1024, 14, 7), (2048, 7, 7)]
# Its norms on large maps, each followed by ReLU: channels, side of the map, side of the pooling.
NORMED = [(64, 224, 2), (64, 112, 1), (64, 112, 2), (256, 56, 1)]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="measure the path that a CPU takes")
    parser.add_argument("--only", default="", help="measure only what has this in its name")
    parser.add_argument("--images", type=int, default=4, help="with --cpu: images a batch")
    parser.add_argument(
        "--out", type=Path, help="JSON file, by default benchmarks/results/kernels_DEVICE.json"
    )
    arguments = parser.parse_args()
    if not arguments.cpu and (lacking := runtime.missing()):
        parser.error(f"{lacking}; --cpu measures the path that a CPU takes")
    rows = on_cpu(arguments.only, arguments.images) if arguments.cpu else on_gpu(arguments.only)
    device = "cpu" if arguments.cpu else torch.cuda.get_device_name().replace(" ", "_").lower()
    out = arguments.out or RESULTS / f"kernels_{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    made_with = {
        "device": processor() if arguments.cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "threads": 1 if arguments.cpu else torch.get_num_threads(),
    }
    out.write_text(json.dumps({**made_with, "rows": rows}, indent=1) + "\n")
    print(f"written to {out}")


def processor() -> str:
    """The CPU's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def on_gpu(only: str) -> list[dict[str, Any]]:
    """Copy, networks, layers and operators on the current device."""
    torch.backends.cudnn.benchmark = True
    print(
        f"{torch.cuda.get_device_name()}: copy {copy_rate():.2f} TB/s (published numbers: {PUBLISHED['copy_TB_s']})"
    )
    rows = []
    for network in NETWORKS:
        for mode in network.modes:
            for kernels in ("auto", "reference") if network.without_kernels else ("auto",):
                if only in f"{network.name}/{mode}":
                    rows.append(network_row(network, mode, kernels))
    for dtype in (torch.float32, torch.bfloat16):
        if only in "fb_layer":
            rows.append(fb_layer_row(dtype))
        rows += [row for row in operator_rows(dtype) if only in row["name"]]
    return rows


def copy_rate() -> float:
    """Bytes read and written per second by a device copy, in TB/s."""
    a, b = torch.empty(2, 1 << 28, device="cuda")
    return 2 * a.numel() * 4 / milliseconds(lambda: b.copy_(a)) / 1e9


def network_row(network: Network, mode: str, kernels: str) -> dict[str, Any]:
    """A training step of a whole network."""
    os.environ["PAIRWISE_KERNELS"] = kernels
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    name = f"{network.name}/b{network.batch}/{mode}" + ("" if kernels == "auto" else "/without kernels")
    published = {**PUBLISHED["models"], **PUBLISHED["others"]}
    row: dict[str, Any] = {"name": name}
    try:
        step = training_step(network, mode)
        row["ms"] = milliseconds(step)
        row["img_s"] = 1e3 * network.batch / row["ms"]
        row["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    except Exception as error:  # one network that fails must not hide the others
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    row["published"] = published.get(f"{network.published}/b{network.batch}/{mode}")
    say(row)
    return row


def training_step(network: Network, mode: str) -> Callable[[], None]:
    """Forward, cross entropy, backward and SGD of a network on one batch of random images."""
    importlib.import_module("image.models")
    create = importlib.import_module("timm").create_model
    memory_format = torch.channels_last if "channels_last" in mode else torch.contiguous_format
    model = (
        create(network.name.removeprefix("timm/"), num_classes=1000).cuda().to(memory_format=memory_format)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(network.batch, 3, 224, 224, device="cuda").to(memory_format=memory_format)
    targets = torch.randint(1000, (network.batch,), device="cuda")
    compiling = "reduce-overhead" if "graphs" in mode else "default"
    forward = torch.compile(model, mode=compiling) if "compile" in mode else model

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled="bf16" in mode):
            loss = nn.functional.cross_entropy(forward(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def fb_layer_row(dtype: torch.dtype) -> dict[str, Any]:
    """The factorized bilinear layer of the paper's ImageNet networks, forward and backward."""
    os.environ["PAIRWISE_KERNELS"] = "auto"
    mode = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    layer = importlib.import_module("common.attention.fbn").FactorizedBilinear(2048, 1000, 50).cuda()
    x = torch.randn(64, 2048, 7, 7, device="cuda", requires_grad=True)

    def step() -> None:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            layer(x).float().sum().backward()

    torch.cuda.reset_peak_memory_stats()
    row = {"name": f"fb_layer/{mode}", "ms": milliseconds(step)}
    row["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    row["published"] = PUBLISHED["others"][f"fb_layer_J1000_K50_C2048_7x7/N64/{mode}"]
    say(row)
    return row


def operator_rows(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Each operator by itself, at the sizes of the published networks' layers."""
    rows = [row for stage in STAGES for row in stage_rows(*stage, dtype)]
    type_name = str(dtype).removeprefix("torch.")
    x = torch.randn(128, 256, 14, 14, device="cuda", dtype=dtype)
    p, q = torch.randn(2, 128, 4, 7, 7, device="cuda").softmax(-1)
    rows.append(operator_row(f"bilinear_transform/{type_name}", lambda: bat.bilinear_transform(x, p, q)))
    query, value = torch.randn(2, 128, 4000, 49, device="cuda", dtype=dtype)
    rows.append(operator_row(f"weighted_sum/{type_name}", lambda: noah.weighted_sum(query, value)))
    for sizes in NORMED:
        rows += norm_rows(*sizes, dtype)
    return rows


def norm_rows(channels: int, side: int, window: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Batch norm, ReLU and pooling with their gradients, of 64 images: by the operator, by torch's, by its compiler."""
    x = torch.randn(64, channels, side, side, device="cuda", dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    gamma, beta = torch.ones(channels, device="cuda"), torch.zeros(channels, device="cuda")
    inputs = [x, gamma.requires_grad_(), beta.requires_grad_()]

    def plain(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = nn.functional.batch_norm(x, None, None, gamma, beta, training=True).relu()
        return nn.functional.max_pool2d(y, window) if window > 1 else y

    def own(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return norm.norm_relu(x, gamma, beta, None, None, 1e-5, window)[0]

    of_y = own(*inputs).detach()

    def call(function: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*inputs), inputs, of_y)

    label = f"{str(dtype).removeprefix('torch.')}/c{channels}_h{side}_pool{window}"
    ways = {"norm_relu": own, "norm_relu by torch": plain, "norm_relu compiled": torch.compile(plain)}
    return [operator_row(f"{name}/{label}", call(function)) for name, function in ways.items()]


def stage_rows(width: int, side: int, kernel_size: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The operators of a SAN's stage, for 64 images."""
    reach, window = side + kernel_size - 1, (kernel_size, 1, 1)
    hidden, channels, weights = width // 16, width // 4, width // 32
    label = f"{str(dtype).removeprefix('torch.')}/c{width}_h{side}_k{kernel_size}"

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    a, b = random(2, 64, hidden, reach, reach, dtype=dtype)
    value = random(64, channels, reach, reach, dtype=dtype)
    weight = random(64, weights, kernel_size**2, side**2, dtype=dtype)
    rows = [
        operator_row(f"subtraction2/{label}", lambda: san.padded_subtraction2(a, b, *window)),
        operator_row(f"aggregation/{label}", lambda: san.padded_aggregation(value, weight, *window)),
    ]
    if not pairwise.runs(value.device, hidden + 2, hidden, weights, channels, dtype):
        return rows
    sizes = ((hidden, hidden + 2), (hidden,), (hidden,), (weights, hidden), (weights,))
    maps = (random(64, hidden + 2, side, side), random(64, hidden + 2, reach, reach), value)
    tensors = [x.requires_grad_() for x in (*maps, *(random(*size) for size in sizes))]

    def attend() -> Tensor:
        return pairwise.pairwise_attention(*tensors, None, None, 1e-5, *window)[0]

    rows.append(operator_row(f"pairwise_attention/{label}", attend))
    rows.append(
        operator_row(
            f"pairwise_attention and its gradients/{label}",
            lambda: torch.autograd.grad(attend().float().sum(), tensors),
        )
    )
    return rows


def operator_row(name: str, call: Callable[[], Any]) -> dict[str, Any]:
    """A call by itself."""
    row = {"name": name, "ms": milliseconds(call)}
    say(row)
    return row


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of ``call`` on the current device."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def on_cpu(only: str, images: int) -> list[dict[str, Any]]:
    """The attention modules' path on a CPU against their definition, a training step each."""
    rows = []
    for kind in ("PairwiseAttention", "PatchwiseAttention"):
        for width, side, kernel_size in STAGES:
            name = f"{kind}/c{width}_h{side}_k{kernel_size}"
            if only in name:
                case = (kind, width, side, kernel_size, images)
                own, naive = (in_fresh_process(path, case) for path in ("fused", "reference"))
                row = {"name": name, "own": own, "naive": naive}
                print(
                    f"{name:40} {own['ms']:8.0f} ms {own['MiB']:6.0f} MiB   "
                    f"unfolded {naive['ms']:8.0f} ms {naive['MiB']:6.0f} MiB   "
                    f"{naive['ms'] / own['ms']:.2f} × as fast, {own['MiB'] / naive['MiB']:.2f} of the memory"
                )
                rows.append(row)
    return rows


def in_fresh_process(path: str, case: tuple) -> dict[str, float]:
    """:func:`module_step` in a process of its own, whose peak memory is that of the step."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(module_step, (path, *case))


def module_step(
    path: str, kind: str, width: int, side: int, kernel_size: int, images: int
) -> dict[str, float]:
    """Milliseconds and MiB of a forward and backward pass of an attention module, by one of its paths."""
    made = getattr(importlib.import_module("common.attention.san"), kind)
    torch.set_num_threads(1)
    module = made(width // 4 * 4, width // 16, width // 4, kernel_size=kernel_size)
    x = torch.randn(images, width // 4 * 4, side, side, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(6):
        begun = time.process_time()
        getattr(module, path)(x).sum().backward()
        times.append(time.process_time() - begun)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"ms": 1e3 * statistics.median(times[1:]), "MiB": (after - before) / 2**10}


def say(row: dict[str, Any]) -> None:
    """A line on the terminal."""
    if "error" in row:
        print(f"{row['name']:60} {row['error']}", flush=True)
        return
    numbers = [f"{row['ms']:9.2f} ms"]
    numbers += [f"{row['img_s']:8.0f} images/s"] if "img_s" in row else []
    numbers += [f"{row['peak_GiB']:6.2f} GiB"] if "peak_GiB" in row else []
    published = row.get("published")
    numbers += [f"  published: {published}"] if published else []
    print(f"{row['name']:60} {''.join(numbers)}", flush=True)


if __name__ == "__main__":
    main()
