"""Checkpoints that are whole or not there: written aside, synced, checksummed, renamed.

A checkpoint is a folder ``step-000001234`` with ``model.safetensors``, ``optimizer.pt``, ``state.json``, with EMA also
``ema.safetensors``, and ``manifest.json`` with the size and SHA-256 of each. What the ranks have in parts they write in
parts, rank 1 of 4 in ``model-2-of-4.safetensors`` and ``optimizer-2-of-4.safetensors``; see :mod:`common.engine.parts`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from common.engine.parts import Part, Stored, encode
from common.engine.ranks import Ranks
from common.errors import ConfigError, RunError
from common.files import atomic_folder, sha256, sync, sync_all

_ALONE = Ranks()
_UNSEEN_SECONDS = 60  # longer than network file systems keep what they knew of a folder


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


class RefusedError(CheckpointError):
    """A checkpoint that a run cannot go on from: bad input, whereas a write fails in the middle of a run."""

    exit_code = 2


def save(
    folder: Path, step: int, content: Mapping[str, Any], ranks: Ranks = _ALONE, log: Path | None = None
) -> Path:
    """Write the checkpoint of ``step`` into ``folder``. All ranks call this, each with the files that it writes.

    One that is there of the same step is ``step-….old`` until the new one is in its place.

    Args:
        folder: of a file system that all ranks share.
        content: file name → state dict, or parts of one (``.safetensors``), plain data (``.json``), or nested dicts
            of tensors and numbers (``.pt``).
        log: a file that must be on the disk before, since a resumed run does not write again what is in it.

    Raises:
        CheckpointError: on all ranks, if one cannot write, for example because the disk is full; what was there
            stays.
    """
    final = folder / f"step-{step:09d}"
    old = final.with_name(f"{final.name}.old")
    try:
        with ExitStack() as stack:
            name = ranks.first(lambda: stack.enter_context(atomic_folder(final, True, old)).name)
            aside = folder / name
            written = ranks.each(lambda: _write(aside, content))

            def finish() -> None:
                manifest = {name: entry for entries in written for name, entry in entries.items()}
                (aside / "manifest.json").write_bytes(_encode("manifest.json", manifest))
                if log is not None and log.is_file():
                    sync(log)
                stack.close()

            ranks.first(finish)
    except OSError as error:
        last = ranks.gather(newest(folder) if ranks.rank == 0 else None)[0]
        kept = f"{last} is intact" if last else "there is no earlier checkpoint"
        raise CheckpointError(
            f"checkpoint of step {step} not written to {folder}: {error.strerror}; {kept}"
        ) from error.__cause__
    return final


def to_continue(folder: Path, ranks: Ranks = _ALONE) -> Path | None:
    """The checkpoint that a run in ``folder`` goes on from; None where there is none. All ``ranks`` call this.

    Raises:
        ConfigError: the folder cannot be read, or all are damaged. To begin anew would remove what might be mended, and
            the run's log.
    """
    problem = None
    try:
        os.listdir(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        problem = error.strerror
    if problem := next(filter(None, ranks.gather(problem)), None):
        raise ConfigError(f"{folder}: {problem}; a run keeps its checkpoints there")
    path = newest(folder, ranks)
    if path is None and ranks.gather(bool(_newest_first(folder)))[0]:
        raise ConfigError(
            f"{folder}: every checkpoint is damaged or unreadable; mend one, or remove the folder to train anew"
        )
    return path


def newest(folder: Path, ranks: Ranks = _ALONE) -> Path | None:
    """The newest undamaged checkpoint in ``folder``; damaged ones are named in a warning. All ``ranks`` call this."""
    for name in ranks.gather([path.name for path in _newest_first(folder)])[0]:
        path = folder / name
        problem = next(filter(None, ranks.gather(damage(path, ranks))), None)
        if problem is None:
            return path
        if ranks.rank == 0:
            print(
                f"warning: checkpoint {path} is damaged ({problem}); trying the one before it",
                file=sys.stderr,
            )
    return None


def is_newest(folder: Path, path: Path | None) -> bool:
    """Whether ``path`` is there, or is None, and no undamaged checkpoint in ``folder`` is newer."""
    for found in _newest_first(folder):
        if found == path:
            return True
        if damage(found) is None:
            return False
    return path is None


def damage(path: Path, ranks: Ranks = _ALONE) -> str | None:
    """What is wrong with the checkpoint, or None; of several ``ranks`` each looks at some of the files."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if not isinstance(manifest, dict) or not manifest:
            return "manifest.json lists nothing"
        for name in sorted(manifest)[ranks.rank :: ranks.world]:
            if not (path / name).is_file():
                return f"{name} is missing"
            found = _digest(path / name)
            if found != manifest[name]:
                return f"{name} has {found['bytes']} bytes, SHA-256 {found['sha256'][:12]}…, not as written"
    except (OSError, ValueError, RecursionError) as error:
        return str(error)
    return None


