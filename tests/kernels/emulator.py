"""CUDA sources of the repository, compiled by g++ and run on CPU tensors: see cuda_on_cpu.h."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from torch import Tensor

from kernels.runtime import Kernel, parameters

BACKWARDS = False
"""Whether threads take turns from the last to the first."""

SOURCES = Path(__file__).parents[2] / "kernels" / "cuda"
WRAPPER = """
#include <utility>
template <auto K> struct Call;
template <class... A, void (*K)(A...)> struct Call<K> {
    template <size_t... I> static void with(void** p, std::index_sequence<I...>) { K(*static_cast<A*>(p[I])...); }
    static void run(void** p) { with(p, std::index_sequence_for<A...>{}); }
};
extern "C" void take_turns(bool last_first) { backwards = last_first; }
extern "C" void run(const char* name, unsigned grid, const unsigned* block, size_t shared_bytes, void** arguments) {
    dim3 blocks, threads;
    blocks.x = grid; threads.x = block[0]; threads.y = block[1]; threads.z = block[2];
CASES
    fprintf(stderr, "no kernel is called %s\\n", name);
    exit(5);
}
"""
CASE = '    if (!strcmp(name, "{0}")) return launch_on_cpu(Call<{0}>::run, blocks, threads, shared_bytes, arguments);'


def names(source: str) -> list[str]:
    """The kernels in a source."""
    return re.findall(
        r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s)?(\w+)\(', (SOURCES / source).read_text()
    )


def launch(
    kernel: Kernel,
    grid: int,
    block: tuple[int, int, int],
    shared_bytes: int,
    *arguments: Tensor | ctypes.Structure,
) -> None:
    """As :func:`kernels.runtime.launch`, on CPU tensors."""
    for x in arguments:
        if isinstance(x, Tensor):
            assert x.device.type == "cpu"
            assert x.untyped_storage().nbytes() >= x.numel() * x.itemsize  # no expanded tensor
    values, pointers = parameters(arguments)
    code = library(kernel.source, kernel.defines)
    code.take_turns(ctypes.c_bool(BACKWARDS))
    code.run(kernel.name.encode(), grid, (ctypes.c_uint * 3)(*block), ctypes.c_size_t(shared_bytes), pointers)
    del values


@cache
def library(source: str, defines: tuple[tuple[str, str], ...]) -> ctypes.CDLL:
    """A source of ``kernels/cuda`` for the CPU."""
    cases = "\n".join(CASE.format(name) for name in names(source))
    head = Path(__file__).with_name("cuda_on_cpu.h").read_text()
    lines = [head, *(f"#define {name} {value}" for name, value in defines)]
    text = "\n".join([*lines, f'#include "{source}"', WRAPPER.replace("CASES", cases)])
    parts = text + "".join(path.read_text() for path in sorted(SOURCES.iterdir()))
    folder = Path(tempfile.gettempdir()) / f"pairwise-emulator-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    file = folder / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.so"
    if not file.exists():
        own = file.with_suffix(f".{os.getpid()}")
        command = [
            "g++",
            "-std=c++17",
            "-O1",
            "-w",
            "-shared",
            "-fPIC",
            "-x",
            "c++",
            f"-I{SOURCES}",
            "-",
            "-o",
            str(own),
        ]
        subprocess.run(command, input=text, text=True, check=True)
        own.replace(file)
    return ctypes.CDLL(str(file))
