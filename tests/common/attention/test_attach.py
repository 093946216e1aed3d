"""Mechanisms attached to timm's networks of every kind, with timm's API still whole."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.models.resnet import ResNet
from torch import Tensor, nn

from common.attention.attach import attach, example_input, insert_blocks, replace_head
from common.attention.bat import BATBlock
from common.attention.fbn import FBNHead
from common.attention.noah import NOAH

TINY_VIT = {"img_size": 64, "depth": 2}
# Network → arguments, input size, name of its classifier, positions of its features, a module for a block.
NETWORKS: dict[str, tuple[dict, tuple[int, int], str, int, str]] = {
    "resnet10t": ({}, (64, 96), "fc", 6, "layer2"),
    "convnext_atto": ({}, (64, 96), "head.fc", 6, "stages.1.blocks.0"),
    "efficientnet_lite0": ({}, (64, 96), "classifier", 6, "blocks.2.0"),
    "mobilenetv3_small_050": ({}, (64, 96), "classifier", 6, "blocks.1"),
    "regnetx_002": ({}, (64, 96), "head.fc", 6, "s2"),
    "densenet121": ({}, (64, 96), "classifier", 6, "features.denseblock1.denselayer2"),
    "mobileone_s0": ({}, (64, 96), "head.fc", 6, "stages.1.0"),
    "vgg11": ({}, (64, 96), "head.fc", 6, "features.5"),
    "efficientvit_b0": ({}, (64, 96), "head.classifier.4", 6, "stages.1"),
    "mambaout_femto": ({}, (64, 96), "head.fc", 6, "stages.1.blocks.0"),
    "vit_tiny_patch16_224": (TINY_VIT, (64, 64), "head", 16, "blocks.0"),
    "deit_tiny_distilled_patch16_224": (TINY_VIT, (64, 64), "head", 16, "blocks.0"),
    "deit3_small_patch16_224": ({"img_size": (32, 64), "depth": 2}, (32, 64), "head", 8, "blocks.0"),
    "beit_base_patch16_224": (TINY_VIT | {"embed_dim": 48, "num_heads": 3}, (64, 64), "head", 16, "blocks.0"),
    "swin_tiny_patch4_window7_224": (
        {"img_size": (64, 128), "window_size": 4, "depths": (1, 1), "embed_dim": 24, "num_heads": (2, 2)},
        (64, 128),
        "head.fc",
        128,
        "layers.0.blocks.0",
    ),
    "mixer_s32_224": ({"img_size": 64}, (64, 64), "head", 4, "blocks.0"),
    "gmlp_ti16_224": ({"img_size": 64}, (64, 64), "head", 16, "blocks.0"),
    "resmlp_12_224": ({"img_size": 64}, (64, 64), "head", 16, "blocks.0"),
}
FEW = ["resnet10t", "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224"]


class Sees(nn.Module):
    """A head that keeps what it sees; the logits are a linear map of the mean."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.linear(x.flatten(2).mean(2))


def network(name: str, **kwargs: object) -> tuple[nn.Module, Tensor]:
    """A small version of the network in evaluation mode, and a batch of two for it."""
    torch.manual_seed(0)
    arguments, size, *_ = NETWORKS[name]
    model = timm.create_model(name, **{"num_classes": 10} | arguments | kwargs).eval()
    return model, torch.randn(2, 3, *size)