def load(path: Path, name: str) -> Any:
    """One file of a checkpoint, put together if it is in parts: state dicts and plain data only, never code.

    Raises:
        RefusedError: the file is missing or carries more than data.
    """
    try:
        if name.endswith(".safetensors"):
            stored = tensors(path, name.removesuffix(".safetensors"))
            return {key: stored.whole(key) for key in stored}
        if name.endswith(".json"):
            return json.loads((path / name).read_bytes())
        return _load_pt(path / name)
    except RefusedError:
        raise
    except Exception as error:
        raise _refusal(path / name, error) from None


def tensors(path: Path, kind: str) -> Stored:
    """The tensors of ``model``, ``ema`` or ``optimizer``, however a checkpoint keeps them.

    The optimizer's are ``PARAMETER.KEY``, such as ``head.weight.momentum_buffer``.

    Raises:
        RefusedError: files are missing, or carry more than data.
    """
    stored = Stored()
    for file in _files(path, kind):
        try:
            if file.suffix == ".pt":
                for name, entry in _load_pt(file).items():
                    for key, value in entry.items():
                        stored.add(f"{name}.{key}", Part(value, tuple(value.shape), 0))
            else:
                stored.add_file(file)
        except Exception as error:
            raise _refusal(file, error) from None
    return stored


def holds(path: Path, kind: str) -> bool:
    """Whether the checkpoint has ``model``, ``ema`` or ``optimizer``, whole or in parts."""
    return any((path / f"{kind}.{suffix}").is_file() for suffix in ("safetensors", "pt")) or any(
        path.glob(f"{kind}-*-of-*.safetensors")
    )


def part_name(kind: str, rank: int, world: int) -> str:
    """The file of a rank's parts."""
    return f"{kind}-{rank + 1}-of-{world}.safetensors"


def prune(folder: Path, last: Path, keep: int, best_step: int | None) -> None:
    """Remove all checkpoints but the best one and the newest ``keep`` up to ``last``, where the run stands.

    Later ones are damaged, else the run would stand there. What a killed process left half written goes too.
    """
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    paths = _newest_first(folder)
    intact: dict[int | None, Path] = {}
    for path in paths[paths.index(last) :]:
        intact.setdefault(step_of(path), path)
    kept = [*list(intact.values())[:keep], intact.get(best_step)]
    for path in paths:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("step-"))


def _newest_first(folder: Path) -> list[Path]:
    """Folders with a checkpoint's name; an ``.old`` one, which a kill has left, behind the one of its step."""
    named = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{9,}(\.old)?", path.name))
    found = [path for path in named if path.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), path.suffix == ""), reverse=True)


def _write(folder: Path, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Write files, synced; their entries in the manifest."""
    deadline = time.monotonic() + _UNSEEN_SECONDS
    while not folder.is_dir():  # which rank 0 has made
        if time.monotonic() > deadline:
            raise OSError(0, f"{folder} is not seen here: a run's folder must lie where all nodes see it")
        time.sleep(0.1)
    entries = {}
    for name, value in content.items():
        data = _encode(name, value)
        (folder / name).write_bytes(data)
        entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    sync_all(folder / name for name in content)
    return entries


def _encode(name: str, value: Any) -> bytes:
    if name.endswith(".json"):
        return json.dumps(value).encode()
    if name.endswith(".pt"):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()
    if any(isinstance(tensor, Part) for tensor in value.values()):
        return encode(value)
    return save_safetensors({key: _own(tensor) for key, tensor in value.items()})


def _own(tensor: Tensor) -> Tensor:
    """A contiguous CPU copy where needed: safetensors refuses views and shared memory."""
    return tensor.detach().cpu().contiguous().clone()


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _load_pt(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _files(path: Path, kind: str) -> list[Path]:
    """The files that hold ``kind``: a whole one, or all parts."""
    for suffix in ("safetensors", "pt"):
        if (path / f"{kind}.{suffix}").is_file():
            return [path / f"{kind}.{suffix}"]
    found = re.search(r"-of-(\d+)", " ".join(file.name for file in path.glob(f"{kind}-*-of-*.safetensors")))
    world = int(found[1]) if found else 0
    files = [path / part_name(kind, rank, world) for rank in range(world)]
    for file in files or [path / f"{kind}.safetensors"]:
        if not file.is_file():
            raise RefusedError(f"{file}: missing")
    return files


def _refusal(path: Path, error: Exception) -> RefusedError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return RefusedError(f"{path}: refused or unreadable ({reason[:150]})")
