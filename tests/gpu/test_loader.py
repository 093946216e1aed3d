"""Batches that a stream of its own copies to the GPU while another is used. Needs what the project needs, and a GPU."""

from __future__ import annotations

import pytest
import torch

loader = pytest.importorskip("common.data.loader")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_every_batch_arrives_whole_and_in_order() -> None:
    device = torch.device("cuda", 0)
    batches = [
        (torch.full((64, 3, 64, 64), n).pin_memory(), torch.tensor([n]).pin_memory(), []) for n in range(20)
    ]
    sums = []
    for inputs, targets, unreadable in loader._copied_ahead(iter(batches), device):
        busy = torch.randn(2000, 2000, device=device)
        for _ in range(5):
            busy = busy @ busy
        sums.append((inputs.double().mean(), targets))
        assert unreadable == []
    assert [(int(mean), int(target)) for mean, target in sums] == [(n, n) for n in range(20)]
