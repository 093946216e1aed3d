"""The operators as torch sees them, on a CPU, where the reference does the work; and who decides which one runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kernels import (
    KernelError,
    bat,
    checks,
    differences,
    fbn,
    noah,
    pairwise,
    pairwise_simt,
    patchwise,
    reference,
    runtime,
    san,
)
from tests.kernels.cases import SMALL, Geometry, pairwise_case, patches_case, san_case, transform_case


@pytest.mark.parametrize("training", [True, False])
def test_pairwise_attention_is_a_good_citizen(training: bool) -> None:
    case = pairwise_case(SMALL[0], Geometry(3, 4, 3), torch.float64, training)
    arguments = (*[x.requires_grad_() for x in case.tensors], *case.statistics, *case.rest)
    # Only y has a gradient: torch's own check of gradients would ask for those of all results.
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(pairwise.pairwise_attention, arguments, test_utils=utilities)
    assert torch.autograd.gradcheck(
        lambda *tensors: pairwise.pairwise_attention(*tensors, *case.statistics, *case.rest)[0],
        tuple(case.tensors),
    )


def test_subtraction_and_aggregation_are_good_citizens() -> None:
    a, b, weight = (x.requires_grad_() for x in san_case(Geometry(3, 4, 3), torch.float64))
    torch.library.opcheck(san.padded_subtraction2, (a, b, 3, 1, 1))
    torch.library.opcheck(san.padded_aggregation, (a, weight, 3, 1, 1))
    assert torch.autograd.gradcheck(lambda a, b: san.padded_subtraction2(a, b, 3, 1, 1), (a, b))
    assert torch.autograd.gradcheck(lambda a, w: san.padded_aggregation(a, w, 3, 1, 1), (a, weight))


def test_moments_of_differences_are_good_citizens() -> None:
    centre, around = (torch.randn(2, 3, side, side, dtype=torch.float64).requires_grad_() for side in (3, 5))
    torch.library.opcheck(differences.moments, (centre, around, 3, 1, 1))
    assert torch.autograd.gradcheck(lambda c, a: differences.moments(c, a, 3, 1, 1), (centre, around))


def test_bilinear_transform_and_weighted_sum_are_good_citizens() -> None:
    x, p, q, _ = (t.requires_grad_() for t in transform_case((2, 2, 6, (2, 1), (3, 4)), torch.float64))
    for maps in (x, x.detach().to(memory_format=torch.channels_last).requires_grad_()):
        torch.library.opcheck(bat.transform, (maps, p, q))
        assert torch.autograd.gradcheck(bat.transform, (maps, p, q))
    query, value = (torch.randn(3, 5, dtype=torch.float64).requires_grad_() for _ in "qv")
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(noah.summed, (query, value), test_utils=utilities)
    assert torch.autograd.gradcheck(lambda q, v: noah.summed(q, v)[0], (query, value))


def test_mix_patches_is_a_good_citizen() -> None:
    *inputs, _ = patches_case(Geometry(3, 4, 3, stride=2), torch.float64, 2, inputs=2)
    inputs = [t.requires_grad_() for t in inputs]
    torch.library.opcheck(patchwise.mix_patches, (*inputs, 3, 2, 1))
    assert torch.autograd.gradcheck(lambda *tensors: patchwise.mix_patches(*tensors, 3, 2, 1), tuple(inputs))
    with pytest.raises(
        ValueError, match=r"shift, shape \(2, 8\), is torch.float64 on cpu, expected \(2, 9\)"
    ):
        patchwise.mix_patches_by_kernel(inputs[0], inputs[1], inputs[2][:, 1:], inputs[3], 3, 2, 1)


def test_square_sum_is_a_good_citizen() -> None:
    products, power = (
        torch.randn(2, 3, 4, 5, dtype=torch.float64).requires_grad_(),
        torch.rand(5, dtype=torch.float64),
    )
    torch.library.opcheck(fbn.square_sum, (products, power))
    assert torch.autograd.gradcheck(fbn.square_sum, (products, power))
    with pytest.raises(
        ValueError, match=r"power, shape \(4,\), is torch.float64 on cpu, expected shape \(5,\)"
    ):
        fbn.square_sum_by_kernel(products.detach(), power[1:])


def test_one_graph_under_compile() -> None:
    case = pairwise_case(SMALL[0], Geometry(3, 4, 3), torch.float32)

    def result(*tensors: torch.Tensor) -> torch.Tensor:
        return pairwise.pairwise_attention(*tensors, None, None, *case.rest)[0].square()

    compiled = torch.compile(result, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*case.tensors), result(*case.tensors))


@pytest.mark.parametrize("pad_mode", checks.PAD_MODES)
def test_without_a_gpu_the_reference_runs(pad_mode: str) -> None:
    a, b = torch.randn(2, 2, 3, 5, 6)
    weight = torch.randn(2, 1, 9, 30)
    assert torch.equal(
        san.subtraction2(a, b, 3, pad_mode=pad_mode), reference.subtraction2(a, b, 3, pad_mode=pad_mode)
    )
    assert torch.equal(
        san.aggregation(a, weight, 3, pad_mode=pad_mode),
        reference.aggregation(a, weight, 3, pad_mode=pad_mode),
    )


def test_forcing_what_cannot_run_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAIRWISE_KERNELS", "cuda")
    with pytest.raises(KernelError, match="PAIRWISE_KERNELS=cuda, but no kernel can run: tensors are on cpu"):
        san.subtraction(torch.randn(1, 1, 3, 3), 3)


def test_an_unknown_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAIRWISE_KERNELS", "fast")
    with pytest.raises(
        KernelError, match="PAIRWISE_KERNELS is 'fast', expected one of auto, cuda, reference"
    ):
        runtime.mode()


def test_a_script_says_it_in_one_line() -> None:
    code = (
        "from common.errors import run_main; from kernels import runtime; import torch\n"
        "run_main(lambda: runtime.runs(torch.device('cpu'), None))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**__import__("os").environ, "PAIRWISE_KERNELS": "cuda"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert process.stderr == "error: PAIRWISE_KERNELS=cuda, but no kernel can run: tensors are on cpu\n"


@pytest.mark.parametrize(
    "hidden, weights, channels, why",
    [
        (128, 64, 512, "128 hidden and 64 weight channels goes through matrix products"),
        (16, 8, 128, "16 channels a weight has no kernel, at most 8 have"),
    ],
)
def test_shapes_without_a_kernel(hidden: int, weights: int, channels: int, why: str) -> None:
    assert why in str(pairwise_simt.plan(hidden + 2, hidden, weights, channels, torch.float32))


def break_centre(x: list) -> None:
    x[0] = x[0][:, :, 1:]


def break_mix(x: list) -> None:
    x[3] = x[3].double()


def break_weight(x: list) -> None:
    x[2] = x[2][:, 1:]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (break_centre, r"centre has shape \(2, 4, 2, 4\), expected \(2, 4, 3, 4\)"),
        (break_mix, "mix, shape .* is torch.float64 on cpu, expected torch.float32 on cpu as around"),
        (break_weight, r"to_weight has shape \(3, 6\): its 3 channels do not divide the 5 of value"),
    ],
)
def test_shapes_that_make_no_sense(spoil, message: str) -> None:
    module = SMALL[1] if spoil is break_weight else SMALL[0]
    case = pairwise_case(module, Geometry(3, 4, 3), torch.float32)
    spoil(case.tensors)
    for function in (reference.pairwise_attention, pairwise.forward_by_kernels):
        with pytest.raises(ValueError, match=message):
            function(*case.tensors, *case.statistics, *case.rest)


def test_aggregation_checks_its_weights() -> None:
    with pytest.raises(ValueError, match="its 2 channels do not divide the 3 of value"):
        san.aggregation_by_kernel(torch.randn(1, 3, 5, 5), torch.randn(1, 2, 9, 9), 3, 1, 1)
