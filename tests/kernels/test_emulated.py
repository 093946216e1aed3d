"""The CUDA sources, compiled by g++ and run thread by thread on the CPU, against the float64 reference.

Also the Python around them: sizes of grids and shared memory, sums of partial results. What this cannot show is what
the hardware does with many warps at once: tests/gpu does.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.attention.bat_video import temporal_transform
from kernels import (
    bat,
    differences,
    fbn,
    gradients,
    noah,
    pairwise,
    pairwise_simt,
    patchwise,
    reference,
    runtime,
    san,
)
from tests.kernels import emulator
from tests.kernels.cases import (
    GEOMETRIES,
    ON_TENSOR_CORES,
    SAN_STAGES,
    SMALL,
    TOLERANCES,
    TRANSFORMS,
    Geometry,
    Module,
    Pairwise,
    assert_close,
    coarse,
    pairwise_case,
    patches_case,
    san_case,
    transform_case,
)

pytestmark = pytest.mark.xdist_group("emulator")  # one process compiles
RESULTS = ("y", "log_sum", "mean", "variance")
INPUTS = ("centre", "around", "value", "mix", "gamma", "beta", "to_weight", "bias")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "launch", emulator.launch)


def by_kernels(case: Pairwise) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    results = pairwise.forward_by_kernels(*case.tensors, *case.statistics, *case.rest)
    training = case.statistics[0] is None
    gradients = pairwise.gradients_by_kernels(case.of_y, *results, training, *case.tensors, *case.rest)
    return list(results), list(gradients)


def check_pairwise(case: Pairwise, dtype: torch.dtype) -> None:
    results, gradients = by_kernels(case)
    exact = case.exact()
    wanted = reference.pairwise_attention(*exact.tensors, *exact.statistics, *exact.rest)
    for name, result, want in zip(RESULTS, results, wanted):
        assert_close(result, want.detach(), dtype, name)
    wanted_gradients = torch.autograd.grad(wanted[0], exact.tensors, exact.of_y)
    for name, result, want in zip(INPUTS, gradients, wanted_gradients):
        # The softmax takes the bias out again: its gradient is a sum that is nothing but rounding.
        like = wanted_gradients[INPUTS.index("to_weight")] if name == "bias" else None
        assert_close(result, want, dtype, f"gradient of {name}", like)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("module", SAN_STAGES + SMALL, ids=str)
def test_pairwise_attention_of_every_module(module: Module, training: bool) -> None:
    check_pairwise(pairwise_case(module, Geometry(5, 7, 3), torch.float32, training), torch.float32)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_pairwise_attention_of_every_geometry(geometry: Geometry) -> None:
    check_pairwise(pairwise_case(SMALL[0], geometry, torch.float64), torch.float64)


@pytest.mark.parametrize("value", [torch.float16, torch.bfloat16])
def test_pairwise_attention_in_half_precision(value: torch.dtype) -> None:
    check_pairwise(pairwise_case(SAN_STAGES[1], Geometry(4, 9, 3), value), value)


def test_pairwise_attention_of_one_image_and_of_none() -> None:
    check_pairwise(pairwise_case(SMALL[0], Geometry(2, 3, 3), torch.float64, images=1), torch.float64)
    results, gradients = by_kernels(
        pairwise_case(SMALL[0], Geometry(2, 3, 3), torch.float64, False, images=0)
    )
    assert results[0].shape == (0, 8, 2, 3)
    assert not any(gradient.any() for gradient in gradients)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "tensor_cores", lambda device: True)


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("module", ON_TENSOR_CORES, ids=str)
def test_tensor_cores_with_every_module(module: Module, training: bool) -> None:
    case = coarse(pairwise_case(module, Geometry(5, 7, 3), torch.bfloat16, training))
    check_pairwise(case, torch.bfloat16)


@pytest.mark.parametrize("module", [SAN_STAGES[0], *ON_TENSOR_CORES], ids=str)
def test_results_lie_as_a_compiler_is_told(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "tensor_cores", lambda device: True)
    case = pairwise_case(module, Geometry(5, 7, 3), torch.bfloat16)
    results, gradients = by_kernels(case)
    with FakeTensorMode() as mode:
        *tensors, of_y = (mode.from_tensor(x) for x in (*case.tensors, case.of_y))
        told = pairwise.pairwise_attention(*tensors, *case.statistics, *case.rest)
        of_inputs = pairwise.pairwise_attention_gradients(of_y, *told, True, *tensors, *case.rest)
    for x, fake in zip((*results, *gradients), (*told, *of_inputs), strict=True):
        assert (x.shape, x.stride(), x.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_tensor_cores_with_every_geometry(geometry: Geometry) -> None:
    check_pairwise(coarse(pairwise_case(ON_TENSOR_CORES[0], geometry, torch.bfloat16)), torch.bfloat16)


@pytest.mark.usefixtures("tensor_cores")
def test_tensor_cores_with_one_image_and_none() -> None:
    """One image of 15 pixels is less than a warp has."""
    one = pairwise_case(ON_TENSOR_CORES[0], Geometry(3, 5, 3), torch.bfloat16, images=1)
    check_pairwise(coarse(one), torch.bfloat16)
    none = pairwise_case(ON_TENSOR_CORES[0], Geometry(2, 3, 3), torch.bfloat16, False, images=0)
    results, gradients = by_kernels(none)
    assert results[0].shape == (0, 64, 2, 3)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.usefixtures("tensor_cores")
def test_tensor_cores_read_nothing_outside_and_give_the_same_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    case = pairwise_case(ON_TENSOR_CORES[0], Geometry(3, 7, 3, stride=2, spare=1), torch.bfloat16)
    wanted = by_kernels(case)
    fenced = case._replace(tensors=[between_nans(x) for x in case.tensors], of_y=between_nans(case.of_y))
    last_first = case._replace(tensors=[x.clone() for x in case.tensors])
    for other, backwards in ((fenced, False), (last_first, True)):
        monkeypatch.setattr(emulator, "BACKWARDS", backwards)
        for results, wants in zip(by_kernels(other), wanted):
            assert all(torch.equal(result, want) for result, want in zip(results, wants))


@pytest.mark.usefixtures("tensor_cores")
def test_a_nan_stays_where_it_is_seen_on_tensor_cores() -> None:
    case = pairwise_case(ON_TENSOR_CORES[0], Geometry(4, 8, 3), torch.bfloat16, training=False)
    case.tensors[1][0, 0, 2, 2] = torch.nan
    results, gradients = by_kernels(case)
    seen = torch.zeros(4, 8, dtype=torch.bool)
    seen[:3, :3] = True
    assert torch.equal(results[0][0].isnan().any(0), seen)
    assert torch.equal(gradients[0][0].isnan().any(0), seen)
    assert results[0][1].isfinite().all()


@pytest.mark.parametrize("module", SAN_STAGES, ids=str)
def test_the_order_of_threads_does_not_matter(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a barrier is missing between what one thread writes and another reads, it does."""
    case = pairwise_case(module, Geometry(5, 9, 3), torch.float32)
    forwards = by_kernels(case)
    monkeypatch.setattr(emulator, "BACKWARDS", True)
    for results, again in zip(forwards, by_kernels(case)):
        for result, other in zip(results, again):
            assert torch.equal(result, other)