@pytest.mark.parametrize("name", NETWORKS)
def test_noah_replaces_the_head_and_keeps_the_api(name: str) -> None:
    model, x = network(name)
    before, kind = model.state_dict(), type(model)
    assert attach(model, "noah", heads=2, key_ratio=0.5) is model
    classifier = NETWORKS[name][2]
    assert isinstance(model, kind)
    assert type(model).__name__ == kind.__name__
    added = {key for key in model.state_dict() if key not in before}
    assert added == {
        f"{classifier}.{part}.{leaf}" for part in ("query", "value") for leaf in ("weight", "bias")
    } - set(before)
    for key, value in model.state_dict().items():
        assert key.startswith(classifier) or torch.equal(value, before[key])

    features = model.forward_features(x)
    logits = model(x)
    assert logits.shape == (2, 10)
    assert torch.equal(model.forward_head(features), logits)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert isinstance(model.get_classifier(), NOAH)
    assert model.get_classifier(name_only=True) == classifier

    model.reset_classifier(3)
    assert isinstance(model.get_classifier(), NOAH)
    assert model(x).shape == (2, 3)
    assert model.num_classes == 3
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), model.forward_head(features, pre_logits=True))
    model.reset_classifier(0, "")
    assert model(x).ndim == features.ndim


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_see_every_position_and_no_prefix_token(name: str) -> None:
    model, x = network(name)
    replace_head(model, Sees)
    model(x).sum().backward()
    seen = model.get_classifier().seen
    assert seen.shape[:2] == (2, model.head_hidden_size)
    assert seen.flatten(2).shape[2] == NETWORKS[name][3]
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not without, f"parameters that no longer do anything: {without}"


@pytest.mark.parametrize(
    "name", ["resnet10t", "convnext_atto", "swin_tiny_patch4_window7_224", "resmlp_12_224"]
)
def test_the_mean_of_what_heads_see_is_what_timm_pools(name: str) -> None:
    """Where nothing but pooling lies between the features and the classifier, or a norm that is the same."""
    model, x = network(name)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    if name == "convnext_atto":  # its norm comes after pooling; at every position it gives other numbers
        model.head.norm = nn.Identity()
        pooled = model.forward_features(x).mean((2, 3))
    replace_head(model, Sees)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)


def test_tokens_are_those_of_the_final_norm() -> None:
    model, x = network("vit_tiny_patch16_224")
    tokens = model.forward_features(x)
    replace_head(model, Sees)(x)
    torch.testing.assert_close(model.get_classifier().seen, tokens[:, 1:].transpose(1, 2))


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("mechanism", ["noah", "fbn", "bat", "nl"])
def test_copies_and_pickles(name: str, mechanism: str) -> None:
    model, x = network(name)
    options = {"heads": 2} if mechanism == "noah" else {"factors": 3} if mechanism == "fbn" else {}
    blocks = {"after": {NETWORKS[name][4]}} if mechanism in ("bat", "nl") else {}
    attach(model, mechanism, **blocks, **options)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other(x), expected)
        for a, b in zip(other.parameters(), model.parameters()):
            assert a.data_ptr() != b.data_ptr()
            nn.init.zeros_(a)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_fbn_replaces_the_head(name: str) -> None:
    model, x = network(name)
    attach(model, "fbn", factors=3, drop=0.0)
    head = model.get_classifier()
    assert isinstance(head, FBNHead)
    assert model(x).shape == (2, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # some start residual branches at zero
            nn.init.ones_(module.weight)
    seen = model._layout.channels_first(model._unpooled(model.forward_features(x)))
    replaced = [key for key, module in model.named_modules() if isinstance(module, nn.Tanh)]
    assert len(replaced) == (0 if head.tanh else 1)
    assert head.tanh or (seen.min() < 0 and seen.abs().max() <= 1)


def test_fbn_puts_tanh_where_the_last_activation_was() -> None:
    for name, last in (("resnet10t", "layer4.0.act2"), ("densenet121", "features.norm5.act")):
        model, _ = network(name)
        attach(model, "fbn", factors=3)
        assert isinstance(model.get_submodule(last), nn.Tanh)
        assert not model.get_classifier().tanh
    model, x = network("vit_tiny_patch16_224")
    attach(model, "fbn", factors=3)
    assert model.get_classifier().tanh
    model.reset_classifier(4)
    assert model.get_classifier().tanh
    assert model(x).shape == (2, 4)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("mechanism", ["bat", "nl"])
def test_blocks_go_after_modules(name: str, mechanism: str) -> None:
    model, x = network(name)
    before, kind = set(model.state_dict()), type(model)
    place = NETWORKS[name][4]
    torch.nn.init.normal_(next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)).weight)
    plain = model.forward_features(x)
    options = {"size": 4, "groups": 2, "dropout": 0.0} if mechanism == "bat" else {}
    attach(model, mechanism, after={place}, **options)
    assert type(model) is kind
    added = set(model.state_dict()) - before
    assert added
    assert before <= set(model.state_dict())
    assert all(key.startswith(f"{place}.") and f".{mechanism}." in key for key in added)

    block = next(m for n, m in model.named_modules() if n.endswith(f".{mechanism}"))
    calls: list[torch.Size] = []
    block.register_forward_hook(lambda _, args, out: calls.append(args[0].shape) or None)
    last_norm = block.conv2[1] if mechanism == "bat" else block.bn
    nn.init.zeros_(last_norm.weight)
    nn.init.zeros_(last_norm.bias)
    torch.testing.assert_close(model.forward_features(x), plain)  # the identity changes nothing
    nn.init.ones_(last_norm.bias)
    assert not torch.equal(model.forward_features(x), plain)
    assert len(calls) == 2
    batch, _, height, width = calls[0]
    assert batch == 2
    assert height / width == pytest.approx(x.shape[2] / x.shape[3], rel=0.35)
    model(x).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_blocks_leave_prefix_tokens_alone() -> None:
    model, x = network("deit_tiny_distilled_patch16_224")
    before = model.forward_intermediates(x, indices=[0], return_prefix_tokens=True, intermediates_only=True)
    attach(model, "nl", after=["blocks.0"])
    nn.init.ones_(model.blocks[0].nl.bn.bias)
    after = model.forward_intermediates(x, indices=[0], return_prefix_tokens=True, intermediates_only=True)
    torch.testing.assert_close(after[0][0], before[0][0] + 1)
    assert torch.equal(after[0][1], before[0][1])


