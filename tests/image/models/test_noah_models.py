"""NOAH's networks as timm models: names, sizes, layouts, compilation, and what replaces the head."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

import image.models.noah_cnn
import image.models.noah_mlp
import image.models.noah_vit  # noqa: F401
from common.attention.noah import NOAH

SHUFFLENETS = [f"shufflenetv2_{width}" for width in ("050", "100", "150", "200")]
PVTS = [f"pvt_{size}" for size in ("tiny", "tiny_075", "tiny_050", "small", "medium", "large")]
DEITS = [f"deit_{size}_patch16_224" for size in ("tiny_050", "tiny_075", "tiny", "small", "base")]
MLPS = [f"{net}_224" for net in ("mixer_s16", "mixer_s16_075", "mixer_s16_050", "mixer_b16")]
MLPS += [f"{net}_224" for net in ("gmlp_ti16", "gmlp_ti16_075", "gmlp_ti16_050", "gmlp_s16")]
RESNETS = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
MOBILE = [f"mobilenetv2_{width}" for width in ("100", "075", "050", "035")] + ["mobilenetv3_small"]
BACKBONES = [*RESNETS, *MOBILE, *SHUFFLENETS, *DEITS, "deit_base_patch16_384", *PVTS, *MLPS]
NOAHS = [f"{name}_noah" for name in BACKBONES]
OWN_BASELINES = ["mobilenetv3_small_base", *(f"{name}_base" for name in SHUFFLENETS), *PVTS]
OWN_BASELINES += [name for name in (*DEITS, *MLPS) if "_050_" in name or "_075_" in name]

CONVOLUTIONAL = ["resnet18_noah", "mobilenetv2_035_noah", "mobilenetv3_small_noah", "shufflenetv2_050_noah"]
SMALL = [*CONVOLUTIONAL, "deit_tiny_050_patch16_224_noah", "pvt_tiny_050_noah"]
SMALL += ["mixer_s16_050_224_noah", "gmlp_ti16_050_224_noah"]
SMALL_BASELINES = ["mobilenetv3_small_base", "shufflenetv2_050_base", "pvt_tiny_050"]
SMALL_BASELINES += ["deit_tiny_050_patch16_224"]

SETTINGS = {"resnet18": (4, 0.5, 0.1), "resnet": (4, 0.125, 0.1), "mobilenet": (8, 0.25, 0.2)}
SETTINGS |= {"shufflenet": (8, 0.25, 0.0), "": (4, 0.5, 0.1)}


def small(name, **kwargs):
    """With few classes, and in evaluation mode."""
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 6, **kwargs}).eval()


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def params(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NOAHS)
def test_names_and_settings(name):
    model = on_meta(name, pretrained_cfg_overlay={"crop_pct": 0.8}, cache_dir=None)
    cfg, head = model.pretrained_cfg, model.get_classifier()
    assert (cfg["architecture"], cfg["crop_pct"], cfg["num_classes"]) == (name, 0.8, 1000)
    assert model.default_cfg is cfg
    assert isinstance(model.get_submodule(cfg["classifier"]), NOAH)
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3
    settings = next(value for start, value in SETTINGS.items() if name.startswith(start))
    ratio = head.query_features / head.in_features
    assert (head.heads, ratio, head.dropout.p, head.num_classes) == (*settings, 1000)
    assert head.in_features == model.head_hidden_size


@pytest.mark.parametrize("name", OWN_BASELINES)
def test_baselines(name):
    model = on_meta(name, pretrained_cfg_overlay={"crop_pct": 0.8}, cache_dir=None)
    assert (model.pretrained_cfg["architecture"], model.pretrained_cfg["crop_pct"]) == (name, 0.8)
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 3
    assert model.get_classifier() is model.get_submodule(model.pretrained_cfg["classifier"])
    assert model.get_classifier().in_features == model.head_hidden_size


def test_names_of_timm_keep_timms_models():
    for name in (
        *RESNETS,
        *MOBILE[:4],
        *DEITS[2:],
        "mixer_s16_224",
        "mixer_b16_224",
        "gmlp_ti16_224",
        "gmlp_s16_224",
    ):
        assert timm.models.model_entrypoint(name).__module__.startswith("timm.models."), name


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("pvt_small", 24.5),
        ("pvt_medium", 44.2),
        ("pvt_large", 61.4),
        ("shufflenetv2_050_base", 1.4),
        ("shufflenetv2_150_base", 3.5),
        ("shufflenetv2_200_base", 7.4),
    ],
)
def test_counts_of_the_backbones_papers(name, millions):
    assert round(params(on_meta(name)) / 1e6, 1) == millions


def test_noah_keywords():
    model = small("resnet18_noah", noah_heads=2, noah_key_ratio=0.25, noah_dropout=0.3)
    head = model.get_classifier()
    assert (head.heads, head.query_features, head.dropout.p) == (2, 128, 0.3)
    with pytest.raises(ValueError, match="heads=3 does not divide"):
        small("resnet18_noah", noah_heads=3)


@pytest.mark.parametrize(("name", "last"), [("resnet18_noah", "bn2"), ("resnet50_noah", "bn3")])
def test_residual_blocks_of_resnets_do_not_start_as_the_identity(name, last):
    def gains(model):
        return {value for block in model.layer1 for value in block.get_submodule(last).weight.tolist()}

    tiny = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
    assert gains(small(name, **tiny)) == {1.0}
    assert gains(small(name, **tiny, zero_init_last=True)) == {0.0}


@pytest.mark.parametrize("name", SMALL)
def test_head_api(name):
    model = small(name, in_chans=4)
    side = 224 if name.endswith(("224_noah", "224")) else 64
    x = torch.randn(1, 4, side, side)
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (1, 6)  # one image
        features = model.forward_features(x)
        torch.testing.assert_close(model.forward_head(features), logits)
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
        assert model.get_classifier().num_classes == 6

        model.reset_classifier(9)
        old, head = params(model), model.get_classifier()
        assert isinstance(head, NOAH)
        assert (head.heads, head.num_classes, model.num_classes) == (4 if head.heads == 4 else 8, 9, 9)
        assert model(x).shape == (1, 9)

        model.reset_classifier(0)
        assert params(model) < old
        pooled = model(x)
        assert pooled.shape == (1, model.head_hidden_size)
        torch.testing.assert_close(pooled, model.forward_head(features, pre_logits=True))
        model.reset_classifier(6)
        assert model(x).shape == (1, 6)


@pytest.mark.parametrize("name", SMALL)
def test_no_classes(name):
    model = small(name, num_classes=0)
    assert not any(isinstance(module, NOAH) for module in model.modules())
    x = torch.randn(1, 3, 224, 224) if "224" in name else torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert model(x).shape == (1, model.head_hidden_size)


@pytest.mark.parametrize("name", SMALL_BASELINES)
def test_head_api_of_baselines(name):
    model = small(name)
    x = torch.randn(1, 3, 224, 224) if "224" in name else torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        torch.testing.assert_close(model.forward_head(features), model(x))
        model.reset_classifier(4)
        assert model(x).shape == (1, 4)
        model.reset_classifier(0)
        pooled = model(x)
        assert pooled.shape == (1, model.head_hidden_size)
        torch.testing.assert_close(pooled, model.forward_head(features, pre_logits=True))
        model.reset_classifier(0, "")
        assert model(x).ndim == features.ndim
        assert model(x).shape[1 if features.ndim == 4 else 2] == model.head_hidden_size


@pytest.mark.parametrize("name", ["mobilenetv3_small_base", "shufflenetv2_050_base", "pvt_tiny_050"])
def test_unknown_pooling(name):
    with pytest.raises(ValueError, match="global_pool='max': expected"):
        timm.create_model(name, global_pool="max")


@pytest.mark.parametrize("size", [(192, 192), (224, 256)])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_sizes_of_convolutional_networks(name, size):
    model = small(name)
    with torch.no_grad():
        assert model.forward_features(torch.randn(2, 3, *size)).shape[2:] == (size[0] // 32, size[1] // 32)
        assert model(torch.randn(2, 3, *size)).isfinite().all()


@pytest.mark.parametrize("name", ["deit_tiny_050_patch16_224_noah", "deit_tiny_050_patch16_224"])
def test_sizes_of_vision_transformers(name):
    fixed, dynamic = small(name), small(name, dynamic_img_size=True)
    dynamic.load_state_dict(fixed.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(dynamic(x), fixed(x))
        for size in ((192, 192), (160, 256)):
            assert dynamic(torch.randn(1, 3, *size)).isfinite().all()
        assert small(name, img_size=160)(torch.randn(1, 3, 160, 160)).shape == (1, 6)


@pytest.mark.parametrize("name", SMALL)
def test_dropout_can_be_switched_off(name):
    kwargs = {"drop_rate": 0.0, "noah_dropout": 0.0}
    if not name.startswith(("mobilenetv3", "shufflenetv2")):
        kwargs["drop_path_rate"] = 0.0
    model = small(name, **kwargs).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    x = torch.randn(2, 3, 224, 224) if "224" in name else torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
        model.get_classifier().dropout.p = 0.5
        assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", [*SMALL, *SMALL_BASELINES])
def test_autocast_and_channels_last(name):
    model = small(name)
    x = torch.randn(2, 3, 224, 224) if "224" in name else torch.randn(2, 3, 96, 64)
    nn.init.normal_(
        model.get_submodule(model.pretrained_cfg["classifier"]).get_parameter(
            "value.weight" if name.endswith("_noah") else "weight"
        )
    )  # the initial heads of some give zeros
    with torch.no_grad():
        logits = model(x)
        torch.testing.assert_close(
            model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last)),
            logits,
            rtol=0,
            atol=1e-5 * logits.abs().max().item(),
        )
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
        half.float().square().mean().backward()
    assert (half - logits).abs().max() < 0.1 * logits.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [*SMALL, "pvt_tiny_050"])
def test_checkpointing_gives_the_same_gradients(name):
    model = small(name, noah_dropout=0.0) if name.endswith("_noah") else small(name)
    x = torch.randn(1, 3, 224, 224) if "224" in name else torch.randn(1, 3, 64, 64)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("name", [*SMALL, *SMALL_BASELINES])
def test_features_only(name):
    model = timm.create_model(name, features_only=True).eval()
    side = 224 if "224" in name else 64
    maps = model(torch.randn(1, 3, side, side))
    info = model.feature_info
    assert [tuple(m.shape[1:]) for m in maps] == [
        (channels, side // reduction, side // reduction)
        for channels, reduction in zip(info.channels(), info.reduction())
    ]
    assert len(maps) >= 3


@pytest.mark.parametrize("name", ["pvt_tiny_050", "pvt_tiny_050_noah", *CONVOLUTIONAL, *SMALL_BASELINES[:2]])
@pytest.mark.parametrize("coarse", [True, False])
def test_parameter_groups_run_from_stem_to_head(name, coarse):
    model = on_meta(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    names = [key for key, _ in model.named_parameters()]
    assert set(groups) == set(names)
    stem, classifier = model.pretrained_cfg["first_conv"], model.pretrained_cfg["classifier"]
    assert groups[f"{stem}.weight"] == 0
    last = max(groups.values())
    assert {groups[key] for key in names if key.startswith(f"{classifier}.")} == {last}
    assert last >= 4


def test_pretrained_from_a_file_of_own_weights(tmp_path):
    model = small("mobilenetv3_small_noah", num_classes=1000)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    loaded = timm.create_model("mobilenetv3_small_noah", pretrained=True, pretrained_cfg_overlay=overlay)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_copies_and_pickles():
    model = small("pvt_tiny_050_noah")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(copied(x), model(x))
            copied.reset_classifier(3)
            assert isinstance(copied.get_classifier(), NOAH)


SHALLOW = {
    "resnet18_noah": {"layers": (1, 1, 1, 1)},
    "mobilenetv3_small_noah": {},
    "deit_tiny_050_patch16_224_noah": {"depth": 1},
    "pvt_tiny_050_noah": {"depths": (1, 1, 1, 1)},
    "gmlp_ti16_050_224_noah": {"num_blocks": 1},
}


@pytest.mark.parametrize("name", SHALLOW)
def test_whole_graph(name):
    """One graph without breaks; the code generator is not what is tested."""
    model = small(name, noah_dropout=0.0, **SHALLOW[name])
    x = torch.randn(1, 3, 224, 224) if "224" in name else torch.randn(1, 3, 64, 64)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_compiled(name):
    model = small(name)
    x = torch.randn(1, 3, 224, 224) if "224" in name else torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, rtol=1e-4, atol=1e-4)
