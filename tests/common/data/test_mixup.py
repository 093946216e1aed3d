"""Mixup and CutMix: timm's rules, with partners and λ that do not depend on how a batch is divided."""

import pytest
import torch

from common.data.mixup import MixupConfig, mix
from common.data.order import Division

IMAGES = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(12) % 5


@pytest.mark.parametrize(
    "config", [MixupConfig(mixup=0.8), MixupConfig(cutmix=1.0), MixupConfig(mixup=0.8, cutmix=1.0)]
)
def test_division_changes_nothing(config):
    for step in range(6):
        whole = mix(config, IMAGES, TARGETS, 5, seed=0, step=step)
        parts = []
        for rank in range(3):
            part = Division(12, world=3, rank=rank).micro_batch(0)
            parts.append(mix(config, IMAGES[part], TARGETS[part], 5, seed=0, step=step))
        for expected, pieces in zip(whole, zip(*parts)):
            assert torch.equal(expected, torch.cat(pieces))


def test_mixup_mixes_images_and_labels_alike():
    images, targets = mix(MixupConfig(mixup=0.8), IMAGES, TARGETS, 5, seed=0, step=1)
    lam = targets[0, 0].item()
    assert 0 < lam < 1
    torch.testing.assert_close(images[0], lam * IMAGES[0] + (1 - lam) * IMAGES[1])
    torch.testing.assert_close(targets[0], torch.tensor([lam, 1 - lam, 0, 0, 0]))


def test_cutmix_labels_follow_the_area_of_the_box():
    for step in range(8):
        images, targets = mix(MixupConfig(cutmix=1.0), IMAGES, TARGETS, 5, seed=0, step=step)
        own = (images[0] == IMAGES[0]).all(0).double().mean().item()
        assert targets[0, 0].item() == pytest.approx(own)
        other = (images[0] == IMAGES[1]).all(0).double().mean().item()
        assert own + other == pytest.approx(1)


def test_probabilities_and_off():
    assert not MixupConfig().on
    never = MixupConfig(mixup=1.0, prob=0.0)
    assert not never.on
    images, targets = mix(MixupConfig(mixup=1.0, prob=1e-9), IMAGES, TARGETS, 5, seed=0, step=0)
    assert torch.equal(images, IMAGES)
    assert torch.equal(targets.argmax(1), TARGETS)


def test_an_odd_last_sample_keeps_to_itself():
    images, targets = mix(MixupConfig(mixup=0.8), IMAGES[:3], TARGETS[:3], 5, seed=0, step=1)
    torch.testing.assert_close(images[2], IMAGES[2])
    torch.testing.assert_close(targets[2], torch.eye(5)[2])