def test_a_block_after_a_sequence_is_run_once() -> None:
    """``layer2`` and its last module are the same place; the stage of a RegNet runs all its children."""
    model, x = network("resnet10t")
    attach(model, "bat", after="layer2", size=2)
    assert isinstance(model.layer2[0].bat, BATBlock)
    model, x = network("regnetx_002")
    attach(model, "nl", after=["s2"])
    calls: list[int] = []
    [block] = [m for n, m in model.named_modules() if n.endswith(".nl")]
    block.register_forward_hook(lambda *_: calls.append(1))
    model(x)
    assert calls == [1]


def test_blocks_and_heads_go_together_with_timms_tools() -> None:
    model, x = network("resnet10t")
    attach(model, "bat", after={"layer2.0", "layer3.0"}, size=2)
    attach(model, "noah", heads=2)
    wanted = model(x)
    model.train()
    model.set_grad_checkpointing()
    model(x).sum().backward()
    assert model.layer2[0].bat.conv1[0].weight.grad is not None
    model.eval()
    model.set_grad_checkpointing(False)
    assert [m.shape[1] for m in model.forward_intermediates(x)[1]] == [64, 64, 128, 256, 512]
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["layer2.0.bat.conv1.0.weight"] == groups["layer2.0.conv1.weight"]
    assert wanted.shape == (2, 10)

    features = timm.create_model("resnet10t", features_only=True).eval()
    attach(features, "nl", after=["layer3"])
    plain = features(x)
    nn.init.ones_(features.layer3[0].nl.bn.bias)
    changed = features(x)
    assert torch.equal(changed[2], plain[2])
    torch.testing.assert_close(changed[3], plain[3] + 1)


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_one_graph_export_and_half_precision(name: str) -> None:
    model, x = network(name)
    attach(model, "bat", after={NETWORKS[name][4]}, size=4, groups=2)
    attach(model, "noah", heads=2)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(exported(x[:1]), model(x[:1]))
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x).float() - expected).norm() < 0.05 * expected.norm()


def test_heads_follow_device_and_dtype() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    assert attach(model, "noah").get_classifier().query.weight.is_meta
    model, x = network("resnet10t")
    attach(model.double(), "nl", after=["layer1"])
    assert attach(model, "noah")(x.double()).dtype == torch.float64
    model.reset_classifier(5)
    assert model(x.double()).dtype == torch.float64


