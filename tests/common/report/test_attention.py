"""Attention maps are what the modules compute with; that they show what a network goes by, test_occlusion.py tests."""

import pytest
import timm
import torch
from torch import nn

import image.models  # noqa: F401
import video.models  # noqa: F401
from common.attention.attach import attach
from common.attention.fbn import FBNHead
from common.attention.non_local import NonLocal, NonLocal3d
from common.attention.san import PatchwiseAttention
from common.frames import clips, frames
from common.report.attention import draw_attention, strongest_pairs
from common.report.maps import (
    Affinities,
    ClassMaps,
    Footprints,
    Pairs,
    TimeTransforms,
    Transforms,
    attention_maps,
)
from kernels.reference import aggregation
from tests.browser import seen_in

SMALL = {"layers": [1] * 4, "channels": [16, 16, 32, 32], "num_classes": 5}
SAN = {"layers": [1, 1], "widths": [32, 64], "kernels": [3, 5], "num_classes": 5}
CLIP = {"layers": [1] * 4, "channels": [8] * 4, "num_classes": 5}
NETS = {
    "pairwise": lambda: timm.create_model("san10_pairwise", **SAN),
    "patchwise": lambda: timm.create_model("san10_patchwise", **SAN),
    "bat": lambda: timm.create_model("resnet18_bat", bat_size=4, nl_mod=[1, 1, 1000], **SMALL),
    "nl": lambda: timm.create_model("resnet18_nl", nl_mod=[1, 1, 1000], **SMALL),
    "noah": lambda: attach(timm.create_model("resnet18", **SMALL), "noah"),
    "fbn": lambda: attach(timm.create_model("resnet18", **SMALL), "fbn"),
    "bat3d": lambda: timm.create_model("c2d_resnet50_bat3d", bat_size=2, nonlocal_mod=1, **CLIP),
    "nl3d": lambda: timm.create_model("c2d_resnet50_nl", nonlocal_mod=1, **CLIP),
}
KINDS = {
    "pairwise": {Footprints},
    "patchwise": {Footprints},
    "bat": {Transforms},
    "nl": {Affinities},
    "noah": {ClassMaps},
    "fbn": {Pairs},
    "bat3d": {Transforms, TimeTransforms},
    "nl3d": {Affinities},
}


def an_input(name):
    return torch.randn(1, 3, 4, 32, 32) if name.endswith("3d") else torch.randn(1, 3, 64, 48)


@pytest.mark.parametrize("name", NETS)
def test_every_mechanism_shows_its_maps_and_the_network_is_left_as_it_was(name):
    torch.manual_seed(0)
    model, x = NETS[name]().train(), an_input(name)
    logits, maps = attention_maps(model, x)
    assert {type(m) for m in maps} == KINDS[name]
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(logits, model.eval()(x)[0].detach())
    for m in maps:
        assert m.name in dict(model.named_modules())
        if isinstance(m, Transforms):
            torch.testing.assert_close(m.p.sum(2), torch.ones(m.p.shape[:2]))
            torch.testing.assert_close(m.q.sum(1), torch.ones(m.q.shape[:2]))
            assert m.before.shape == m.after.shape
        elif isinstance(m, Footprints) and m.normalised:
            torch.testing.assert_close(m.weights.sum(1), torch.ones_like(m.weights[:, 0]))
        elif isinstance(m, ClassMaps):
            assert m.weights.shape[1] == 5
            torch.testing.assert_close(m.weights.sum((2, 3)), torch.ones(m.weights.shape[:2]))
        elif isinstance(m, Affinities):
            torch.testing.assert_close(m.weights.sum((3, 4, 5)), torch.ones(m.weights.shape[:3]))


def test_more_than_one_input_is_refused():
    with pytest.raises(ValueError, match="one at a time"):
        attention_maps(NETS["bat"](), torch.randn(2, 3, 64, 64))


def test_footprint_weights_are_those_of_the_module():
    torch.manual_seed(0)
    module, x = (
        PatchwiseAttention(16, 4, 16, share=4, kernel_size=3, stride=2).eval(),
        torch.randn(1, 16, 9, 8),
    )
    (m,) = attention_maps(nn.Sequential(module), x)[1]
    y = aggregation(module.conv3(x), m.weights.flatten(2)[None], 3, 2)
    torch.testing.assert_close(module(x), y)


def test_non_local_maps_are_what_the_block_sums_with():
    torch.manual_seed(0)
    block, x = NonLocal(8).eval(), torch.randn(2, 8, 4, 3)
    nn.init.ones_(block.bn.weight)
    y = (block.attention(x) @ block.g(x).flatten(2).mT).mT.unflatten(2, (4, 3))
    torch.testing.assert_close(block(x), x + block.bn(block.z(y)))


@pytest.mark.parametrize("per_frame", [False, True])
def test_so_are_those_of_clips(per_frame):
    torch.manual_seed(0)
    block, x = NonLocal3d(8, heads=2, per_frame=per_frame).eval(), torch.randn(1, 8, 3, 4, 4)
    nn.init.ones_(block.W[1].weight)
    y = (block.attention(x) @ block._positions(block.g(x))).mT.flatten(1, 2)
    y = y.unflatten(2, (4, 4)) if per_frame else frames(y.unflatten(2, (3, 4, 4)))
    torch.testing.assert_close(block(x), x + block.W(clips(y, 3)))
    maps = attention_maps(nn.Sequential(block), x)[1]
    assert [m.frame for m in maps] == ([0, 1, 2] if per_frame else [None])


@pytest.mark.parametrize(
    "options", [{}, {"tanh": True}, {"keep_diagonal": True}, {"eval_scale": "published"}]
)
def test_pairs_of_features_add_up_to_the_logit(options):
    torch.manual_seed(0)
    head, x = FBNHead(6, 4, factors=3, **options).eval(), torch.randn(1, 6, 3, 2)
    seen = x.tanh() if head.tanh else x
    linear = head.fc(seen).mean((2, 3)) + head.bilinear.bias
    pairs = torch.stack([head.pairs(x, index)[0] for index in range(4)])
    torch.testing.assert_close(head(x)[0], linear[0] + pairs.sum((1, 2)))
    strongest = strongest_pairs(pairs[0], 36)
    assert sum(value for *_, value in strongest) == pytest.approx(float(pairs[0].sum().detach()), abs=1e-5)
    assert abs(strongest[0][2]) == max(abs(value) for *_, value in strongest)


def test_pairs_drop_no_factor_in_a_model_that_trains():
    torch.manual_seed(0)
    model = nn.Sequential(FBNHead(6, 4, factors=20)).train()
    (m,) = attention_maps(model, torch.randn(1, 6, 3, 2))[1]
    first = m.of_class(1)
    torch.testing.assert_close(m.of_class(1), first, atol=0, rtol=0)
    assert model.training


def test_a_page_of_every_kind_in_a_browser(tmp_path):
    torch.manual_seed(0)
    for name in ("pairwise", "bat", "nl", "noah", "fbn", "bat3d"):
        x = an_input(name)[0]
        page, *pictures = draw_attention(NETS[name](), [("<b>&", x)], ["$<i>$"] * 5, tmp_path / name, top=2)
        assert pictures
        assert "<b>&" not in page.read_text()
        assert "<i>" not in page.read_text()
    seen = seen_in(page, tmp_path)
    assert seen["console"] == []
    assert len(seen["widths"]) == 1 + len(pictures)
    assert min(seen["widths"]) > 100
    assert "temporal matrix" in seen["text"]
    assert "evidence: where what the modules take speaks for a class" in seen["text"]
