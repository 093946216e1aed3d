"""The operators on a GPU: `pytest -m gpu tests/gpu` needs torch, CuPy, NumPy and pytest, nothing else."""

from __future__ import annotations

import pytest
import torch

from kernels import bat, fbn, noah, norm, pairwise, pairwise_simt, patchwise, reference, runtime, san
from tests.kernels.cases import (
    GEOMETRIES,
    NORMED,
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
    norm_case,
    pairwise_case,
    patches_case,
    san_case,
    transform_case,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(runtime.missing() is not None, reason=f"no kernels here: {runtime.missing()}"),
]
INPUTS = ("centre", "around", "value", "mix", "gamma", "beta", "to_weight", "bias")


def on_gpu(case: Pairwise) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    case = case.on("cuda")
    tensors = [x.requires_grad_() for x in case.tensors]
    y = pairwise.pairwise_attention(*tensors, *case.statistics, *case.rest)[0]
    return y, torch.autograd.grad(y, tensors, case.of_y)


def check_pairwise(case: Pairwise, dtype: torch.dtype) -> None:
    y, gradients = on_gpu(case)
    exact = case.exact()
    want = reference.pairwise_attention(*exact.tensors, *exact.statistics, *exact.rest)[0]
    assert_close(y.detach(), want.detach(), dtype, "y")
    wanted = torch.autograd.grad(want, exact.tensors, exact.of_y)
    for name, result, of_exact in zip(INPUTS, gradients, wanted):
        like = wanted[INPUTS.index("to_weight")] if name == "bias" else None
        assert_close(result, of_exact, dtype, f"gradient of {name}", like)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("module", SAN_STAGES + SMALL, ids=str)
def test_pairwise_attention(module: Module, dtype: torch.dtype, training: bool) -> None:
    case = pairwise_case(module, Geometry(9, 13, 7), dtype, training, images=3)
    how = pairwise_simt.plan(*module[:3], module.share * module.weights, dtype)
    assert isinstance(how, pairwise_simt.Plan)
    if how.shared_bytes > runtime.shared_limit(torch.device("cuda", 0)):
        pytest.skip(f"{how.shared_bytes} bytes of shared memory are more than this GPU has")
    check_pairwise(coarse(case) if dtype == torch.bfloat16 else case, dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("module", ON_TENSOR_CORES, ids=str)
def test_tensor_cores(module: Module, geometry: Geometry, training: bool) -> None:
    if not runtime.tensor_cores(torch.device("cuda", 0)):
        pytest.skip("this GPU has none for bfloat16")
    check_pairwise(coarse(pairwise_case(module, geometry, torch.bfloat16, training)), torch.bfloat16)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_geometry(geometry: Geometry) -> None:
    check_pairwise(pairwise_case(SMALL[0], geometry, torch.float64), torch.float64)


def test_two_runs_give_the_same_bits() -> None:
    case = pairwise_case(SAN_STAGES[1], Geometry(28, 28, 7), torch.bfloat16, images=8)
    (y, gradients), (again, gradients_again) = on_gpu(case), on_gpu(case)
    assert torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_subtraction_and_aggregation(geometry: Geometry, dtype: torch.dtype) -> None:
    inputs = [x.cuda().requires_grad_() for x in san_case(geometry, dtype)]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    padded = (geometry.kernel_size, geometry.stride, 0, geometry.dilation)
    for own, definition, which in (
        (san.padded_subtraction2, reference.subtraction2, (0, 1)),
        (san.padded_aggregation, reference.aggregation, (0, 2)),
    ):
        arguments, wanted = [inputs[i] for i in which], [exact[i] for i in which]
        y, want = own(*arguments, *geometry.window), definition(*wanted, *padded)
        assert_close(y.detach(), want.detach(), dtype, own.__name__)
        gradients = torch.autograd.grad(y.square().sum(), arguments)
        for result, of_exact in zip(gradients, torch.autograd.grad(want.square().sum(), wanted)):
            assert_close(result, of_exact, dtype, f"gradient of {own.__name__}")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("outputs", [2, 8, 16])
def test_mix_patches(outputs: int, geometry: Geometry, dtype: torch.dtype) -> None:
    *tensors, of_h = (t.cuda() for t in patches_case(geometry, dtype, outputs))
    inputs = [t.requires_grad_() for t in tensors]
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    h, want = (
        patchwise.mix_patches(*inputs, *geometry.window),
        reference.mix_patches(*exact, *geometry.window),
    )
    assert_close(h.detach(), want.detach(), dtype, "h")
    wanted = torch.autograd.grad(want, exact, of_h.cpu().double())
    for name, result, of_exact in zip(
        ("x", "scale", "shift", "mix"), torch.autograd.grad(h, inputs, of_h), wanted
    ):
        assert_close(result, of_exact, dtype, f"gradient of {name}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape, window", [*NORMED, ((8, 64, 112, 112), 2), ((8, 256, 56, 56), 1)], ids=str)
def test_norm_relu(shape: tuple, window: int, dtype: torch.dtype, training: bool) -> None:
    tensors, statistics, of_y = norm_case(shape, window, dtype, training)
    exact = [t.double().requires_grad_() for t in tensors]
    given = [t if t is None else t.double() for t in statistics]
    want = reference.norm_relu(*exact, *given, 1e-5, window)[0]
    inputs = [t.cuda().requires_grad_() for t in tensors]
    known = [t if t is None else t.cuda() for t in statistics]
    y = norm.norm_relu(*inputs, *known, 1e-5, window)[0]
    assert_close(y.detach(), want.detach(), dtype, "y")
    wanted = torch.autograd.grad(want, exact, of_y.double())
    for name, result, of_exact in zip(
        ("x", "gamma", "beta"), torch.autograd.grad(y, inputs, of_y.cuda()), wanted
    ):
        assert_close(result, of_exact, dtype if name == "x" else inputs[1].dtype, f"gradient of {name}")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", TRANSFORMS, ids=str)
def test_bilinear_transform(sizes: tuple, dtype: torch.dtype, channels_last: bool) -> None:
    x, p, q, of_y = (t.cuda() for t in transform_case(sizes, dtype))
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    inputs = [t.requires_grad_() for t in (x, p, q)]
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    y, want = bat.bilinear_transform(*inputs), reference.bilinear_transform(*exact)
    assert y.stride() == x.stride()
    assert_close(y.detach(), want.detach(), dtype, "y")
    wanted = torch.autograd.grad(want, exact, of_y.cpu().double())
    for name, result, of_exact in zip("xpq", torch.autograd.grad(y, inputs, of_y), wanted):
        assert_close(result, of_exact, dtype, f"gradient of {name}")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(2, 9, 3), (1, 1, 1), (4, 25, 49), (3, 5, 196)])
