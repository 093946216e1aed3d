"""A model of each family runs as users run models: sizes, precisions, formats, one graph, export, no classifier."""

import copy

import pytest
import timm
import torch

import cifar.models  # noqa: F401
import image.models  # noqa: F401  (registers the models)

NAMES = [
    "resnet18_bat",
    "seresnet50_bat",
    "san10_pairwise",
    "resnet18_fbn",
    "resnet164_fbn",
    "inception_bn_small_bilinear",
    "mobilenetv3_small_noah",
    "deit_tiny_patch16_224_noah",
    "pvt_tiny_noah",
    "mixer_s16_050_224",
    "mixer_s16_050_224_noah",
]
FIXED = ("deit", "mixer", "gmlp")  # their weights have the grid's shape


def sizes(model):
    side = model.pretrained_cfg["input_size"][-1]
    if side == 32:
        return [(32, 32), (40, 48)]
    return (
        [(side, side)] if model.pretrained_cfg["architecture"].startswith(FIXED) else [(128, 160), (192, 192)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_model_runs_as_users_run_it(name):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = timm.create_model(name, num_classes=7).eval()
    inputs = [torch.randn(1, 3, *size) for size in sizes(model)]
    with torch.no_grad():
        logits = [model(x) for x in inputs]
        assert all(y.shape == (1, 7) and y.isfinite().all() for y in logits)
        with torch.autocast("cpu", torch.bfloat16):
            x = inputs[0].contiguous(memory_format=torch.channels_last)
            half = copy.deepcopy(model).to(memory_format=torch.channels_last)(x).float()
        assert half.shape == (1, 7)
        assert half.isfinite().all()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(inputs[0]), logits[0], atol=1e-4, rtol=1e-4)
        exported = torch.export.export(model, (inputs[0],)).module()
        torch.testing.assert_close(exported(inputs[0]), logits[0], atol=1e-4, rtol=1e-4)
        model.reset_classifier(0)
        assert model(inputs[0]).shape == (
            1,
            timm.create_model(name, num_classes=0).eval()(inputs[0]).shape[1],
        )
