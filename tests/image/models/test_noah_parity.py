"""NOAH's networks and their baselines against the published programs: counts, checkpoints, outputs, gradients."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import image.models.noah_cnn
import image.models.noah_mlp
import image.models.noah_vit  # noqa: F401
from common.weights import _LAYOUTS, WeightsError, load_published
from tests.parity.golden import HERE, check_eval, check_train, manifest

MANIFESTS = sorted(
    path.stem
    for path in (HERE / "manifest").glob("*.json")
    if json.loads(path.read_text())["family"].startswith("noah")
)
GOLDEN = [name for name in MANIFESTS if (HERE / "golden" / f"{name}.npz").exists()]
FAST = (
    "resnet18_noah",
    "mobilenetv2_050_noah",
    "mobilenetv3_small_base",
    "shufflenetv2_100_base",
    "deit_tiny_050_patch16_224_noah",
    "pvt_tiny_050_noah",
    "pvt_tiny_075",
    "mixer_s16_075_224_noah",
    "gmlp_ti16_050_224_noah",
)
CHECKED = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in GOLDEN]
DTYPES = [torch.float32, torch.float64]
OWN_BASELINES = ("mobilenetv3_small_base", "shufflenetv2_100_base")


def model_name(name: str) -> str:
    """The model that a manifest is for: ``resnet50_base`` is timm's ``resnet50``."""
    return name if name in OWN_BASELINES else name.removesuffix("_base")


def own_names(name: str) -> dict[str, str]:
    """Published → own parameter names: each tensor is followed through the layout."""
    published = {key: torch.empty(0) for key in manifest(name)["state_dict"]}
    layout = _LAYOUTS.get(model_name(name), lambda state: state)
    own = {id(tensor): key for key, tensor in layout(published).items()}
    return {key: own[id(tensor)] for key, tensor in published.items()}


def without_dropout(name: str) -> dict[str, float]:
    rates = {"drop_rate": 0.0}
    if name.endswith("_noah"):
        rates["noah_dropout"] = 0.0
    if not name.startswith(("mobilenetv3", "shufflenetv2")):
        rates["drop_path_rate"] = 0.0
    return rates


def test_the_fast_ones_have_goldens():
    assert set(FAST) <= set(GOLDEN)


@pytest.mark.parametrize("name", MANIFESTS)
def test_counts_and_checkpoint(name):
    right = manifest(name)
    with torch.device("meta"):
        model = timm.create_model(model_name(name)).eval()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == right["params"]
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert flops.get_total_flops() == 2 * right["macs_at_input"]

    model = timm.create_model(model_name(name))
    state = {key: torch.full((), 2.0).expand(shape) for key, shape in right["state_dict"].items()}
    assert not load_published(model, state)
    assert all(bool((tensor == 2).all()) for tensor in model.state_dict().values())
    wrapped = {f"module.{key}": tensor for key, tensor in state.items()}
    assert not load_published(model, {"state_dict": wrapped, "epoch": 3})
    wrapped.pop("module." + next(iter(state)))
    with pytest.raises(WeightsError, match="1 missing"):
        load_published(model, {"model": wrapped})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CHECKED)
def test_evaluation(name, dtype):
    check_eval(name, dtype, model_name(name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CHECKED)
def test_training(name, dtype):
    # 152 layers of batch norm on two images: rounding differs between convolution algorithms by more than
    # the tolerance (the published float32 loss is itself 2.3e-4 from double); these are the published ones.
    plain = torch.backends.mkldnn.flags(enabled=False) if name == "resnet152_base" else nullcontext()
    with plain:
        check_train(name, dtype, model_name(name), own_names(name), **without_dropout(name))
