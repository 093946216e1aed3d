"""The names that the FBN paper's MXNet programs gave their parameters, in this project's.

MXNet's own file format is not read here: ``mxnet.nd.load`` gives a file's arrays by name, to be saved as tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from common.weights import StateDict

_NAME = re.compile(r"(?:arg:|aux:)?(\w+?)_(weight|bias|gamma|beta|moving_mean|moving_var)")
_TENSORS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}


def from_mxnet(state: StateDict, own_layer: Callable[[str], str | None]) -> StateDict:
    """``state`` with MXNet's names replaced: ``arg:bn0_gamma`` → ``norm.weight`` where ``bn0`` is ``norm``.

    Args:
        own_layer: MXNet's name of a layer → ours; None where there is no such layer.

    Returns:
        All entries, those of other names as they are.
    """
    out: StateDict = {}
    for key, value in state.items():
        match = _NAME.fullmatch(key)
        layer = own_layer(match[1]) if match else None
        if match is None or layer is None:
            out[key] = value
            continue
        out[f"{layer}.{_TENSORS.get(match[2], match[2])}"] = value
    # One weight of a factorized bilinear layer is (J, K, C), in files perhaps with the kernel's 1 × 1 behind it.
    if "head.bilinear.weight" in out:
        out["head.bilinear.weight"] = out["head.bilinear.weight"].flatten(2)
    return out


def head_layer(layer: str) -> str | None:
    """Ours for MXNet's names of the classifiers' layers; None for another layer."""
    if layer in ("bilinear", "bilinear1"):
        return "head.bilinear"
    return "head.fc" if layer in ("fc", "fc1", "conv_fc", "cifar_fc8") else None