def test_weighted_sum_and_square_sum(shape: tuple, dtype: torch.dtype) -> None:
    query, value = ((3 * torch.randn(shape)).to(dtype).cuda().requires_grad_() for _ in "qv")
    exact = [t.detach().cpu().double().requires_grad_() for t in (query, value)]
    y, want = noah.weighted_sum(query, value), reference.weighted_sum(*exact)
    assert_close(y.detach(), want.detach(), dtype, "y")
    wanted = torch.autograd.grad(want.sum(), exact)
    for result, of_exact in zip(torch.autograd.grad(y.sum(), (query, value)), wanted):
        assert_close(result, of_exact, dtype, "gradient")
    power = torch.rand(shape[-1], dtype=torch.promote_types(dtype, torch.float32))
    y, want = fbn.square_sum(value, power.cuda()), reference.square_sum(exact[1], power.double())
    assert_close(y.detach(), want.detach(), dtype, "y")


def test_more_numbers_than_an_int_counts() -> None:
    """Offsets beyond 2³¹: the last image's result is that of the image alone."""
    images, channels, side = 5, 64, 2600  # 2.2·10⁹ numbers
    x = (
        torch.randn(1, channels, side, side, device="cuda", dtype=torch.float16)
        .expand(images, -1, -1, -1)
        .contiguous()
    )
    assert x.numel() > 2**31
    y = san.padded_subtraction2(x, x, 1, 1, 1)
    assert not y.any()
    weight = torch.randn(images, 1, 1, side**2, device="cuda", dtype=torch.float16)
    y = san.padded_aggregation(x, weight, 1, 1, 1)
    torch.testing.assert_close(y[-1:], x[-1:] * weight[-1:].view(1, 1, side, side))


def step(case: Pairwise) -> torch.Tensor:
    y = pairwise.pairwise_attention(*case.tensors, *case.statistics, *case.rest)[0]
    return y.float().square().mean()


def test_one_compiled_graph() -> None:
    case = pairwise_case(SAN_STAGES[1], Geometry(14, 14, 7), torch.float32).on("cuda")
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(case), step(case))


def test_in_a_cuda_graph() -> None:
    case = pairwise_case(SAN_STAGES[1], Geometry(14, 14, 7), torch.float32).on("cuda")
    want = step(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case)
    captured.zero_()
    graph.replay()
    torch.testing.assert_close(captured, want)


def test_on_several_streams() -> None:
    cases = [
        pairwise_case(SAN_STAGES[1], Geometry(14, 14 + i, 7), torch.float32).on("cuda") for i in range(4)
    ]
    wanted = [step(case) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    results = []
    for case, stream in zip(cases, streams):
        with torch.cuda.stream(stream):
            results.append(step(case))
    torch.cuda.synchronize()
    torch.testing.assert_close(results, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_the_second_gpu() -> None:
    case = pairwise_case(SAN_STAGES[1], Geometry(9, 9, 3), torch.float32)
    torch.testing.assert_close(step(case.on("cuda:1")).cpu(), step(case.on("cuda:0")).cpu())


def test_operators_are_good_citizens() -> None:
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    for module, value in ((SMALL[0], torch.float32), (ON_TENSOR_CORES[0], torch.bfloat16)):
        case = pairwise_case(module, Geometry(4, 5, 3), value).on("cuda")
        tensors = [x.requires_grad_() for x in case.tensors]
        torch.library.opcheck(
            pairwise.pairwise_attention, (*tensors, *case.statistics, *case.rest), test_utils=utilities
        )
    a, b, weight = (x.cuda().requires_grad_() for x in san_case(Geometry(4, 5, 3), torch.float32))
    torch.library.opcheck(san.padded_subtraction2, (a, b, 3, 1, 1))
    torch.library.opcheck(san.padded_aggregation, (a, weight, 3, 1, 1))


def test_an_empty_batch() -> None:
    a, b, weight = (x[:0].cuda() for x in san_case(Geometry(4, 5, 3), torch.float32))
    assert san.padded_subtraction2(a, b, 3, 1, 1).shape == (0, 6, 9, 20)
    assert san.padded_aggregation(a, weight, 3, 1, 1).shape == (0, 6, 4, 5)
    case = pairwise_case(SMALL[0], Geometry(4, 5, 3), torch.float32, training=False, images=0).on("cuda")
    assert pairwise.pairwise_attention(*case.tensors, *case.statistics, *case.rest)[0].shape == (0, 8, 4, 5)
