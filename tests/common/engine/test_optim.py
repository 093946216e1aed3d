"""Parameter groups, timm's optimizers, and an optimizer's state by name."""

import pytest
import torch
from torch import nn

from common.engine import checkpoint
from common.engine.optim import (
    OptimConfig,
    build_optimizer,
    load_named_state,
    named_state,
    parameter_groups,
    set_lr,
)
from common.errors import ConfigError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4))
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def no_weight_decay(self):
        return {"pos_embed"}

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).mean((2, 3)) + self.pos_embed)


def settings(config):
    """Parameter name → (weight decay, learning-rate factor)."""
    net = Net()
    names = {id(p): name for name, p in net.named_parameters()}
    groups = parameter_groups(net, config)
    return {names[id(p)]: (g["weight_decay"], g["lr_scale"]) for g in groups for p in g["params"]}


def test_norm_and_bias_do_not_decay():
    decay = {name: wd for name, (wd, _) in settings(OptimConfig(weight_decay=0.1)).items()}
    assert {name for name, wd in decay.items() if wd == 0.1} == {"conv.weight", "fc.weight"}
    assert set(decay) == {name for name, _ in Net().named_parameters()}


def test_published_image_recipes_decay_everything():
    config = OptimConfig(weight_decay=0.1, decay_norm=True, decay_bias=True)
    assert {wd for wd, _ in settings(config).values()} == {0.1}


def test_bat_video_doubles_the_rate_of_biases_but_not_of_norms():
    scale = {name: s for name, (_, s) in settings(OptimConfig(bias_lr=2.0)).items()}
    assert {name for name, s in scale.items() if s == 2} == {"conv.bias", "fc.bias"}


def test_factors_by_pattern_and_frozen_parameters():
    found = settings(OptimConfig(lr_scale={r"^fc\.": 0.1}, freeze=[r"^conv"], bias_lr=2.0))
    assert found["fc.weight"][1] == pytest.approx(0.1)
    assert found["fc.bias"][1] == pytest.approx(0.2)
    assert "conv.weight" not in found


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name():
    with pytest.raises(ConfigError, match="optim.freeze: 'convv' matches no parameter; did you mean 'conv'"):
        parameter_groups(Net(), OptimConfig(freeze=["convv"]))
    with pytest.raises(ValueError, match="not a regular expression"):
        OptimConfig(freeze=["("])


def test_sgd_is_the_fields_sgd_and_nag_is_nesterovs():
    assert not build_optimizer(Net(), OptimConfig(name="sgd")).param_groups[0]["nesterov"]
    assert build_optimizer(Net(), OptimConfig(name="nag")).param_groups[0]["nesterov"]
    adam = build_optimizer(Net(), OptimConfig(name="adamw", betas=(0.8, 0.9), eps=1e-6)).param_groups[0]
    assert (adam["betas"], adam["eps"]) == ((0.8, 0.9), 1e-6)


def test_set_lr_respects_the_groups():
    optimizer = build_optimizer(Net(), OptimConfig(bias_lr=2.0))
    set_lr(optimizer, 0.3)
    assert {round(group["lr"] / group["lr_scale"], 9) for group in optimizer.param_groups} == {0.3}
    assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0, 2.0}


@pytest.mark.parametrize("name", ["sgd", "nag", "adamw"])
def test_named_state_continues_bit_exactly_under_another_grouping(name, tmp_path):
    def step(net, optimizer, seed):
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    net = Net()
    optimizer = build_optimizer(net, OptimConfig(name=name, weight_decay=0))
    for seed in range(3):
        step(net, optimizer, seed)
    other = Net()
    other.load_state_dict(net.state_dict())
    # Other groups; their factors act only through set_lr, which is not called here.
    regrouped = build_optimizer(
        other, OptimConfig(name=name, weight_decay=0, lr_scale={"^conv": 2.0}, bias_lr=3.0)
    )
    assert len(regrouped.param_groups) > len(optimizer.param_groups)
    path = checkpoint.save(tmp_path, 3, {"optimizer.pt": named_state(net, optimizer)})
    load_named_state(other, regrouped, checkpoint.tensors(path, "optimizer"))
    for seed in range(3, 6):
        step(net, optimizer, seed)
        step(other, regrouped, seed)
    for a, b in zip(net.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b)
