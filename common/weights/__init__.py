"""Published, own and foreign weights: read as data, translated, loaded, and every difference named.

Nothing here ever unpickles code: files are read by safetensors or by ``torch.load(weights_only=True)``.
`python -m common.weights` converts files.
"""

from __future__ import annotations

import argparse
import re
import tarfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from common.engine.checkpoint import damage, holds, load, newest
from common.errors import UserError

StateDict = dict[str, Tensor]
Layout = Callable[[StateDict], StateDict]

_LAYOUTS: dict[str, Layout] = {}
_WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema")

# What training programs put beside the weights: their command line, and accuracies as NumPy's numbers.
_SCALAR = np.float64(0).__reduce__()[0]
_PLAIN_DATA: list[Any] = [
    argparse.Namespace,
    *((PosixPath, f"pathlib{part}.PosixPath") for part in ("", "._local")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in "fdilq"),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
_MXNET = bytes.fromhex("1201000000000000")


def published_layout(*names: str) -> Callable[[Layout], Layout]:
    """Register a function that translates published keys and shapes to those of the models ``names``.

    The function gets a state dict without wrappers and ``module.`` prefixes and returns a new one.
    Models without a registered layout use the published keys as they are.
    """

    def register(layout: Layout) -> Layout:
        for name in names:
            if name in _LAYOUTS:
                raise ValueError(f"published layout of {name!r} is registered twice")
            _LAYOUTS[name] = layout
        return layout

    return register


class WeightsError(UserError):
    """A weight file that cannot be used; the message is one line for the user."""


@dataclass
class LoadReport:
    """What loading did: keys by name."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """True when anything differs."""
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        parts = [("missing", self.missing), ("unexpected", self.unexpected), ("misshapen", self.misshapen)]
        return "; ".join(f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in parts if keys)


def read_state_dict(source: str | Path | Mapping[str, object]) -> StateDict:
    """Read a flat ``{name: tensor}`` from a file or mapping.

    Wrapper dicts (``state_dict``, ``model``) are opened and ``module.`` prefixes dropped.

    Raises:
        WeightsError: the file is missing, is not a checkpoint, or carries anything but plain data.
    """
    content = _read_file(Path(source)) if isinstance(source, (str, Path)) else source
    for wrapper in _WRAPPERS:
        inner = content.get(wrapper)
        if isinstance(inner, Mapping):
            content = inner
            break
    state = {
        str(key).removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)
    }
    if not state:
        raise WeightsError(
            f"{_where(source)}: no tensors found; expected a state dict or one under {_WRAPPERS}"
        )
    return state


def load_published(
    model: nn.Module, source: str | Path | Mapping[str, object], strict: bool = True
) -> LoadReport:
    """Load a checkpoint in the published layout of ``model``'s architecture.

    Args:
        model: a network from ``timm.create_model``; its architecture's name picks the layout.
        source: path (``.pth``, ``.pt``, ``.tar``, ``.safetensors``) or state dict.
        strict: raise on any missing, unexpected or misshapen key; else load what fits.

    Returns:
        The keys that were not loaded, in the model's own names.

    Raises:
        WeightsError: the file cannot be read, or ``strict`` and keys differ. All keys are named.
    """
    state = read_state_dict(source)
    layout = _LAYOUTS.get(architecture(model))
    if layout is not None and not _converted(source):
        state = layout(state)
    return load_state(model, state, strict=strict, where=_where(source))


def load_state(
    model: nn.Module, state: StateDict, strict: bool = True, where: str = "state dict"
) -> LoadReport:
    """Load ``state`` (the model's own names) into ``model``; see :func:`load_published`."""
    own = model.state_dict()
    report = LoadReport(
        # PyTorch before 0.4.1 did not count batches; nothing but a cumulative average needs it.
        missing=[key for key in own if key not in state and not key.endswith(".num_batches_tracked")],
        unexpected=[key for key in state if key not in own],
        misshapen=[
            f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    )
    if report and strict:
        only_shapes = not (report.missing or report.unexpected)
        hint = "; to train from all that fits: --weights_strict false" if only_shapes else ""
        raise WeightsError(
            f"{where} does not fit {architecture(model) or type(model).__name__}: {report}{hint}"
        )
    fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    model.load_state_dict(fitting, strict=False)
    return report


def load_weights(model: nn.Module, path: str | Path, strict: bool = True) -> str:
    """Load weights of any kind that this project knows into ``model``.

    Args:
        path: a run's folder (its newest checkpoint), one checkpoint's folder, or a file: one of ours or a
            published checkpoint. Of a run's averaged weights (EMA) and the others the averaged are taken, of a
            published file's the others.
        strict: see :func:`load_published`.

    Returns:
        One line that says what was loaded, and names what was not.

    Raises:
        WeightsError: see :func:`load_published`.
    """
    folder = Path(path)
    if not folder.is_dir():
        report = load_published(model, path, strict=strict)
    else:
        path = _weights_file(folder)
        report = load_state(model, load(path.parent, path.name), strict=strict, where=str(path))
    return f"weights from {path}: " + (str(report) if report else "every key loaded")


def translated_models() -> list[str]:
    """The models whose published layout is registered, because it differs from ours."""
    return sorted(_LAYOUTS)


def architecture(model: nn.Module) -> str:
    """The name under which timm's registry made ``model``, or an empty string."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or "")


def _weights_file(folder: Path) -> Path:
    checkpoint = newest(folder / "checkpoints") if (folder / "checkpoints").is_dir() else folder
    if checkpoint == folder and (folder / "manifest.json").is_file() and (problem := damage(folder)):
        raise WeightsError(f"weights: {folder} is damaged ({problem})")
    for kind in ("ema", "model"):
        if checkpoint and holds(checkpoint, kind):
            return checkpoint / f"{kind}.safetensors"
    if (folder / "config.yaml").is_file():
        raise WeightsError(f"weights: the run {str(folder)!r} has no whole checkpoint yet")
    raise WeightsError(f"weights: {str(folder)!r} is neither a run's folder nor one of its checkpoints")


def _read_file(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        raise WeightsError(f"weights: {str(path)!r} does not exist or is not a file")
    try:
        _refuse_foreign(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN_DATA):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"{path}: {_reason(error)}") from None
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    return content


def _refuse_foreign(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(8) == _MXNET:
            raise WeightsError(
                f"{path}: MXNet's .params format is not supported; load it with MXNet and save it as {{name: tensor}} "
                "with safetensors, under the names it has"
            )
    if tarfile.is_tarfile(path):
        raise WeightsError(
            f"{path}: a tar archive, the format of PyTorch before 0.1.10, is not supported, since it cannot be read as "
            "plain data; load it with an old PyTorch and save it again, or unpack it if it only wraps a checkpoint"
        )


def _reason(error: Exception) -> str:
    if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"refused, holds more than plain data ({named[1]}); nothing of it was run"
    line = (str(error).strip().splitlines() or [""])[0].split(". ")[0][:200]
    return f"damaged, cut short, or not a checkpoint ({type(error).__name__}: {line})"


def _converted(source: object) -> bool:
    """Whether ``python -m common.weights convert`` made this file: its names are ours already."""
    if not isinstance(source, (str, Path)) or Path(source).suffix != ".safetensors":
        return False
    with safe_open(source, "pt") as file:
        return "model" in (file.metadata() or {})


def _where(source: object) -> str:
    return str(source) if isinstance(source, (str, Path)) else "state dict"
