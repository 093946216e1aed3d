"""Checkpoints that are whole or not there: written aside, synced, checksummed, renamed.

A checkpoint is a folder ``step-000001234`` with ``model.safetensors``, ``optimizer.pt``, ``state.json``, with EMA also
``ema.safetensors``, and ``manifest.json`` with the size and SHA-256 of each.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from common.errors import RunError
from common.files import atomic_folder


@dataclass
class CheckpointConfig:
    """When checkpoints are written, besides after every evaluation, and which are kept."""

    every_steps: int = 0
    """Steps between checkpoints; 0 is off."""
    every_minutes: float = 10.0
    """Minutes between checkpoints; 0 is off."""
    keep: int = 2
    """Newest checkpoints that are kept, besides the best."""
    asynchronous: bool = False
    """Write in the background, from a copy in the host's memory; the next save, and the end, wait for the write."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep = {self.keep}: expected at least 1")
        for name in ("every_steps", "every_minutes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 0 (off) or more")


class CheckpointError(RunError):
    """A checkpoint that cannot be written or read; the message is one line for the user."""


def save(folder: Path, step: int, content: Mapping[str, Any]) -> Path:
    """Write the checkpoint of ``step`` into ``folder``.

    Args:
        content: file name → state dict (``.safetensors``), plain data (``.json``), or nested dicts of tensors
            and numbers (``.pt``).

    Raises:
        CheckpointError: it cannot be written, for example because the disk is full; what was there stays.
    """
    final = folder / f"step-{step:09d}"
    try:
        with atomic_folder(final, replace=True) as aside:
            encoded = {name: _encode(name, value) for name, value in content.items()}
            encoded["manifest.json"] = _encode("manifest.json", {n: _digest(d) for n, d in encoded.items()})
            for name, data in encoded.items():
                (aside / name).write_bytes(data)
    except OSError as error:
        last = newest(folder)
        kept = f"{last} is intact" if last else "there is no earlier checkpoint"
        raise CheckpointError(
            f"checkpoint of step {step} not written to {folder}: {error.strerror}; {kept}"
        ) from None
    return final


def newest(folder: Path) -> Path | None:
    """The newest undamaged checkpoint in ``folder``; damaged ones are named in a warning."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = damage(path)
        if problem is None:
            return path
        print(f"warning: checkpoint {path} is damaged ({problem}); trying the one before it", file=sys.stderr)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        for name, expected in manifest.items():
            found = _digest((path / name).read_bytes())
            if found != expected:
                return f"{name} has {found['bytes']} bytes, SHA-256 {found['sha256'][:12]}…, not as written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def load(path: Path, name: str) -> Any:
    """One file of a checkpoint: state dicts and plain data only, never code.

    Raises:
        CheckpointError: the file is missing or carries more than data.
    """
    try:
        data = (path / name).read_bytes()
        if name.endswith(".safetensors"):
            return load_safetensors(data)
        if name.endswith(".json"):
            return json.loads(data)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path / name}: refused or unreadable ({reason[:150]})") from None


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest ``keep`` checkpoints and the best one, and what a killed process left half written."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted(folder.glob("step-*"), reverse=True)[keep:]:
        if step_of(path) != best_step:
            shutil.rmtree(path, ignore_errors=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def _encode(name: str, value: Any) -> bytes:
    if name.endswith(".safetensors"):
        return save_safetensors({key: _own(tensor) for key, tensor in value.items()})
    if name.endswith(".json"):
        return json.dumps(value).encode()
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _own(tensor: Tensor) -> Tensor:
    """A contiguous CPU copy where needed: safetensors refuses views and shared memory."""
    return tensor.detach().cpu().contiguous().clone()


def _digest(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
