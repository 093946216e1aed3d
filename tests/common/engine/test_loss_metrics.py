"""Losses against their formulas, and metrics against plain counting."""

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from common.data.loader import FILLER, UNREADABLE
from common.engine.loss import LossConfig, loss_sum
from common.engine.metrics import EvalMeter, TrainMeter

LOGITS = torch.randn(20, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(20) % 7


def test_san_smoothing_spreads_over_the_other_classes():
    eps, log_p = 0.1, LOGITS.log_softmax(1)
    hot = one_hot(TARGETS, 7)
    expected = -(((1 - eps) * hot + eps / 6 * (1 - hot)) * log_p).sum()
    found = loss_sum(LossConfig(smoothing=eps, smoothing_over="others"), LOGITS, TARGETS)
    torch.testing.assert_close(found, expected)


def test_standard_smoothing_and_none():
    expected = cross_entropy(LOGITS, TARGETS, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss_sum(LossConfig(smoothing=0.1), LOGITS, TARGETS), expected)
    plain = -LOGITS.log_softmax(1)[torch.arange(20), TARGETS].sum()
    torch.testing.assert_close(loss_sum(LossConfig(), LOGITS, TARGETS), plain)


def test_soft_targets_smooth_like_the_mix_of_their_parts():
    config = LossConfig(smoothing=0.1)
    soft = 0.3 * one_hot(TARGETS, 7) + 0.7 * one_hot(TARGETS.flip(0), 7).double()
    parts = 0.3 * loss_sum(config, LOGITS, TARGETS) + 0.7 * loss_sum(config, LOGITS, TARGETS.flip(0))
    torch.testing.assert_close(loss_sum(config, LOGITS, soft), parts)


def test_evaluation_counts_every_labelled_row_once():
    targets = TARGETS.clone()
    targets[[2, 5]], targets[18:] = UNREADABLE, FILLER
    meter = EvalMeter(7, torch.device("cpu"))
    for rows in (slice(0, 6), slice(6, 20)):
        meter.add(LOGITS[rows], targets[rows])
    result = meter.compute()

    rows = [row for row in range(18) if row not in (2, 5)]
    ranks = [(LOGITS[row] > LOGITS[row, targets[row]]).sum().item() for row in rows]
    assert result["samples"] == 18
    assert result["unreadable"] == 2
    assert result["top1"] == pytest.approx(100 * sum(rank == 0 for rank in ranks) / 18)
    assert result["top5"] == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 18)
    assert result["loss"] == pytest.approx(cross_entropy(LOGITS[rows], targets[rows]).item(), rel=1e-6)
    for row in rows:
        result["confusion"][targets[row]][LOGITS[row].argmax()] -= 1
    assert not any(any(line) for line in result["confusion"])


def test_classes_without_samples_have_no_accuracy():
    meter = EvalMeter(3, torch.device("cpu"))
    meter.add(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]), torch.tensor([0, 0]))
    result = meter.compute()
    assert result["per_class"] == [50.0, None, None]
    assert result["mean_class"] == 50.0


def test_training_means_are_over_samples_not_batches():
    meter = TrainMeter(torch.device("cpu"))
    for rows in (slice(0, 3), slice(3, 20)):
        meter.add(cross_entropy(LOGITS[rows], TARGETS[rows], reduction="sum"), LOGITS[rows], TARGETS[rows])
    result = meter.compute()
    assert result["loss"] == pytest.approx(cross_entropy(LOGITS, TARGETS).item())
    assert result["top1"] == pytest.approx(100 * (LOGITS.argmax(1) == TARGETS).double().mean().item())
