"""Weights of image networks for video networks: 2-D kernels inflated along time.

Carreira and Zisserman, "Quo Vadis, Action Recognition?", CVPR 2017: a kernel repeated kt times and divided by kt
gives on a clip whose frames are all alike what the image network gives on the frame.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from common.weights import LoadReport, StateDict, WeightsError, architecture, read_state_dict

# The image non-local block's names and the video one's; BAT blocks have the same names in both.
_NON_LOCAL = {"t": ("theta",), "p": ("phi.1", "phi"), "g": ("g.1", "g"), "z": ("W.0",), "bn": ("W.1",)}
_NON_LOCAL_KEY = re.compile(rf"(.*\.nl\d+)\.({'|'.join(_NON_LOCAL)})\.([a-z_]+)")


@dataclass
class InflateReport(LoadReport):
    """What inflating did, by the model's names. True when anything but the classifier differs.

    ``inflated`` and ``matched`` are loaded; ``missing``, ``misshapen`` and ``classifier`` are as they were;
    ``unexpected`` are names of the source that the model does not have.
    """

    inflated: list[str] = field(default_factory=list)
    matched: list[str] = field(default_factory=list)
    classifier: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.inflated)} inflated, {len(self.matched)} matched", super().__str__()]
        if self.classifier:
            parts.append(f"left, of other classes: {', '.join(self.classifier)}")
        return "; ".join(part for part in parts if part)


def inflate(state: Mapping[str, Tensor], model: nn.Module) -> tuple[StateDict, InflateReport]:
    """A state dict of an image network as one of ``model``, a video network.

    A kernel (O, I, kh, kw) becomes (O, I, kt, kh, kw), repeated kt times and divided by kt; a linear layer's
    (O, I) becomes (O, I, 1, 1, 1). Tensors of equal names and shapes are taken as they are, 5-D ones included.
    Names of image non-local blocks are translated.

    Args:
        state: names and tensors of the image network.
        model: tells the names and shapes that are wanted.

    Returns:
        What fits ``model``, in its names, and the report. Nothing is loaded yet.
    """
    wanted, head = model.state_dict(), _classifier(model)
    given = {_own_name(key, wanted): value for key, value in state.items()}
    fitting: StateDict = {}
    report = InflateReport(
        # Counters, which old checkpoints do not have.
        missing=[key for key in wanted if key not in given and not key.endswith("num_batches_tracked")],
        unexpected=[key for key in given if key not in wanted],
    )
    for key, own in wanted.items():
        if key not in given:
            continue
        value = given[key]
        inflated = _inflated(value, own)
        if inflated is not None:
            fitting[key] = inflated
            (report.matched if inflated is value else report.inflated).append(key)
        elif key.startswith(head) and value.shape[0] != own.shape[0]:
            report.classifier.append(key)
        else:
            report.misshapen.append(f"{key} {tuple(value.shape)} for {tuple(own.shape)}")
    return fitting, report


def load_inflated(
    model: nn.Module, source: str | Path | Mapping[str, object], strict: bool = True
) -> InflateReport:
    """Initialise a video network from a checkpoint of an image network; see :func:`inflate`.

    Args:
        model: a video network; its classifier is left as it is where the source has another number of classes.
        source: path (``.pth``, ``.pt``, ``.tar``, ``.safetensors``) or state dict.
        strict: raise on any missing, unexpected or misshapen key; else load what fits.

    Returns:
        What was inflated, what matched, and what was not loaded, by name.

    Raises:
        WeightsError: the file cannot be read, ``strict`` and keys differ (all are named), or nothing fits.
    """
    fitting, report = inflate(read_state_dict(source), model)
    name = architecture(model) or type(model).__name__
    where = str(source) if isinstance(source, (str, Path)) else "state dict"
    if (report and strict) or not fitting:
        raise WeightsError(f"{where} does not fit {name}: {report}")
    model.load_state_dict(fitting, strict=False)
    return report


def _inflated(value: Tensor, own: Tensor) -> Tensor | None:
    """``value`` in the shape of ``own``, ``value`` itself where it has that; None where it cannot be."""
    if value.shape == own.shape:
        return value
    if own.ndim != 5 or value.ndim not in (2, 4) or value.shape[:2] != own.shape[:2]:
        return None
    kernel = value if value.ndim == 4 else value[..., None, None]
    if kernel.shape[2:] != own.shape[3:]:
        return None
    time = own.shape[2]
    return kernel.unsqueeze(2).repeat(1, 1, time, 1, 1) / time


def _own_name(key: str, wanted: Mapping[str, Tensor]) -> str:
    found = _NON_LOCAL_KEY.fullmatch(key)
    if key in wanted or found is None:
        return key
    block, layer, parameter = found.groups()
    names = (f"{block}.{name}.{parameter}" for name in _NON_LOCAL[layer])
    return next((name for name in names if name in wanted), key)


def _classifier(model: nn.Module) -> str:
    """The prefix of the classifier's names."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return f"{cfg.get('classifier') or 'fc'}."
