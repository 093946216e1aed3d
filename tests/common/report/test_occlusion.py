"""What the pictures of attention show is true: hiding it costs the class more than hiding anything else."""

import json

import numpy as np
import pytest
import timm
import torch
import yaml
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import image.models  # noqa: F401
from common.attention.attach import attach
from common.attention.bat import BilinearTransform
from common.attention.bat_video import BilinearTransform3d
from common.attention.san import PairwiseAttention, PatchwiseAttention, SelfAttention
from common.data.digits import digits_images, prepare_digits
from common.export import open_model
from common.report.evidence import evidence, log_odds, on_inputs
from common.report.maps import attended, attention_maps
from common.report.occlusion import excess, hide, occlude
from tests.processes import ROOT, run

pytestmark = pytest.mark.xdist_group("occlusion")


def clearly_more(costs, than):
    """By three standard errors, over the validation digits."""
    mean, error = excess(costs, than)
    return mean > 3 * error


def test_noah_attends_to_what_counts():
    model, images, targets = noah_network()
    heat = torch.stack(
        [
            attended(attention_maps(model, x[None])[1][0], target)
            for x, target in zip(images, targets.tolist())
        ]
    )
    costs = occlude(model, images, targets, heat, side=10)
    assert costs.random.mean() > 0
    assert clearly_more(costs.highest, costs.random)
    assert clearly_more(costs.highest, costs.lowest)


