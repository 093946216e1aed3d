"""Learning-rate schedules against the published descriptions."""

import math

import pytest

from common.engine.schedule import ScheduleConfig, factor


def test_steps_with_linear_warmup_as_bat_trains():
    config = ScheduleConfig(name="steps", milestones=[30, 60, 80], warmup_epochs=5)
    expected = {0: 0, 1: 0.2, 2.5: 0.5, 5: 1, 29.99: 1, 30: 0.1, 60: 0.01, 80: 1e-3, 89.9: 1e-3}
    for epoch, value in expected.items():
        assert factor(config, epoch, 90) == pytest.approx(value)


def test_slow_start_as_fbn_trains():
    config = ScheduleConfig(name="steps", milestones=[100, 150], warmup_epochs=3, warmup_from=0.1)
    assert [factor(config, epoch, 200) for epoch in (0, 1.5, 3, 100)] == pytest.approx([0.1, 0.55, 1, 0.1])


def test_constant_warmup_as_plain_cifar_resnets_train():
    config = ScheduleConfig(
        name="steps", milestones=[100], warmup_epochs=1, warmup_from=0.1, warmup_shape="constant"
    )
    assert [factor(config, epoch, 200) for epoch in (0, 0.99, 1)] == pytest.approx([0.1, 0.1, 1])


def test_cosine_per_epoch_moves_only_between_epochs():
    config = ScheduleConfig(name="cosine", per="epoch")
    assert factor(config, 3.0, 100) == factor(config, 3.9, 100)
    assert factor(config, 50, 100) == pytest.approx(0.5)
    assert factor(config, 99, 100) == pytest.approx((1 + math.cos(math.pi * 0.99)) / 2)


def test_cosine_and_linear_end_at_final():
    assert factor(ScheduleConfig(name="cosine", final=0.01), 300, 300) == pytest.approx(0.01)
    assert factor(ScheduleConfig(name="linear"), 240, 240) == pytest.approx(0)
    assert factor(ScheduleConfig(name="linear"), 60, 240) == pytest.approx(0.75)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"name": "steps"}, "milestones"),
        ({"name": "steps", "milestones": [60, 30]}, "rising order"),
        ({"warmup_epochs": -1}, "warmup_epochs = -1"),
    ],
)
def test_bad_values_name_the_field(bad, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**bad)


@pytest.mark.parametrize(
    "settings", [{"name": "steps", "milestones": [5, 15]}, {"name": "cosine", "final": 0.1}]
)
def test_a_run_that_begins_at_an_epoch_goes_the_rest_of_the_whole_schedule(settings):
    whole = ScheduleConfig(warmup_epochs=3, warmup_from=0.1, **settings)
    rest = ScheduleConfig(warmup_epochs=3, warmup_from=0.1, begin_epoch=12.0, **settings)
    for epoch in (0, 2.9, 3, 7.5):
        assert factor(rest, epoch, 8) == factor(whole, 12 + epoch, 20)
