"""Checkpoints in the background: what was at the step, one at a time, and no failure that goes unseen."""

import threading
import time

import pytest
import torch

from common.engine import checkpoint
from common.engine.checkpoint import CheckpointConfig, CheckpointError
from common.engine.writer import Writer


def content(tensor):
    return {
        "model.safetensors": {"weight": tensor},
        "optimizer.pt": {"weight": {"momentum_buffer": tensor, "step": tensor[0]}},
        "state.json": {"step": 1},
    }


@pytest.fixture
def slow_disk(monkeypatch):
    """No write goes on before the event is set."""
    event, save = threading.Event(), checkpoint.save

    def waiting(*arguments):
        assert event.wait(30)
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", waiting)
    return event


def test_what_is_written_is_the_state_of_the_step(tmp_path, slow_disk):
    writer, weight = Writer(tmp_path, CheckpointConfig(asynchronous=True)), torch.arange(4.0)
    writer.save(1, content(weight), None)
    weight += 1  # training goes on meanwhile
    assert not writer.failed
    assert not list(tmp_path.iterdir())
    slow_disk.set()
    writer.wait()
    path = checkpoint.newest(tmp_path)
    assert torch.equal(checkpoint.load(path, "model.safetensors")["weight"], torch.arange(4.0))
    state = checkpoint.load(path, "optimizer.pt")["weight"]
    assert torch.equal(state["momentum_buffer"], torch.arange(4.0))
    assert state["step"] == 0


def test_a_save_waits_for_the_one_before_it(tmp_path, slow_disk):
    writer = Writer(tmp_path, CheckpointConfig(asynchronous=True, keep=1))
    writer.save(1, content(torch.ones(2)), 1)
    threading.Timer(0.3, slow_disk.set).start()
    writer.save(2, content(torch.ones(2)), 1)
    assert checkpoint.damage(tmp_path / "step-000000001") is None
    writer.save(3, content(torch.ones(2)), 1)
    writer.wait()
    assert [checkpoint.step_of(path) for path in sorted(tmp_path.iterdir())] == [1, 3], (
        "the best and the newest"
    )
    writer.close()


def test_a_failure_is_seen_and_raised_once(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    writer = Writer(tmp_path / "checkpoints", CheckpointConfig(asynchronous=True))
    writer.save(1, content(torch.ones(2)), None)
    deadline = time.monotonic() + 30
    while not writer.failed:
        assert time.monotonic() < deadline
    with pytest.raises(CheckpointError, match="checkpoint of step 1 not written"):
        writer.wait()
    assert not writer.failed
    writer.wait()
    writer.save(2, content(torch.ones(2)), None)
    with pytest.raises(CheckpointError, match="checkpoint of step 2 not written"):
        writer.wait()
    writer.close()
