"""Which mode a start is in, from its settings and what the launcher left in the environment."""

import pytest

from common.engine.config import EngineConfig, TrainConfig
from common.engine.parallel import choose
from common.errors import ConfigError

ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


def chosen(monkeypatch, environment, training=True, **settings):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = EngineConfig(**settings)
    choose(config, training)
    return config


def test_the_launchers_settings_count(monkeypatch):
    assert chosen(monkeypatch, ZERO2).parallel == "zero2"
    offloading = ZERO2 | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    assert chosen(monkeypatch, offloading).offload


def test_a_single_process_is_ddp(monkeypatch):
    assert chosen(monkeypatch, {}).parallel == "ddp"
    assert (
        chosen(monkeypatch, {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}).parallel
        == "ddp"
    )


@pytest.mark.parametrize(
    "environment, settings, expected",
    [
        (ZERO2, {"parallel": "ddp"}, "accelerate launch was told zero2"),
        (ZERO2, {"train": TrainConfig(ema=0.9)}, "parallel = zero2: does not go with train.ema"),
        ({}, {"offload": True}, "offload = true: does not go with parallel = ddp"),
        ({"WORLD_SIZE": "2"}, {"parallel": "fsdp", "offload": True}, "does not go with offload"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, {}, "told of several processes"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "accelerate launch was told bf16"),
    ],
)
def test_what_contradicts_is_an_error(monkeypatch, environment, settings, expected):
    with pytest.raises(ConfigError, match=expected):
        chosen(monkeypatch, environment, **settings)


def test_an_evaluation_has_a_whole_copy_however_it_was_trained(monkeypatch):
    environment = {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "bf16"}
    assert chosen(monkeypatch, environment, training=False, parallel="zero3", offload=True).parallel == "ddp"
