"""All of a run's state, to and from a checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.config import flatten, to_dict
from common.engine import checkpoint, parallel, zero
from common.engine.optim import load_named_state, named_state
from common.engine.parts import Part
from common.errors import UserError

if TYPE_CHECKING:
    from common.engine.trainer import Trainer

# Settings that change neither what the model sees nor, but for rounding, what it computes.
_FREE = (
    "out",
    "resume",
    "parallel",
    "offload",
    "profile",
    "weights",
    "log.",
    "expect.",
    "checkpoint.",
    "data.path",
    "data.root",
    "data.decode",
    "data.format",
    "data.workers",
    "data.prefetch",
    "data.max_unreadable",
    "train.accumulation",
    "train.timeout_minutes",
    "train.eval_",
    "train.channels_last",
    "train.compile",
    "train.grad_checkpointing",
    "train.deterministic",
    "train.tf32",
)


_STATE = ("identity", "meter", "evaluation", "scaler")


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    evaluated_step: int = 0
    best: float = -1.0
    best_step: int | None = None


def identity(config: Any, model: nn.Module, data_fingerprint: str) -> dict[str, Any]:
    """What a run is; it can be resumed only as the same."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
    return {"config": to_dict(config), "data": {"fingerprint": data_fingerprint}, "model": {"shapes": digest}}


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed between two identities, ``key: then → now``, without what may change freely."""
    old, new = flatten(then), flatten(now)
    changed = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    names = {key: key.removeprefix("config.") for key in changed}
    return [
        f"{names[key]}: {old.get(key)} → {new.get(key)}"
        for key in changed
        if not names[key].startswith(_FREE)
    ]


def capture(trainer: Trainer) -> dict[str, Any]:
    """What this rank writes of a checkpoint; see :func:`common.engine.checkpoint.save`. All ranks call this.

    Raises:
        UserError: a weight is not finite; such a state is not worth keeping.
    """
    model, scaler = trainer.plain_model, trainer.accelerator.scaler
    if trainer.config.parallel.startswith("zero"):
        weights = zero.weights(model)
        optimizer = zero.named_state(model, trainer.prepared_optimizer.optimizer)
    else:
        weights, optimizer = parallel.own_state(model), named_state(model, trainer.optimizer)
    values = [value.data if isinstance(value, Part) else value for value in weights.values()]
    if not parallel.everywhere(torch.stack([value.isfinite().all() for value in values]).all()):
        raise trainer.divergence("a weight is not finite")
    content = _files("model", weights, trainer) | _files("optimizer", optimizer, trainer)
    if trainer.ema:
        content |= _files("ema", parallel.own_state(trainer.ema.module), trainer)
    if trainer.ranks.rank == 0:
        content["state.json"] = {
            "progress": asdict(trainer.progress),
            "identity": trainer.identity,
            "meter": trainer.meter.sums.tolist(),
            "evaluation": trainer.evaluation,
            "scaler": scaler.state_dict() if scaler else None,
        }
    return content


def restore(trainer: Trainer, path: Path) -> None:
    """Continue from the checkpoint at ``path``, of any mode. All ranks call this.

    Raises:
        UserError: model, data or settings changed since; all that differs is listed.
        RefusedError: something is missing in it.
    """
    state = _read(path)
    changed = differences(state["identity"], trainer.identity)
    if changed:
        raise UserError(
            f"{path} cannot be continued, since it was made with other settings: {'; '.join(changed)} "
            f"(then → now). Undo the change, or start anew from its weights: --weights {path} --out ANOTHER_FOLDER"
        )
    model = trainer.plain_model
    weights, optimizer = checkpoint.tensors(path, "model"), checkpoint.tensors(path, "optimizer")
    if trainer.config.parallel.startswith("zero"):
        zero.load_weights(model, trainer.prepared_optimizer.optimizer, weights)
        zero.load_named_state(model, trainer.prepared_optimizer.optimizer, optimizer)
    else:
        parallel.load_own_state(model, weights)
        load_named_state(model, trainer.optimizer, optimizer)
    if trainer.ema:
        parallel.load_own_state(trainer.ema.module, checkpoint.tensors(path, "ema"))
    if trainer.accelerator.scaler and state["scaler"]:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.progress = state["progress"]
    trainer.evaluation = state["evaluation"]
    trainer.meter.sums.copy_(torch.tensor(state["meter"], dtype=torch.float64))


def _read(path: Path) -> dict[str, Any]:
    """The state of the checkpoint at ``path``."""
    state = checkpoint.load(path, "state.json")
    try:
        return {key: state[key] for key in _STATE} | {"progress": Progress(**state["progress"])}
    except (KeyError, TypeError):
        raise checkpoint.RefusedError(
            f"{path / 'state.json'}: written by another version of pairwise"
        ) from None


def _files(kind: str, state: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """What this rank writes of ``state``: its parts, where it is in parts; else all of it, if it is rank 0."""
    ranks = trainer.ranks
    flat: dict[str, Tensor | Part] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            flat[name] = value
    if any(isinstance(value, Part) for value in flat.values()):
        own = {name: value for name, value in flat.items() if isinstance(value, Part) or ranks.rank == 0}
        return {checkpoint.part_name(kind, ranks.rank, ranks.world): own}
    whole = f"{kind}.pt" if kind == "optimizer" else f"{kind}.safetensors"
    return {whole: state} if ranks.rank == 0 else {}
