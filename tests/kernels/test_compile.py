"""Every CUDA source compiles for every supported architecture, with NVRTC, on a machine without a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels import bat, differences, fbn, noah, norm, pairwise_mma, pairwise_simt, patchwise, runtime, san
from tests.kernels.cases import ON_TENSOR_CORES, SAN_STAGES, SMALL, Module
from tests.kernels.emulator import names

pytest.importorskip("cupy")
pytestmark = pytest.mark.xdist_group("compile")


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def check(source: str, defines: tuple[tuple[str, str], ...], architecture: str) -> None:
    code = runtime.compiled(source, defines, architecture)
    assert code[:4] == b"\x7fELF"
    assert names(source)
    for name in names(source):
        assert f".text.{name}".encode() in code


@pytest.mark.parametrize("architecture", runtime.ARCHITECTURES)
@pytest.mark.parametrize("value", runtime.TYPES)
@pytest.mark.parametrize("source", [san.SOURCE, noah.SOURCE, fbn.SOURCE])
def test_sources_without_sizes(source: str, value: torch.dtype, architecture: str) -> None:
    check(source, (("VALUE", runtime.TYPES[value]),), architecture)


@pytest.mark.parametrize("architecture", runtime.ARCHITECTURES)
@pytest.mark.parametrize("real", ["float", "double"])
def test_moments_of_differences(real: str, architecture: str) -> None:
    check(differences.SOURCE, (("REAL", real),), architecture)


@pytest.mark.parametrize("architecture", runtime.ARCHITECTURES)
@pytest.mark.parametrize("vector, value", [(8, torch.bfloat16), (4, torch.float32), (2, torch.float64)])
@pytest.mark.parametrize("window", [1, 2])
def test_norm(window: int, vector: int, value: torch.dtype, architecture: str) -> None:
    for at_once in (vector, 1):
        check(norm.SOURCE, norm.defines(at_once, window, value), architecture)


@pytest.mark.parametrize("architecture", runtime.ARCHITECTURES)
@pytest.mark.parametrize(
    "side, value", [(7, torch.bfloat16), (bat.LARGEST_SIDE, torch.float32), (bat.LARGEST_SIDE, torch.float64)]
)
def test_bilinear_transform(side: int, value: torch.dtype, architecture: str) -> None:
    check(bat.SOURCE, bat.defines(side, side, value), architecture)


@pytest.mark.parametrize("architecture", runtime.ARCHITECTURES)
@pytest.mark.parametrize("value", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "outputs, kernel_size", [(2, 3), (8, 7), pytest.param(64, 7, marks=pytest.mark.slow)]
)
def test_mix_patches(outputs: int, kernel_size: int, value: torch.dtype, architecture: str) -> None:
    check(patchwise.SOURCE, patchwise.defines(outputs, kernel_size, value), architecture)


def defines_of(module: Module, value: torch.dtype) -> tuple[tuple[str, str], ...]:
    how = pairwise_simt.plan(*module[:3], module.share * module.weights, value)
    assert isinstance(how, pairwise_simt.Plan)
    return how.defines


@pytest.mark.parametrize("architecture", runtime.ARCHITECTURES)
def test_pairwise_attention(architecture: str) -> None:
    check(pairwise_simt.SOURCE, defines_of(SAN_STAGES[0], torch.bfloat16), architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", runtime.ARCHITECTURES)
@pytest.mark.parametrize("value", runtime.TYPES)
@pytest.mark.parametrize("module", SAN_STAGES + SMALL, ids=str)
def test_pairwise_attention_of_every_module(module: Module, value: torch.dtype, architecture: str) -> None:
    check(pairwise_simt.SOURCE, defines_of(module, value), architecture)


@pytest.mark.parametrize("architecture", runtime.ARCHITECTURES)
@pytest.mark.parametrize(
    "module",
    [ON_TENSOR_CORES[0], *(pytest.param(m, marks=pytest.mark.slow) for m in ON_TENSOR_CORES[1:])],
    ids=str,
)
def test_pairwise_attention_on_tensor_cores(module: Module, architecture: str) -> None:
    how = pairwise_mma.plan(*module[:3], module.share * module.weights, torch.bfloat16)
    assert how is not None
    assert how.shared_bytes <= 48 << 10  # what every device gives without being asked
    for source in (pairwise_mma.SOURCE, pairwise_mma.GRADIENTS):
        check(source, how.defines, architecture)


def test_what_was_compiled_is_kept(tmp_path, monkeypatch) -> None:
    defines = (("VALUE", "float"),)
    code = runtime.compiled(san.SOURCE, defines, "sm_90")
    (file,) = runtime.cache_folder().iterdir()
    assert file.read_bytes() == code
    file.write_bytes(b"from the cache")
    assert runtime.compiled(san.SOURCE, defines, "sm_90") == b"from the cache"
    assert runtime.compiled(san.SOURCE, defines, "sm_80") != b"from the cache"


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch) -> None:
    (tmp_path / "pairwise").write_text("in the way")
    check(san.SOURCE, (("VALUE", "float"),), "sm_90")


def test_what_does_not_compile_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"san.cu with \{'VALUE': 'quaternion'\}[\s\S]*undefined"):
        runtime.compiled(san.SOURCE, (("VALUE", "quaternion"),), "sm_90")
