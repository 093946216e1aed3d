"""The loop itself, in one process on made-up data."""

import os
import signal
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.overrides import TorchFunctionMode

from common.data.loader import Batch, Unreadable
from common.engine import checkpoint
from common.engine.checkpoint import CheckpointConfig, RefusedError
from common.engine.config import EngineConfig, TrainConfig
from common.engine.log import LogConfig
from common.engine.optim import OptimConfig
from common.engine.preemption import Request, Requests, Stopped
from common.engine.setup import start_accelerator
from common.engine.trainer import Data, Trainer
from common.errors import ConfigError, RunError, UserError

SAMPLES, CLASSES = 64, 4
IMAGES = torch.randn(SAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(SAMPLES) % CLASSES


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    torch.use_deterministic_algorithms(False)
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def net(norm):
    torch.manual_seed(0)
    norm_layer = nn.BatchNorm2d(8) if norm else nn.Identity()
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm_layer, nn.ReLU(), nn.Flatten(), nn.Linear(288, CLASSES))


@dataclass
class Settings:
    folder: str
    train: dict = field(default_factory=dict)
    optim: dict = field(default_factory=dict)
    on_val: object = lambda batch: None
    unreadable: tuple = ()
    norm: bool = True
    checkpoint: dict = field(default_factory=dict)

    def trainer(self):
        train = {"epochs": 2, "batch_size": 8, "eval_batch_size": 16} | self.train
        config = EngineConfig(
            out=str(self.folder),
            train=TrainConfig(**train),
            optim=OptimConfig(lr=0.05, **self.optim),
            log=LogConfig(every=4, tensorboard=False),
            checkpoint=CheckpointConfig(every_minutes=0, **self.checkpoint),
        )
        micro = config.train.batch_size // config.train.accumulation

        def training(step):
            for start in range(step * config.train.batch_size, 10**6, micro):
                rows = torch.arange(start, start + micro) % SAMPLES
                yield Batch(IMAGES[rows], TARGETS[rows], list(self.unreadable))

        def validation():
            for number, start in enumerate(range(0, SAMPLES, 16)):
                self.on_val(number)
                yield Batch(IMAGES[start : start + 16], TARGETS[start : start + 16])

        data = Data(SAMPLES, tuple("abcd"), training, validation, "made up", max_unreadable=0.05)
        return Trainer(config, start_accelerator(config), net(self.norm), data)


class CountSyncs(TorchFunctionMode):
    """Counts the calls that would make the host wait for a GPU."""

    names = (
        "item",
        "tolist",
        "numpy",
        "cpu",
        "nonzero",
        "equal",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
    )

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.names:
            self.counts[name] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "train, optim",
    [
        ({}, {}),
        ({"accumulation": 2, "ema": 0.9, "precision": "bf16"}, {"clip_norm": 1.0, "clip_value": 0.1}),
        ({"channels_last": True, "deterministic": True}, {"name": "nag"}),
        # AdamW reads its own step counters, which live on the CPU: on a GPU no sync, as the gpu test shows.
    ],
)
def test_no_host_sync_between_log_steps(tmp_path, train, optim):
    trainer = Settings(tmp_path / "run", train, optim).trainer()
    counter = CountSyncs()
    per_update = []
    update = trainer.update

    def counted(batches):
        with counter:
            update(batches)
        per_update.append(sum(counter.counts.values()))

    trainer.update = counted
    trainer.fit()
    assert per_update == [0] * trainer.steps, counter.counts
    with counter:
        trainer.meter.compute()
    assert counter.counts, "the counter does see what a log step reads"


def test_accumulation_gives_the_same_gradients(tmp_path):
    """On a net without batch norm, micro-batches only divide the sum."""
    weights = []
    for name, accumulation in (("whole", 1), ("parts", 4)):
        train = {"accumulation": accumulation, "epochs": 1}
        trainer = Settings(tmp_path / name, train, norm=False).trainer()
        trainer.fit()
        weights.append(trainer.plain_model[0].weight.detach().clone())
        AcceleratorState._shared_state.clear()
        GradientState._shared_state.clear()
    torch.testing.assert_close(*weights)


def test_a_stop_during_evaluation_is_heard_and_the_evaluation_made_up_for(tmp_path):
    def ask(batch):
        if batch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        Settings(folder, on_val=ask).trainer().fit()
    stopped = Settings(folder).trainer()
    result = stopped.fit()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the handlers are given back"
    undisturbed = Settings(tmp_path / "other").trainer().fit()
    assert result == undisturbed


def test_too_many_unreadable_samples_stop_the_run(tmp_path):
    bad = tuple(Unreadable(f"file {i}", "truncated", "cut") for i in range(4))  # limit: 0.05 · 64 = 3.2
    with pytest.raises(RunError, match=r"4 unreadable training samples.*file"):
        Settings(tmp_path / "bad", unreadable=bad).trainer().fit()
    assert len((tmp_path / "bad" / "quarantine.jsonl").read_text().splitlines()) == 4
    Settings(tmp_path / "fine", unreadable=bad[:3]).trainer().fit()


def test_a_failed_write_in_the_background_stops_the_run(tmp_path):
    trainer = Settings(
        tmp_path, {"epochs": 4, "eval_every": 4}, {}, checkpoint={"asynchronous": True, "every_steps": 2}
    ).trainer()
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(RunError, match="checkpoint of step 2 not written"):
        trainer.fit()
    assert 2 <= trainer.progress.step <= 4, "at the latest by the next save"


