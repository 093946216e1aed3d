"""Every model for images runs as users run models: sizes, precisions, formats, one graph, export, no classifier."""

import copy

import pytest
import timm
import torch

import cifar.models  # noqa: F401
import image.models  # noqa: F401  (registers the models)
from common.models.table import read_rows

NAMES = list(dict.fromkeys(row.model for row in read_rows() if not row.model.startswith(("c2d", "i3d"))))
FIXED = ("deit", "mixer", "gmlp")  # their weights have the grid's shape


def sizes(model):
    side = model.pretrained_cfg["input_size"][-1]
    if side == 32:
        return [(32, 32), (40, 48)]
    return (
        [(side, side)] if model.pretrained_cfg["architecture"].startswith(FIXED) else [(128, 160), (192, 192)]
    )


def know_its_statistics(model, x):
    """Batch norm's initial statistics let the signal double in each of 333 blocks: past float32's range."""
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.momentum = 1.0
    model.train()(x)
    model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_model_runs_as_users_run_it(name):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = timm.create_model(name, num_classes=7).eval()
    inputs = [torch.randn(1, 3, *size) for size in sizes(model)]
    with torch.no_grad():
        if name.startswith("resnet1001"):
            know_its_statistics(model, inputs[0])
        logits = [model(x) for x in inputs]
        assert all(y.shape == (1, 7) and y.isfinite().all() for y in logits)
        with torch.autocast("cpu", torch.bfloat16):
            x = inputs[0].contiguous(memory_format=torch.channels_last)
            half = copy.deepcopy(model).to(memory_format=torch.channels_last)(x).float()
        assert half.shape == (1, 7)
        assert half.isfinite().all()
        if not name.startswith("resnet1001"):  # minutes for resnet164's graph six times over
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(inputs[0]), logits[0], atol=1e-4, rtol=1e-4)
            exported = torch.export.export(model, (inputs[0],)).module()
            torch.testing.assert_close(exported(inputs[0]), logits[0], atol=1e-4, rtol=1e-4)
        model.reset_classifier(0)
        assert model(inputs[0]).shape == (
            1,
            timm.create_model(name, num_classes=0).eval()(inputs[0]).shape[1],
        )