def noah_network():
    """A small NOAH network after six epochs of real digits, 8×8 enlarged, and the validation digits."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = (F.interpolate(images, size=(32, 32), mode="bilinear") - 0.3) / 0.4
    targets, order = torch.tensor(digits.target), torch.randperm(len(images))
    train, val = order[:1437], order[1437:]
    arguments = {"layers": [1] * 4, "channels": [16, 24, 32, 48], "in_chans": 1, "num_classes": 10}
    model = attach(timm.create_model("resnet18", output_stride=8, **arguments), "noah")
    fit(model, images[train], targets[train], epochs=6, rate=0.1)
    return model, images[val], targets[val]


def fit(model, images, targets, epochs, rate):
    steps = epochs * len(images) // 64
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        batch = torch.arange(64 * step, 64 * (step + 1)) % len(images)
        F.cross_entropy(model(images[batch]), targets[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def digits64(split):
    """The digits as the demo sees them, normalised, and their classes."""
    _, images, targets = zip(*digits_images(split, 64))
    images = torch.tensor(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean[:, None, None]) / std[:, None, None], torch.tensor(targets)


def costs_of_evidence(model, images, targets):
    logits, shares = evidence(model, images, targets)
    assert (logits.argmax(1) == targets).float().mean() > 0.9
    return occlude(model, images, targets, on_inputs(shares, (64, 64)), side=20)


def test_the_demos_network_takes_evidence_from_where_it_is_drawn():
    """After five epochs instead of fifteen: too early to tell the highest from a random place in every network."""
    recipe = yaml.safe_load((ROOT / "image/recipes/digits.yaml").read_text())["model"]
    torch.manual_seed(0)
    model = timm.create_model(recipe["name"], num_classes=10, **recipe["args"])
    train, targets = digits64("train")
    order = torch.randperm(len(train))
    fit(model, train[order], targets[order], epochs=5, rate=0.1)
    costs = costs_of_evidence(model, *digits64("val"))
    assert clearly_more(costs.highest, costs.lowest)
    assert clearly_more(costs.random, costs.lowest)
    assert not clearly_more(costs.others, costs.random), "another digit's map must not do"


@pytest.mark.slow
def test_so_does_the_demo_itself(tmp_path):
    prepare_digits(tmp_path / "data", "folder")
    done = run(
        "image/train.py", out=tmp_path / "demo", data__path=tmp_path / "data", data__workers=0, log__every=100
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "demo" / "evaluation.json").read_text())["top1"] > 97
    model, _ = open_model(str(tmp_path / "demo"))
    costs = costs_of_evidence(model, *digits64("val"))
    assert clearly_more(costs.highest, costs.random)
    assert clearly_more(costs.highest, costs.others)
    assert clearly_more(costs.random, costs.lowest)
    assert not clearly_more(costs.others, costs.random), "another digit's map must not do"


class Averaged(nn.Module):
    """A mechanism before a linear classifier, in float64."""

    def __init__(self, mechanism, channels):
        super().__init__()
        self.mechanism, self.fc = mechanism, nn.Linear(channels, 4)
        self.double()

    def forward(self, x):
        return self.fc(self.mechanism(x).flatten(2).mean(2))


@pytest.mark.parametrize(
    "module, size",
    [
        (lambda: BilinearTransform(8, 3, 2), (9, 6)),
        (lambda: BilinearTransform(8, 3, 2), (7, 8)),
        (lambda: BilinearTransform3d(8, 2, 2, 2, 2), (4, 4, 6)),
        (lambda: BilinearTransform3d(8, 2, 2, 2, 2), (3, 5, 4)),
        (lambda: PairwiseAttention(8, 4, 8, share=4), (5, 6)),
        (lambda: PatchwiseAttention(8, 4, 8, share=4, stride=2), (5, 6)),
    ],
)
def test_the_evidence_adds_up_to_what_the_mechanism_gives(module, size):
    """To the slope of the log-odds as all that is moved is scaled, by finite differences."""
    torch.manual_seed(0)
    model, x = Averaged(module(), 8).eval(), torch.randn(2, 8, *size, dtype=torch.float64)
    targets, attention = torch.tensor([1, 3]), isinstance(model.mechanism, SelfAttention)
    logits, shares = evidence(model, x, targets)
    torch.testing.assert_close(logits, model(x).detach())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def scaled(factor):
        if attention:
            hook = model.mechanism.register_forward_hook(lambda _, __, output: output * factor)
        else:
            hook = model.mechanism.conv2.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor,))
        with torch.no_grad():
            score = log_odds(model(x), targets)
        hook.remove()
        return score

    slope = (scaled(1 + 1e-6) - scaled(1 - 1e-6)) / 2e-6
    torch.testing.assert_close(shares["mechanism"].flatten(1).sum(1), slope, atol=1e-7, rtol=1e-6)
    assert on_inputs(shares, size).shape == (2, *size)


def test_the_evidence_lies_where_it_is_taken_from_not_where_it_is_put(monkeypatch):
    torch.manual_seed(0)
    module = BilinearTransform(4, 2, 1).double().eval()
    turned = torch.eye(2, dtype=torch.float64).flip(0)[None, None]
    monkeypatch.setattr(module, "matrices", lambda x: (turned, turned))
    monkeypatch.setattr(module, "conv2", nn.Identity())

    class Corner(nn.Module):
        def __init__(self):
            super().__init__()
            self.transform = module

        def forward(self, x):
            return self.transform(x)[:, :, 0, 0]

    _, shares = evidence(Corner(), torch.randn(1, 4, 4, 4, dtype=torch.float64), torch.tensor([2]))
    assert shares["transform"].nonzero().tolist() == [[0, 2, 2]]


def test_networks_without_bat_and_san_have_none():
    model = timm.create_model("resnet18", layers=[1] * 4, channels=[8] * 4, num_classes=3)
    assert evidence(model, torch.randn(1, 3, 32, 32), torch.tensor([0]))[1] == {}


def test_a_map_of_the_only_pixels_that_count_finds_them():
    class Patch(nn.Module):
        def forward(self, x):
            inside = x[:, 0, 4:8, 8:12].mean((1, 2))
            return torch.stack([inside, torch.zeros_like(inside)], 1)

    images, targets = torch.ones(6, 1, 16, 16), torch.zeros(6, dtype=torch.long)
    heat = torch.zeros(6, 16, 16)
    heat[:, 4:8, 8:12] = 1
    costs = occlude(Patch(), images, targets, heat, side=4)
    torch.testing.assert_close(costs.highest, torch.full((6,), torch.sigmoid(torch.tensor(1.0)).item() - 0.5))
    assert costs.lowest.abs().max() == 0
    assert costs.random.mean() < costs.highest.mean()
    assert hide(images[0], 0, 0, 4).sum() == 16 * 16 - 16