def test_minutes_pass_between_checkpoints_also_where_ranks_hear_of_a_request_a_step_later(
    tmp_path, monkeypatch
):
    class OfRanks(Requests):
        said = Request.NOTHING

        def poll(self):
            before, self.said = self.said, super().poll()
            return before

    saved = []
    trainer = Settings(tmp_path, {"epochs": 2, "eval_every": 2}).trainer()
    trainer.config.checkpoint.every_minutes = 5 / 60
    monkeypatch.setattr("common.engine.trainer.Requests", OfRanks)
    monkeypatch.setattr(
        "common.engine.trainer.time", SimpleNamespace(monotonic=lambda: trainer.progress.step)
    )

    def save():
        trainer.saved_at = trainer.progress.step
        saved.append(trainer.progress.step)

    monkeypatch.setattr(trainer, "save", save)
    trainer.fit()
    assert saved == [7, 14, 16]


def test_an_infinite_weight_is_never_saved(tmp_path):
    def spoil(batch):
        with torch.no_grad():
            trainer.plain_model[0].weight[0, 0, 0, 0] = float("inf")

    trainer = Settings(tmp_path / "run", on_val=spoil).trainer()
    with pytest.raises(RunError, match="a weight is not finite"):
        trainer.fit()
    assert not trainer.run.checkpoints.exists()


def test_two_processes_in_one_folder_are_refused(tmp_path):
    trainer = Settings(tmp_path / "run").trainer()
    trainer.run.lock()
    with pytest.raises(ValueError, match="another process is training in this folder"):
        Settings(tmp_path / "run").trainer().fit()


def test_a_run_that_another_process_has_carried_on_meanwhile_is_left_alone(tmp_path):
    late, early = (Settings(tmp_path / "run", {"epochs": 1}).trainer() for _ in range(2))
    early.fit()
    early.run._lock.close()
    written = {path: path.stat().st_mtime_ns for path in early.run.folder.rglob("*") if path.name != ".lock"}
    with pytest.raises(UserError, match="another process has trained there meanwhile"):
        late.fit()
    assert written == {path: path.stat().st_mtime_ns for path in written}


def test_a_stop_behind_a_damaged_checkpoint_keeps_what_was_computed(tmp_path):
    """Of 16 steps the last checkpoint is damaged: the run goes on from the one before it, and is stopped."""
    kept = {"every_steps": 4, "keep": 1}
    trainer = Settings(tmp_path, {"eval_every": 2}, checkpoint={"every_steps": 6, "keep": 2}).trainer()
    trainer.fit()
    trainer.run._lock.close()
    before, last = sorted(trainer.run.checkpoints.iterdir())
    (last / "state.json").unlink()
    trainer = Settings(tmp_path, {"eval_every": 2}, checkpoint=kept).trainer()
    update = trainer.update

    def stopped(batches):
        update(batches)
        os.kill(os.getpid(), signal.SIGTERM)

    trainer.update = stopped
    with pytest.raises(Stopped):
        trainer.fit()
    assert trainer.progress.step == checkpoint.step_of(before) + 1
    assert checkpoint.step_of(checkpoint.newest(trainer.run.checkpoints)) == trainer.progress.step


def test_nothing_is_begun_anew_where_all_checkpoints_are_damaged(tmp_path):
    trainer = Settings(tmp_path, {"epochs": 1}).trainer()
    trainer.fit()
    for path in trainer.run.checkpoints.iterdir():
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="every checkpoint is damaged"):
        Settings(tmp_path, {"epochs": 1}).trainer()
    trainer.run.checkpoints.rename(tmp_path / "elsewhere")
    trainer.run.checkpoints.write_text("")
    with pytest.raises(ConfigError, match="checkpoints: Not a directory; a run keeps its checkpoints there"):
        Settings(tmp_path, {"epochs": 1}).trainer()


@pytest.mark.parametrize("drop, extra", [("meter", {}), ("progress", {}), (None, {"stage": 2})])
def test_a_state_of_another_version_is_one_line(tmp_path, drop, extra):
    Settings(tmp_path, {"epochs": 1}).trainer().fit()
    path = checkpoint.newest(tmp_path / "checkpoints")
    state = checkpoint.load(path, "state.json")
    state["progress"] |= extra
    files = {name: checkpoint.load(path, name) for name in ("model.safetensors", "optimizer.pt")}
    checkpoint.save(path.parent, 8, files | {"state.json": {k: v for k, v in state.items() if k != drop}})
    with pytest.raises(RefusedError, match="state.json: written by another version of pairwise") as error:
        Settings(tmp_path, {"epochs": 1}).trainer().fit()
    assert error.value.exit_code == 2


def test_resume_never_refuses_a_folder_with_a_checkpoint(tmp_path):
    Settings(tmp_path / "run", {"epochs": 1}).trainer().fit()
    again = Settings(tmp_path / "run", {"epochs": 1}).trainer()
    again.config.resume = "never"
    with pytest.raises(ConfigError, match="resume = never"):
        again.fit()


def test_a_batch_larger_than_the_training_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="batch_size = 200"):
        Settings(tmp_path / "run", {"batch_size": 200}).trainer()


def test_gradient_checkpointing_of_a_model_without_it_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="does not offer it"):
        Settings(tmp_path / "run", {"grad_checkpointing": True}).trainer()


@pytest.mark.gpu
@pytest.mark.parametrize("optim", [{"clip_norm": 1.0}, {"name": "adamw"}])
def test_no_sync_on_a_gpu(tmp_path, optim):
    trainer = Settings(tmp_path / "run", optim=optim).trainer()
    update = trainer.update

    def strict(batches):
        torch.cuda.set_sync_debug_mode("error")
        try:
            update(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.update = strict
    trainer.fit()