def test_attaching_leaves_modes_statistics_and_randomness_alone() -> None:
    model, _ = network("resnet10t")
    model.train()
    model.layer1.eval()
    statistics = model.bn1.running_mean.clone()
    torch.manual_seed(0)
    attach(model, "nl", after=["layer1"])
    attach(model, "noah")
    after = torch.rand(1)
    assert model.training
    assert not model.layer1.training
    assert not model.layer1[0].nl.training
    assert model.get_classifier().training
    assert torch.equal(model.bn1.running_mean, statistics)
    torch.manual_seed(0)
    assert not torch.equal(after, torch.rand(1))  # the block drew its weights, ...
    assert model.bn1.num_batches_tracked == 0  # ... but no image went through in training mode


def test_a_head_can_be_replaced_again_and_made_late() -> None:
    model, x = network("convnext_atto")
    attach(model, "fbn", factors=3)
    attach(model, "noah", heads=2)
    assert isinstance(model.head.fc, NOAH)
    assert model(x).shape == (2, 10)
    model, x = network("resnet10t", num_classes=0)
    attach(model, "noah", heads=2)
    assert model(x).shape == (2, 512)
    model.reset_classifier(4)
    assert isinstance(model.fc, NOAH)
    assert model(x).shape == (2, 4)


def test_images_of_other_channels_and_sizes() -> None:
    model, _ = network("resnet10t", in_chans=1)
    attach(model, "noah")
    for size in ((32, 32), (64, 160), (224, 224)):
        assert model(torch.randn(1, 1, *size)).shape == (1, 10)
    model, _ = network("vit_tiny_patch16_224", dynamic_img_size=True)
    attach(model, "bat", after=["blocks.0"], size=4)
    attach(model, "noah")
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 10)
    with pytest.raises(ValueError, match=r"24 tokens fill neither the grid \(4, 4\) nor a square"):
        model(torch.randn(1, 3, 64, 96))


def test_example_input_follows_the_model() -> None:
    assert example_input(network("vit_tiny_patch16_224")[0]).shape == (1, 3, 64, 64)
    assert example_input(network("resnet10t", in_chans=1)[0].double()).dtype == torch.float64


def test_values_that_do_not_fit_are_named() -> None:
    model, x = network("resnet10t")
    logits = model(x)
    with pytest.raises(ValueError, match=r"mechanism='cbam': must be one of \['bat', 'fbn', 'nl', 'noah'\]"):
        attach(model, "cbam")
    with pytest.raises(ValueError, match=r"no module 'layer2\.3'; the nearest are layer\d\.0"):
        attach(model, "bat", after={"layer2.3"})
    with pytest.raises(ValueError, match=r"after=\(\): name the modules .*layer"):
        attach(model, "bat")
    with pytest.raises(ValueError, match="'fc' gives a tensor of shape"):
        attach(model, "bat", after={"fc"})
    with pytest.raises(ValueError, match="noah is a head"):
        attach(model, "noah", after={"layer1"})
    with pytest.raises(ValueError, match=r"groups=3 does not divide channels=32: use one of \[1, 2, 4"):
        attach(model, "bat", after={"layer1", "layer2"}, groups=3)
    assert torch.equal(model(x), logits)  # what failed changed nothing
    attach(model, "nl", after={"layer1"})
    with pytest.raises(ValueError, match=r"'layer1\.0' has a 'nl' already"):
        attach(model, "nl", after={"layer1.0"})
    with pytest.raises(
        ValueError, match="heads=5 does not divide the 256 query and 256 value channels: use heads"
    ):
        attach(model, "noah", heads=5)


def test_models_without_fit_features_are_refused() -> None:
    with pytest.raises(ValueError, match="CrossVit has no single map of features"):
        attach(timm.create_model("crossvit_tiny_240", depth=((1, 1, 1),)), "noah")
    with pytest.raises(ValueError, match="Sequential is not a classification model of timm"):
        attach(nn.Sequential(nn.Conv2d(3, 8, 1)), "noah")
    model, _ = network("densenet121")
    with pytest.raises(ValueError, match=r"'features\.denseblock1' is a container"):
        attach(model, "bat", after={"features.denseblock1"})
    assert isinstance(insert_blocks(timm.create_model("resnet10t"), "extra", ["layer1"], nn.Identity), ResNet)
