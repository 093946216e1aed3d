"""Gradient checkpointing that gives what an ordinary pass gives, running statistics included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def recomputed(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    """``x`` through all ``blocks``, of which only the input is kept and the rest computed again in backward.

    Batch norms count the batch once, as they do without checkpointing.
    """
    contexts: dict[str, Any] = {}
    if not torch.compiler.is_compiling():  # compiled code does not write to buffers when it recomputes
        contexts = {"context_fn": lambda: (nullcontext(), _kept_statistics(blocks))}
    return checkpoint(_run, blocks, x, use_reentrant=False, **contexts)


def _run(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


@contextmanager
def _kept_statistics(blocks: Sequence[nn.Module]) -> Iterator[None]:
    # Norms must go on getting their statistics: checkpoint compares the number of tensors kept.
    norms = [
        m for block in blocks for m in block.modules() if isinstance(m, _NormBase) and m.track_running_stats
    ]
    before: list[Any] = [(norm.momentum, cast(Tensor, norm.num_batches_tracked).clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before):
            norm.momentum = momentum
            cast(Tensor, norm.num_batches_tracked).copy_(batches)
