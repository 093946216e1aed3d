"""ONNX files give, for batches of any size, what torch gives: a network a mechanism; slow: the models of the table."""

import re

import pytest
import timm
import torch

import cifar.models  # noqa: F401
import image.models  # noqa: F401
import video.models  # noqa: F401
from common.attention.attach import attach
from common.export import to_onnx
from common.models.table import read_rows

onnxruntime = pytest.importorskip("onnxruntime")

RESNET = {"layers": [1] * 4, "channels": [16, 16, 32, 32], "num_classes": 5}
SAN = {"layers": [1, 1], "widths": [32, 64], "kernels": [3, 5], "num_classes": 5}
REPRESENTATIVE = {
    "pairwise": lambda: timm.create_model("san10_pairwise", **SAN),
    "bat": lambda: timm.create_model("resnet18_bat", bat_size=4, nl_mod=[1, 1, 1000], **RESNET),
    "noah": lambda: attach(timm.create_model("resnet18", **RESNET), "noah"),
    "fbn": lambda: attach(timm.create_model("resnet18", **RESNET), "fbn"),
}
# Of networks that differ in widths and numbers of blocks alone, the smallest.
ALIKE = re.compile(
    r"^(resnet(101|152|200|269)|resnext101|san(15|19))|pvt_(medium|large)|_0[57][05]_|_0[57][05]$"
)
NAMES = [name for name in dict.fromkeys(row.model for row in read_rows()) if not ALIKE.search(name)]
NAMES += [name for name in timm.list_models(["c2d_resnet50*", "i3d_resnet50*"]) if name not in NAMES]


def check(model, size):
    """Batches of one, and of another size than that which was traced."""
    content = to_onnx(model.eval(), size, {"model": "this"})
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["model"] == "this"
    for batch in (1, 3):
        x = torch.randn(batch, *size)
        with torch.no_grad():
            expected = model(x)
        logits = torch.tensor(session.run(["logits"], {"images": x.numpy()})[0])
        scale = float(expected.abs().max())
        torch.testing.assert_close(logits, expected, atol=1e-5 * max(1, scale), rtol=1e-4)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_onnx_gives_what_torch_gives(name):
    torch.manual_seed(0)
    check(REPRESENTATIVE[name](), (3, 64, 64))


def shallow(name):
    """The model with a block a stage where it can have that, and a small input where it takes one."""
    cfg = timm.get_pretrained_cfg(name)
    side = cfg.input_size[-1]
    small, depth = (3, min(side, 64), min(side, 64)), {}
    if name.startswith(("c2d", "i3d")):
        small, depth = (3, 8, 64, 64), {"layers": [1] * 4}
    elif name.startswith("san"):
        depth = {"layers": [1] * 5}
    elif name.startswith(("deit", "mixer", "gmlp", "pvt")):
        small = cfg.input_size
        kinds = {"deit": {"depth": 1}, "pvt": {"depths": [1] * 4}, "mixer": {"num_blocks": 1}}
        ours = name.endswith("_noah") or not name.startswith(("mixer", "gmlp"))
        depth = kinds.get(name[: name.index("_")], {"num_blocks": 1}) if ours else {}
    elif name.startswith(("resnet164", "resnet1001")):
        depth = {"depth": 11}
    elif name.startswith(("resn", "seresn")) and not name.endswith(("preact", "fbn")):
        depth = {"layers": [1] * 4}
    return timm.create_model(name, num_classes=5, **depth), small


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_model_becomes_onnx(name):
    torch.manual_seed(0)
    model, size = shallow(name)
    check(model, size)