def test_large_differences_neither_overflow_nor_cancel() -> None:
    """Hidden values far from zero, and logits whose exponentials overflow."""
    case = pairwise_case(SMALL[0], Geometry(5, 7, 3), torch.float32)
    case.tensors[0] += 100
    case.tensors[6] *= 100
    results, _ = by_kernels(case)
    exact = case.exact()
    wanted = reference.pairwise_attention(*exact.tensors, *exact.statistics, *exact.rest)
    assert torch.isfinite(results[0]).all()
    torch.testing.assert_close(results[3].double(), wanted[3].detach(), rtol=1e-4, atol=0)


def test_nothing_outside_the_tensors_is_read() -> None:
    """Every tensor lies between NaNs."""
    case = pairwise_case(SAN_STAGES[1], Geometry(3, 5, 3, stride=2, spare=1), torch.float32)
    fenced = case._replace(tensors=[between_nans(x) for x in case.tensors], of_y=between_nans(case.of_y))
    for results, wanted in zip(by_kernels(fenced), by_kernels(case)):
        for result, want in zip(results, wanted):
            assert torch.equal(result, want)
    a, b, weight = (between_nans(x) for x in san_case(Geometry(4, 5, 3), torch.float32))
    assert san.subtraction2_by_kernel(a, b, 3, 1, 1).isfinite().all()
    assert san.aggregation_by_kernel(a, weight, 3, 1, 1).isfinite().all()


