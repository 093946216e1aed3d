"""Compiling CUDA sources at run time and starting their kernels; when they run and when the reference does.

NVRTC compiles a source of ``kernels/cuda`` for the device at hand, once per set of compile-time numbers: sizes of
batches and images are arguments. What was compiled is kept in ``$XDG_CACHE_HOME/pairwise`` under a name made of source,
numbers and architecture.

The environment variable ``PAIRWISE_KERNELS`` chooses: ``auto`` (the default) runs a kernel wherever one can run, and
says once why not; ``reference`` never does; ``cuda`` makes it an error that one cannot run.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import KernelError

MODES = ("auto", "cuda", "reference")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""What the tests compile for."""
TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
"""How CUDA sources call what tensors hold."""

Argument = Tensor | ctypes.Structure | ctypes.c_int
"""What a kernel takes."""

_SOURCES = Path(__file__).parent / "cuda"
# Of CUDA's CUfunction_attribute and cudaDeviceAttr.
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97
_log = logging.getLogger("pairwise.kernels")


class Kernel(NamedTuple):
    """A kernel of a source in ``kernels/cuda``, with its compile-time numbers and types."""

    source: str
    name: str
    defines: tuple[tuple[str, str], ...]


def mode() -> str:
    """The value of ``PAIRWISE_KERNELS``.

    Raises:
        KernelError: it is not one of :data:`MODES`.
    """
    chosen = os.environ.get("PAIRWISE_KERNELS", "auto")
    if chosen not in MODES:
        raise KernelError(f"PAIRWISE_KERNELS is {chosen!r}, expected one of {', '.join(MODES)}")
    return chosen


def runs(device: torch.device, lacking: str | None) -> bool:
    """Whether a kernel runs on ``device``; ``lacking`` says why none takes this shape, None when one does.

    Raises:
        KernelError: none does, and ``PAIRWISE_KERNELS=cuda``.
    """
    chosen = mode()
    if chosen == "reference":
        return False
    lacking = f"tensors are on {device.type}" if device.type != "cuda" else missing() or lacking
    if lacking is None:
        return True
    if chosen == "cuda":
        raise KernelError(f"PAIRWISE_KERNELS=cuda, but no kernel can run: {lacking}")
    if device.type == "cuda":  # on a CPU the reference is what everyone expects
        _say_once(f"the reference runs in place of a kernel: {lacking}")
    return False


@lru_cache
def missing() -> str | None:
    """What this machine lacks for kernels to run, in a few words."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        import cupy  # noqa: F401
    except Exception as error:  # an ImportError, or whatever its CUDA libraries raise
        return f"CuPy cannot be imported ({str(error).splitlines()[0]})"
    return None


@lru_cache
def tensor_cores(device: torch.device) -> bool:
    """Whether ``device`` multiplies matrices of bfloat16 (compute capability 8.0 and above)."""
    return device.type == "cuda" and missing() is None and torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory a block can have on ``device``."""
    from cupy.cuda import runtime

    return int(runtime.deviceGetAttribute(_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device.index))


def launch(
    kernel: Kernel,
    grid: int,
    block: tuple[int, int, int],
    shared_bytes: int,
    *arguments: Argument,
) -> None:
    """Start ``kernel`` on the current stream of the first argument's device.

    Args:
        grid: blocks; nothing happens for 0.
        block: threads along each axis.
        shared_bytes: of dynamic shared memory.
        arguments: tensors, and numbers and structures that are passed by value.
    """
    if grid == 0:
        return
    from cupy.cuda import runtime
    from cupy_backends.cuda.api import driver

    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device(device):
        runtime.setDevice(
            device.index
        )  # binds the context to a thread that has not used it, as autograd's may be
        function = _function(kernel, device.index, shared_bytes)
        stream = torch.cuda.current_stream(device).cuda_stream
        values, pointers = parameters(arguments)
        driver.launchKernel(function, grid, 1, 1, *block, shared_bytes, stream, ctypes.addressof(pointers), 0)
        del values  # alive until here: the driver has copied them


def parameters(arguments: tuple[Argument, ...]) -> tuple[list, ctypes.Array]:
    """Arguments as the driver wants them: an array of pointers to values, and the values, which must outlive it."""
    values = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments]
    return values, (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))


def compiled(source: str, defines: tuple[tuple[str, str], ...], architecture: str) -> bytes:
    """The machine code (cubin) of a source in ``kernels/cuda``, from the cache on disk or from NVRTC.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    text = (_SOURCES / source).read_text()
    headers = {path.name: path.read_text() for path in sorted(_SOURCES.glob("*.cuh"))}
    options = ("-std=c++17", f"-arch={architecture}", *(f"-D{name}={value}" for name, value in defines))
    from cupy.cuda import nvrtc

    key = hashlib.sha256(repr((text, headers, options, nvrtc.getVersion())).encode()).hexdigest()
    file = cache_folder() / f"{Path(source).stem}-{key[:32]}.cubin"
    try:
        return file.read_bytes()
    except OSError:
        pass
    _say_once(f"compiling CUDA kernels for {architecture}: some seconds, once on this machine")
    program = nvrtc.createProgram(
        text,
        source,
        tuple(body.encode() for body in headers.values()),
        tuple(name.encode() for name in headers),
    )
    try:
        nvrtc.compileProgram(program, options)
        code = bytes(nvrtc.getCUBIN(program)) + b"\0"  # CuPy takes the last byte for the end of a string
    except nvrtc.NVRTCError as error:
        raise RuntimeError(
            f"{source} with {dict(defines)}: {error}\n{nvrtc.getProgramLog(program)}"
        ) from None
    finally:
        nvrtc.destroyProgram(program)
    _keep(file, code)
    return code


def cache_folder() -> Path:
    """Where compiled code is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pairwise" / "kernels"


@cache
def _function(kernel: Kernel, device: int, shared_bytes: int) -> int:
    from cupy_backends.cuda.api import driver

    function = driver.moduleGetFunction(_module(kernel.source, kernel.defines, device), kernel.name)
    if shared_bytes > 48 << 10:  # above this, a kernel must ask
        driver.funcSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
    return function


@cache
def _module(source: str, defines: tuple[tuple[str, str], ...], device: int) -> int:
    from cupy_backends.cuda.api import driver

    major, minor = torch.cuda.get_device_capability(device)
    return driver.moduleLoadData(compiled(source, defines, f"sm_{major}{minor}"))


def _keep(file: Path, code: bytes) -> None:
    """Write ``code`` under a temporary name, then rename; a cache that cannot be written is no error."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
            temporary.write(code)
        os.replace(temporary.name, file)
    except OSError as error:
        _say_once(f"compiled kernels are not kept: {error}")


@cache
def _say_once(line: str) -> None:
    _log.warning("%s", line)
