"""Whole networks with the CUDA sources in place of the reference, on a CPU: a program, for it replaces operators.

Prints the distance of all gradients together from those of the reference in float32, relative to their length: for each
network the kernels' in float32, and in bfloat16 the reference's and the kernels'; and how far the kernels' are under
torch.compile from theirs without it.
"""

from __future__ import annotations

import copy
import json
import sys

import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import image.models  # noqa: F401
import video.models  # noqa: F401
from kernels import bat, differences, fbn, noah, norm, pairwise, patchwise, runtime, san
from tests.kernels import emulator
from tests.kernels.cases import steps

SAN = {"layers": [1, 1, 1], "widths": [64, 128, 256], "kernels": [3, 5, 7], "num_classes": 5}
BAT = {"layers": [1] * 4, "channels": [8] * 4, "bat_size": 2, "num_classes": 5}
NETWORKS = {
    "san10_pairwise": (SAN, (2, 3, 48, 40)),
    "san10_patchwise": (SAN, (2, 3, 48, 40)),
    "resnet18_bat": ({**BAT, "nl_mod": [1, 1, 1000], "drop_rate": 0.0}, (2, 3, 64, 64)),
    "resnet18_noah": ({"num_classes": 5, "layers": [1] * 4, "channels": [8, 8, 16, 32]}, (2, 3, 64, 64)),
    "resnet18_fbn": ({"num_classes": 5}, (2, 3, 64, 64)),
    "c2d_resnet50_bat3d": ({**BAT, "nonlocal_mod": 1, "drop_rate": 0.0}, (1, 3, 4, 32, 32)),
}


def step(model: torch.nn.Module, x: torch.Tensor, half: bool, compiled: bool = False) -> list[torch.Tensor]:
    """Logits and gradients of a training step of a copy of ``model``."""
    model = copy.deepcopy(model).train()
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    torch.manual_seed(0)  # DropFactor's mask
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = forward(x)
    assert not any(buffer.requires_grad for buffer in model.buffers())
    torch.nn.functional.cross_entropy(logits.float(), torch.arange(len(x)) % 5).backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


def replace() -> None:
    """The kernels, run by g++'s code, as what the operators do on a CPU."""
    runtime.launch = emulator.launch
    runtime.runs = lambda device, lacking: lacking is None
    runtime.missing = lambda: None
    runtime.tensor_cores = lambda device: True
    for operator, kernel in (
        (pairwise.pairwise_attention, pairwise.forward_by_kernels),
        (pairwise.pairwise_attention_gradients, pairwise.gradients_by_kernels),
        (differences.moments, differences.moments_by_kernel),
        (differences.moments_gradients, differences.gradients_by_kernel),
        (norm.norm_relu, norm.norm_relu_by_kernels),
        (norm.norm_relu_gradients, norm.gradients_by_kernels),
        (patchwise.mix_patches, patchwise.mix_patches_by_kernel),
        (patchwise.mix_patches_gradients, patchwise.gradients_by_kernels),
        (san.padded_subtraction2, san.subtraction2_by_kernel),
        (san.padded_subtraction2_gradients, san.subtraction2_gradients_by_kernel),
        (san.padded_aggregation, san.aggregation_by_kernel),
        (san.padded_aggregation_gradients, san.aggregation_gradients_by_kernel),
        (bat.transform, bat.transform_by_kernel),
        (bat.transform_gradients, bat.gradients_by_kernels),
        (noah.summed, noah.summed_by_kernel),
        (noah.summed_gradients, noah.gradients_by_kernel),
        (fbn.square_sum, fbn.square_sum_by_kernel),
        (fbn.square_sum_gradient, fbn.square_sum_gradient_by_kernel),
    ):
        operator.register_kernel("cpu")(counted(operator, kernel))


CALLS: set[str] = set()


def counted(operator, kernel):  # type: ignore[no-untyped-def]
    def call(*arguments):  # type: ignore[no-untyped-def]
        CALLS.add(f"{kernel.__module__}.{kernel.__name__}")
        results = kernel(*arguments)
        with FakeTensorMode() as mode:
            told = operator(*[mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments])
        for result, fake in zip(listed(results), listed(told), strict=True):  # a compiler relies on it
            assert (result.shape, result.dtype) == (fake.shape, fake.dtype), operator
            assert steps(result) == steps(fake), f"{operator}: {steps(result)}, not {steps(fake)}"
        return results

    return call


def listed(results):  # type: ignore[no-untyped-def]
    return [results] if isinstance(results, torch.Tensor) else list(results)


def made(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A network with no weight of a norm at 0 or 1, and its input."""
    torch.manual_seed(1)
    arguments, shape = NETWORKS[name]
    model = timm.create_model(name, **arguments)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.affine:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
    x = torch.randn(shape)
    return model, x.contiguous(memory_format=torch.channels_last) if name == "san10_pairwise" else x


def distance(results: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    own, exact = (torch.cat([x.flatten().float() for x in values]) for values in (results, wanted))
    return ((own - exact).norm() / exact.norm()).item()


def main() -> None:
    """Measure and print as JSON."""
    networks = {name: made(name) for name in NETWORKS}
    exact = {name: step(*network, half=False) for name, network in networks.items()}
    reference = {name: distance(step(*network, half=True), exact[name]) for name, network in networks.items()}
    replace()
    found = {}
    for name, network in networks.items():
        single, half = step(*network, half=False), step(*network, half=True)
        found[name] = {
            "kernels, float32": distance(single, exact[name]),
            "reference, bfloat16": reference[name],
            "kernels, bfloat16": distance(half, exact[name]),
            "compiled, float32": distance(step(*network, half=False, compiled=True), single),
            "compiled, bfloat16": distance(step(*network, half=True, compiled=True), half),
        }
    json.dump({"distances": found, "calls": sorted(CALLS)}, sys.stdout)


if __name__ == "__main__":
    main()