def between_nans(x: torch.Tensor) -> torch.Tensor:
    memory = x.new_full((x.numel() + 256,), torch.nan)
    inside = memory[128 : 128 + x.numel()].view(x.shape)
    return inside.copy_(x)


def test_a_nan_stays_where_it_is_seen() -> None:
    case = pairwise_case(SMALL[0], Geometry(4, 8, 3), torch.float32, training=False)
    case.tensors[1][0, 0, 2, 2] = torch.nan  # a padded pixel that the first three rows' footprints meet
    y = by_kernels(case)[0][0]
    seen = torch.zeros(4, 8, dtype=torch.bool)
    seen[:3, :3] = True
    assert torch.equal(y[0].isnan().any(0), seen)
    assert y[1].isfinite().all()


def test_memory_layouts() -> None:
    case = pairwise_case(SMALL[1], Geometry(4, 5, 3), torch.float32)
    strided = [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in case.tensors]
    strided[3] = strided[3].t().contiguous().t()
    other = case._replace(tensors=strided, of_y=case.of_y.transpose(2, 3).contiguous().transpose(2, 3))
    for results, wanted in zip(by_kernels(other), by_kernels(case)):
        for result, want in zip(results, wanted):
            assert torch.equal(result, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_moments_of_differences(
    geometry: Geometry, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(differences, "PIXELS_AT_ONCE", 20)
    generator = torch.Generator().manual_seed(geometry.width)
    centre = torch.randn(2, 3, geometry.height, geometry.width, generator=generator, dtype=dtype) + 100
    around = torch.randn(2, 3, *geometry.padded, generator=generator, dtype=dtype)
    exact = [x.double().requires_grad_() for x in (centre, around)]
    wanted = reference.difference_moments(*exact, *geometry.window)
    results = differences.moments_by_kernel(centre, around, *geometry.window)
    of_results = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    gradients = differences.gradients_by_kernel(*of_results, results[0], centre, around, *geometry.window)
    for name, result, want in zip(("mean", "variance"), results, wanted):
        assert_close(result, want.detach(), torch.float32, name)  # the reference's own cancellation
    for name, result, want in zip(
        ("centre", "around"), gradients, torch.autograd.grad(wanted, exact, [*of_results])
    ):
        assert_close(result, want, torch.float32, f"gradient of {name}")


def test_moments_of_differences_are_those_of_the_definition() -> None:
    centre, around = (
        torch.randn(2, 3, 5, 6, dtype=torch.float64),
        torch.randn(2, 3, 11, 12, dtype=torch.float64),
    )
    all_differences = centre.unsqueeze(2) - reference.footprint(around, 7, 1, 0)
    for results in (
        reference.difference_moments(centre, around, 7),
        differences.moments_by_kernel(centre, around, 7, 1, 1),
    ):
        torch.testing.assert_close(results[0], all_differences.mean((0, 2, 3, 4)))
        torch.testing.assert_close(results[1], all_differences.var((0, 2, 3, 4), correction=0))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_subtraction_and_aggregation(geometry: Geometry, dtype: torch.dtype) -> None:
    a, b, weight = san_case(geometry, dtype)
    exact = [x.double().requires_grad_() for x in (a, b, weight)]
    window, sides = geometry.window, a.shape[2:]
    reference_window = (geometry.kernel_size, geometry.stride, 0, geometry.dilation)

    y, want = san.subtraction2_by_kernel(a, b, *window), reference.subtraction2(*exact[:2], *reference_window)
    assert_close(y, want.detach(), dtype, "subtraction2")
    gradients = san.subtraction2_gradients_by_kernel(y, *sides, *window)
    for result, of_exact in zip(gradients, torch.autograd.grad(want, exact[:2], y.double())):
        assert_close(result, of_exact, dtype, "gradient of subtraction2")

    y, want = (
        san.aggregation_by_kernel(a, weight, *window),
        reference.aggregation(exact[0], exact[2], *reference_window),
    )
    assert_close(y, want.detach(), dtype, "aggregation")
    gradients = san.aggregation_gradients_by_kernel(y, a, weight, *window)
    for result, of_exact in zip(gradients, torch.autograd.grad(want, [exact[0], exact[2]], y.double())):
        assert_close(result, of_exact, dtype, "gradient of aggregation")


def test_more_channels_than_a_thread_sums_at_once() -> None:
    value, weight = torch.randn(1, 22, 5, 5), torch.randn(1, 2, 9, 9)
    torch.testing.assert_close(
        san.aggregation_by_kernel(value, weight, 3, 1, 1), reference.aggregation(value, weight, 3, 1, 0)
    )


def test_a_block_says_how_much_shared_memory_it_needs() -> None:
    """The emulator ends the process when more is written; less would do is no reason to ask for too much."""
    for module in SAN_STAGES:
        how = pairwise_simt.plan(*module[:3], module.share * module.weights, torch.float32)
        assert isinstance(how, pairwise_simt.Plan)
        assert how.shared_bytes <= 99 << 10  # what the smallest supported devices have


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("outputs", [2, 7, 16])
def test_mix_patches(outputs: int, dtype: torch.dtype) -> None:
    check_patches(Geometry(5, 7, 3), dtype, outputs)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_mix_patches_of_every_geometry(geometry: Geometry) -> None:
    check_patches(geometry, torch.float64, 4)


def test_mix_patches_of_more_pixels_than_a_block_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patchwise, "PIXELS_AT_ONCE", 50)
    check_patches(Geometry(6, 20, 3), torch.float64, 2)


def check_patches(geometry: Geometry, dtype: torch.dtype, outputs: int) -> None:
    *inputs, of_h = patches_case(geometry, dtype, outputs)
    exact = [t.double().requires_grad_() for t in inputs]
    h, want = (
        function(*tensors, *geometry.window)
        for function, tensors in ((patchwise.mix_patches_by_kernel, inputs), (reference.mix_patches, exact))
    )
    assert_close(h, want.detach(), dtype, "h")
    gradients = patchwise.gradients_by_kernels(of_h, *inputs, *geometry.window)
    wanted = torch.autograd.grad(want, exact, of_h.double())
    for name, result, of_exact in zip(("x", "scale", "shift", "mix"), gradients, wanted):
        assert_close(result, of_exact, dtype, f"gradient of {name}")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", TRANSFORMS, ids=str)
def test_bilinear_transform(sizes: tuple, dtype: torch.dtype, channels_last: bool) -> None:
    x, p, q, of_y = transform_case(sizes, dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    y = bat.transform_by_kernel(x, p, q)
    assert y.stride() == x.stride()
    exact = [t.double().requires_grad_() for t in (x, p, q)]
    want = reference.bilinear_transform(*exact)
    assert_close(y, want.detach(), dtype, "y")
    gradients = bat.gradients_by_kernels(of_y, x, p, q, True)
    for name, result, of_exact in zip("xpq", gradients, torch.autograd.grad(want, exact, of_y.double())):
        assert_close(result, of_exact, dtype, f"gradient of {name}")


def test_nor_in_the_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x, p, q, of_y = transform_case(TRANSFORMS[-1], torch.float32)
    *patches, of_h = patches_case(Geometry(5, 7, 3), torch.float32, 8)
    query, value, of_sum = torch.randn(20, 40), torch.randn(20, 40), torch.randn(20)

    def results() -> list[torch.Tensor]:
        y, log_sum = noah.summed_by_kernel(query, value)
        return [
            *bat.gradients_by_kernels(of_y, x, p, q, True),
            *patchwise.gradients_by_kernels(of_h, *patches, 3, 1, 1),
            *(y, log_sum, *noah.gradients_by_kernel(of_sum, query, value, y, log_sum)),
        ]

    forwards = results()
    monkeypatch.setattr(emulator, "BACKWARDS", True)
    assert all(torch.equal(result, other) for result, other in zip(forwards, results(), strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_transform_in_time(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On clips whose frames lie one behind the other, as the video networks have them."""
    monkeypatch.setattr(bat, "transform", bat.transform_by_kernel)
    frames = torch.randn(3 * 4, 6, 5, 2)
    if channels_last:
        frames = frames.to(memory_format=torch.channels_last)
    clips = frames.unflatten(0, (3, 4)).transpose(1, 2)
    m = torch.randn(3, 2, 2, 2)
    y = bat.temporal_transform(clips, m)
    assert y.stride() == clips.stride()
    torch.testing.assert_close(y, temporal_transform(clips, m))
    flat, of_y, one = clips.flatten(3), torch.randn(3, 6, 4, 10), torch.ones(3, 2, 1, 1)
    results = bat.gradients_by_kernels(of_y, flat, m, one, False)
    wanted = gradients.bilinear_transform(of_y, flat, m, one)
    torch.testing.assert_close(results[:2], wanted[:2])
    assert not results[2].any()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows, length", [(1, 1), (9, 3), (20, 49), (8, 32), (3, 100)])
def test_weighted_sum(rows: int, length: int, dtype: torch.dtype) -> None:
    query, value = (5 * torch.randn(rows, length)).to(dtype), torch.randn(rows, length).to(dtype)
    y, log_sum = noah.summed_by_kernel(query, value)
    exact = [t.double().requires_grad_() for t in (query, value)]
    want = reference.weighted_sum(*exact)
    assert_close(y, want.detach(), dtype, "y")
    assert_close(log_sum, exact[0].detach().logsumexp(-1), dtype, "log_sum")
    of_y = torch.randn(rows)
    gradients = noah.gradients_by_kernel(of_y, query, value, y, log_sum)
    for name, result, of_exact in zip(
        ("query", "value"), gradients, torch.autograd.grad(want, exact, of_y.double())
    ):
        assert_close(result, of_exact, dtype, f"gradient of {name}")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 9, 3, 20), (1, 40, 7, 5)])
def test_square_sum(shape: tuple, dtype: torch.dtype) -> None:
    products = torch.randn(shape).to(dtype)
    power = torch.rand(shape[-1]).to(torch.promote_types(dtype, torch.float32))
    exact = products.double().requires_grad_()
    want = reference.square_sum(exact, power.double())
    y = fbn.square_sum_by_kernel(products, power)
    assert_close(y, want.detach(), dtype, "y")
    of_y = torch.randn(shape[:-1])
    (of_exact,) = torch.autograd.grad(want, exact, of_y.double())
    assert_close(fbn.square_sum_gradient_by_kernel(of_y, products, power), of_exact, dtype, "gradient")


def test_a_row_with_a_nan_has_a_nan_and_no_other() -> None:
    query, value = torch.randn(2, 4, 40)
    query[1, 3], query[2, 35] = torch.nan, -torch.inf
    y = noah.summed_by_kernel(query, value)[0]
    assert y.isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(y[2], reference.weighted_sum(query, value)[2])
