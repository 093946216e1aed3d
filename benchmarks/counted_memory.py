"""Memory of a training step, counted and not measured: `python benchmarks/counted_memory.py`.

Every allocation of the second step of SGD is added up, on tensors without data (torch's FakeTensorMode), with the
operators' kernels taken for granted. What a library or a kernel needs for itself while it runs is not in it.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import image.models  # noqa: F401
from kernels import runtime

NETWORKS = {
    "san10_pairwise": 64,
    "san19_pairwise": 64,
    "san10_patchwise": 64,
    "san19_patchwise": 64,
    "resnet50_bat": 128,
    "resnet50": 128,
}
BLOCK = 512  # bytes; torch's allocator gives multiples


class Allocations(TorchDispatchMode):
    """The bytes that are in use, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, Tensor):
                self._seen(x.untyped_storage())
        return results

    def _seen(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = -(-storage.nbytes() // BLOCK) * BLOCK
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def peak_of_a_step(name: str, batch: int, half: bool) -> int:
    """Bytes of a training step on 224² images, in bfloat16 and channels last or in float32 and channels first."""
    layout = torch.channels_last if half else torch.contiguous_format
    with FakeTensorMode(), Allocations() as allocations:
        model = timm.create_model(name, num_classes=1000)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=False)
        images = torch.randn(batch, 3, 224, 224).contiguous(memory_format=layout)
        targets = torch.randint(1000, (batch,))
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = nn.functional.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return allocations.peak


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="by default some of the papers")
    arguments = parser.parse_args()
    runtime.runs = lambda device, lacking: lacking is None
    runtime.tensor_cores = lambda device: True  # type: ignore[assignment]
    print("| network | images | bfloat16, GiB | float32, GiB |\n|---|---|---|---|")
    for name in arguments.models or NETWORKS:
        batch = NETWORKS.get(name, 64)
        half, single = (peak_of_a_step(name, batch, half) / 2**30 for half in (True, False))
        print(f"| {name} | {batch} | {half:.1f} | {single:.1f} |", flush=True)


if __name__ == "__main__":
    main()
