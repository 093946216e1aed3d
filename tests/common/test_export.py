"""ONNX and torch.export files give, for batches of any size, what torch gives: a network a mechanism.

Slow: one model of each shape, of little depth. benchmarks/export_all.py does the same with every model as it is.
"""

import re

import pytest
import timm
import torch

import cifar.models  # noqa: F401
import image.models  # noqa: F401
import video.models  # noqa: F401
from benchmarks.export_all import awaken
from common.attention.attach import attach
from common.errors import ConfigError, UserError
from common.export import checked, difference, encoded, main, open_model
from common.models.build import misfit
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
    """Batches of one, and of another size than that which was traced; no part of the network is idle."""
    awaken(model, size, 2)
    for suffix in (".onnx", ".pt2"):
        content = encoded(model, suffix, size, {"model": "this"})
        # Torch's own logits are up to 2e-5 from those in float64 (mobilenetv2_100_noah).
        assert difference(content, suffix, model, size) < 1e-4
        if suffix == ".onnx":
            about = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).get_modelmeta()
            assert about.custom_metadata_map["model"] == "this"


@pytest.mark.parametrize("size", [(1, 64, 64), (3, 64), (3, 8, 64, 64)])
def test_a_size_that_does_not_fit_has_a_reason_in_one_line(size):
    model = timm.create_model("resnet18_bat", num_classes=2, layers=[1] * 4, channels=[16] * 4)
    assert misfit(model, (3, 64, 64)) is None
    why = misfit(model, size)
    assert why
    assert "\n" not in why


def test_a_size_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    torch.save(timm.create_model("resnet164").state_dict(), tmp_path / "resnet164.pth")
    words = [str(tmp_path / "resnet164.pth"), str(tmp_path / "x.onnx"), "--model", "resnet164"]
    monkeypatch.setattr("sys.argv", ["export", *words, "--input-size", "1", "32", "32"])
    with pytest.raises(ConfigError, match="^--input-size 1 32 32 does not fit the network: "):
        main()
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("words", [["--input-size", "3", "-1", "64"], ["--num-classes", "0"]])
def test_numbers_below_one_are_refused(words, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["export", "FILE", str(tmp_path / "x.onnx"), "--model", "resnet18_bat", *words]
    )
    with pytest.raises(ConfigError, match=f"^{' '.join(words)}: expected at least 1$"):
        main()


def test_a_file_has_its_models_own_number_of_classes(tmp_path):
    model = timm.create_model("resnet164_fbn")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    opened, _ = open_model(str(tmp_path / "weights.pth"), "resnet164_fbn")
    assert opened.num_classes == 10
    with pytest.raises(
        UserError, match="model.name = 'resnet164_fb': no such model; did you mean 'resnet164_fbn'"
    ):
        open_model(str(tmp_path / "weights.pth"), "resnet164_fb")


def test_a_file_of_another_network_is_refused():
    torch.manual_seed(0)
    model, other = (timm.create_model("resnet18", **RESNET).eval() for _ in range(2))
    content = encoded(other, ".pt2", (3, 32, 32), {})
    with pytest.raises(UserError, match="differ from torch's by .*; nothing is written"):
        checked(content, ".pt2", model, (3, 32, 32))


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_files_give_what_torch_gives(name):
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
def test_every_shape_of_model_is_exported(name):
    torch.manual_seed(0)
    model, size = shallow(name)
    check(model, size)
