"""All of a run's state, to and from a checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from common.config import flatten, to_dict
from common.engine import checkpoint, parallel, zero
from common.engine.optim import load_named_state, named_state
from common.errors import UserError
from common.weights import load_state

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
    """The content of a checkpoint, the same however the run is divided. All ranks call this.

    See :func:`common.engine.checkpoint.save`.

    Raises:
        UserError: a weight is not finite; such a state is not worth keeping.
    """
    model, scaler = trainer.plain_model, trainer.accelerator.scaler
    divided = trainer.config.parallel.startswith("zero")
    weights = zero.weights(model) if divided else parallel.whole_state(model)
    finite = torch.stack([tensor.isfinite().all() for tensor in weights.values()]).all()
    if not finite:
        raise trainer.divergence("a weight is not finite")
    content: dict[str, Any] = {
        "model.safetensors": weights,
        "optimizer.pt": (
            zero.named_state(model, trainer.prepared_optimizer.optimizer)
            if divided
            else named_state(model, trainer.optimizer)
        ),
        "state.json": {
            "progress": asdict(trainer.progress),
            "identity": trainer.identity,
            "meter": trainer.meter.sums.tolist(),
            "evaluation": trainer.evaluation,
            "scaler": scaler.state_dict() if scaler else None,
        },
    }
    if trainer.ema:
        content["ema.safetensors"] = parallel.whole_state(trainer.ema.module)
    return content


def restore(trainer: Trainer, path: Path) -> None:
    """Continue from the checkpoint at ``path``.

    Raises:
        UserError: model, data or settings changed since; all that differs is listed.
    """
    state = checkpoint.load(path, "state.json")
    changed = differences(state["identity"], trainer.identity)
    if changed:
        raise UserError(
            f"{path} cannot be continued, since it was made with other settings: {'; '.join(changed)} "
            f"(then → now). Undo the change, or start anew from its weights: --weights {path} --out ANOTHER_FOLDER"
        )
    model = trainer.plain_model
    optimizer = checkpoint.load(path, "optimizer.pt")
    if trainer.config.parallel.startswith("zero"):
        zero.load_weights(model, checkpoint.load(path, "model.safetensors"))
        zero.load_named_state(model, trainer.prepared_optimizer.optimizer, optimizer)
    else:
        _load(model, path, "model.safetensors")
        load_named_state(model, trainer.optimizer, optimizer)
    if trainer.ema:
        _load(trainer.ema.module, path, "ema.safetensors")
    if trainer.accelerator.scaler and state["scaler"]:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.progress = Progress(**state["progress"])
    trainer.evaluation = state["evaluation"]
    trainer.meter.sums.copy_(torch.tensor(state["meter"], dtype=torch.float64))


def _load(module: nn.Module, path: Path, name: str) -> None:
    load_state(module, parallel.own_state(module, checkpoint.load(path, name)), where=str(path))
