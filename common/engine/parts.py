"""Tensors in parts: what a rank has of each is a contiguous range of its elements, and every rank writes its own.

FSDP divides tensors by rows and ZeRO by elements, so that both are ranges in row-major order. A file of parts is
safetensors with one-dimensional tensors, and under ``parts`` in its metadata ``{name: [offset, *shape]}`` as JSON. (The
files of torch.distributed.checkpoint are described by a pickle, which can run code.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A range of a tensor's elements."""

    data: Tensor
    """The elements, in order; their own shape does not count."""
    shape: tuple[int, ...]
    """The whole tensor's shape."""
    offset: int
    """Where the range begins in the whole tensor, flattened."""

    @property
    def stop(self) -> int:
        """Where the range ends."""
        return self.offset + self.data.numel()


def encode(tensors: Mapping[str, Tensor | Part]) -> bytes:
    """A file of parts; a tensor is a part that is all of it."""
    parts = {
        name: value if isinstance(value, Part) else Part(value, tuple(value.shape), 0)
        for name, value in tensors.items()
    }
    about = json.dumps({name: [part.offset, *part.shape] for name, part in parts.items()})
    flat = {name: part.data.detach().cpu().reshape(-1).clone() for name, part in parts.items()}
    return save(flat, {"format": "pt", "parts": about})


class Stored:
    """Tensors in one or several files, of which only what is asked for is read."""

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[int, Tensor]]] = {}

    def add(self, name: str, part: Part) -> None:
        """Take in a part of the tensor ``name``; its data may be a memory-mapped file's."""
        self._shapes[name] = part.shape
        self._pieces.setdefault(name, []).append((part.offset, part.data))

    def add_file(self, path: Path) -> None:
        """Take in all of a safetensors file: one of parts, or of whole tensors."""
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("parts", "{}"))
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                data = file.get_tensor(name)
                offset, *shape = about.get(name, (0, *data.shape))
                self.add(name, Part(data, tuple(shape), offset))

    def __iter__(self) -> Iterator[str]:
        """The tensors' names."""
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self._shapes[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """A range of a tensor's elements, flat, in memory of its own.

        Raises:
            ValueError: they are not all there.
        """
        pieces = self._pieces.get(name, [])
        found = torch.empty(stop - start, dtype=pieces[0][1].dtype if pieces else None)
        count = 0
        for offset, data in pieces:
            first, last = max(start, offset), min(stop, offset + data.numel())
            if first < last:
                found[first - start : last - start] = data.reshape(-1)[first - offset : last - offset]
                count += last - first
        if not pieces or count != stop - start:
            raise ValueError(f"{name}: {count} elements are there of {stop - start}")
        return found

    def whole(self, name: str) -> Tensor:
        """A whole tensor, in the memory format that it was stored in; raises as :meth:`read`."""
        shape, pieces = self._shapes.get(name, ()), self._pieces.get(name, [])
        if len(pieces) == 1 and pieces[0][1].shape == shape:
            return pieces[0][1].clone()
        return self.read(name, 0, math.prod(shape)).view(shape)

    def fill(self, name: str, own: Tensor | Part) -> None:
        """Copy a tensor, or the part that ``own`` is, into ``own``; raises as :meth:`read`."""
        if isinstance(own, Part):
            own.data.copy_(self.read(name, own.offset, own.stop).view(own.data.shape))
        else:
            own.copy_(self.whole(name))
