"""The golden checks: a model against outputs, losses and gradients of the published programs.

The tolerances are those under which the published programs agree with themselves across precisions;
they are tight because a wrong sign in a small branch moves the logits by less than a percent.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from common.weights import load_published
from tests.parity.fill import fill_state_dict, seeded_input

HERE = Path(__file__).parent


@cache
def manifest(name: str) -> dict:
    return json.loads((HERE / "manifest" / f"{name}.json").read_text())


def golden(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(HERE / "golden" / f"{name}.npz", allow_pickle=False))


def filled(name: str, model: nn.Module, extra: dict[str, np.ndarray] | None = None) -> nn.Module:
    """``model`` with the published keys of ``name`` filled by rule and loaded as a published checkpoint."""
    state = fill_state_dict(manifest(name)["state_dict"])
    state |= {key: torch.from_numpy(value) for key, value in (extra or {}).items()}
    load_published(model, {"state_dict": {f"module.{k}": v for k, v in state.items()}})
    return model


def check_params(name: str, model_name: str | None = None, **kwargs: object) -> None:
    """The trainable parameter count equals the published program's."""
    model = timm.create_model(model_name or name, **kwargs)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == manifest(name)["params"]


def check_eval(
    name: str, dtype: torch.dtype, model_name: str | None = None, tol32: float = 1e-5, **kwargs: object
) -> None:
    """Evaluation logits of the filled model: 1e-9 in double, ``tol32`` of the largest logit in float32."""
    data = golden(name)
    buffers = {key[4:]: value for key, value in data.items() if key.startswith("buf:")}
    model = filled(name, timm.create_model(model_name or name, **kwargs), buffers).to(dtype).eval()
    for suffix in ("", "_256"):
        if f"input_shape{suffix}" not in data:
            continue
        x = seeded_input(data[f"input_shape{suffix}"], int(data["input_seed"])).to(dtype)
        with torch.inference_mode():
            logits = model(x)
        double = dtype == torch.float64
        expected = torch.from_numpy(data[f"logits64{suffix}" if double else f"logits{suffix}"])
        error = (logits - expected).abs().max().item()
        allowed = 1e-9 if double else tol32 * expected.abs().max().item()
        assert error <= allowed, f"{name}{suffix}: logits differ by {error:.3g}, allowed {allowed:.3g}"


def check_train(
    name: str,
    dtype: torch.dtype,
    model_name: str | None = None,
    own_name: dict[str, str] | None = None,
    tol32: float = 5e-3,
    **kwargs: object,
) -> None:
    """Training loss, every gradient's norm and the batch-norm statistics after one forward pass.

    Args:
        own_name: published parameter name → this project's, where they differ.
        kwargs: must switch all dropout and drop path off.
    """
    data, double = golden(name), dtype == torch.float64
    model = filled(name, timm.create_model(model_name or name, **kwargs)).to(dtype).train()
    x = seeded_input(data["train_input_shape"], int(data["input_seed"])).to(dtype)
    loss = nn.functional.cross_entropy(model(x), torch.from_numpy(data["train_targets"]))
    loss.backward()

    expected_loss = float(data["train_loss64" if double else "train_loss"])
    assert abs(loss.item() - expected_loss) <= (1e-9 if double else 1e-4), (
        f"{name}: loss {loss.item()} for {expected_loss}"
    )

    norms = json.loads(str(data["grad_norm64" if double else "grad_norm"]))
    zero = set(json.loads(str(data["zero_grad"]))) if "zero_grad" in data else set()
    total = float(np.sqrt(sum(v * v for v in norms.values())))
    parameters = dict(model.named_parameters())
    for key, expected in norms.items():
        if key in zero:
            continue
        grad = parameters[(own_name or {}).get(key, key)].grad
        assert grad is not None, f"{name}: {key} has no gradient"
        error, allowed = abs(grad.norm().item() - expected), (1e-7 * expected if double else tol32 * total)
        assert error <= allowed + (1e-12 if double else 0), (
            f"{name}: |grad {key}| differs by {error:.3g}, allowed {allowed:.3g}"
        )

    buffers = dict(model.named_buffers())
    for key, expected in json.loads(str(data.get("bn_after", "{}"))).items():
        own = buffers[(own_name or {}).get(key, key)]
        relative = abs(own.norm().item() - expected) / expected
        assert relative <= (2.31e-5 if double else 1e-5), f"{name}: {key} differs by {relative:.3g}"
