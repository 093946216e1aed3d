"""A published FBN network's parameters under the names that MXNet saves them by."""

from __future__ import annotations

import torch
from torch import Tensor


def mxnet_state(shapes: list[tuple[str, str, list[int]]], device: str = "cpu") -> dict[str, Tensor]:
    """``shapes`` of ``fbn_params.json`` → tensors; all values of the one at index i are i, statistics' too."""
    state = {}
    for i, (layer, kind, shape) in enumerate(shapes):
        state[f"arg:{layer}_{kind}"] = torch.full(shape, float(i), device=device)
        if kind == "gamma":
            for statistic in ("moving_mean", "moving_var"):
                state[f"aux:{layer}_{statistic}"] = torch.full(shape, float(i), device=device)
    return state
