"""The training loop of every task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn

from common.data.loader import Batch
from common.data.mixup import mix
from common.data.quarantine import Quarantine, describe
from common.engine import checkpoint, parallel, state
from common.engine.clock import Clock
from common.engine.config import EngineConfig, TrainConfig
from common.engine.evaluate import evaluate
from common.engine.log import Log
from common.engine.loss import loss_sum
from common.engine.metrics import TrainMeter
from common.engine.optim import build_optimizer, set_lr
from common.engine.preemption import Request, Requests, Stopped
from common.engine.profile import Profiler
from common.engine.ranks import all_ranks
from common.engine.run import Run, write_json
from common.engine.schedule import factor
from common.engine.setup import seed_step
from common.engine.sync_bn import synchronise
from common.engine.worst import Worst
from common.engine.writer import Writer
from common.errors import ConfigError, RunError, UserError
from common.weights import load_weights


@dataclass
class Data:
    """What the engine knows of a task's data; see :mod:`common.data.loader`."""

    samples: int
    """Training samples in an epoch."""
    classes: tuple[str, ...]
    train: Callable[[int], Iterator[Batch]]
    """This rank's micro-batches, from a step on."""
    val: Callable[[], Iterator[Batch]]
    """This rank's evaluation batches."""
    fingerprint: str
    """What the data is: a run resumes only on the same."""
    max_unreadable: float
    """Share of unreadable training samples above which the run stops."""


def total_steps(train: TrainConfig, samples: int) -> int:
    """Updates in the whole training.

    Raises:
        ConfigError: not even one batch comes together.
    """
    steps = int(train.epochs * samples) // train.batch_size
    if steps == 0:
        raise ConfigError(
            f"train.batch_size = {train.batch_size}: more than {train.epochs} epochs of {samples} samples hold"
        )
    return steps


class Trainer:
    """Trains a classifier in a run's folder.

    Args:
        config: a task's whole configuration; with model and data it is the run's identity.
        model: gives logits (n, classes) for a batch's inputs.
    """

    def __init__(self, config: EngineConfig, accelerator: Accelerator, model: nn.Module, data: Data) -> None:
        self.config, self.accelerator, self.data = config, accelerator, data
        self.steps = total_steps(config.train, data.samples)
        self.identity = state.identity(config, model, data.fingerprint)
        self.run = Run(config.out)
        self.ranks = all_ranks(config.train.timeout_minutes)
        self.writer = Writer(self.run.checkpoints, config.checkpoint, self.ranks, self.run.metrics)
        self.progress = state.Progress()
        self.evaluation: dict[str, float] | None = None
        self.meter = TrainMeter(accelerator.device)
        self.saved: tuple[int, int] | None = None
        self.saved_at = time.monotonic()
        self._prepare(model)

    def fit(self) -> dict[str, float]:
        """Train from wherever the run stands to its end. All ranks call this.

        Returns:
            The numbers of the last evaluation; see :meth:`common.engine.metrics.EvalMeter.compute`.

        Raises:
            Stopped: a signal asked the run to stop; its state is saved.
            UserError: the run cannot be continued, the loss is not finite, too many samples are unreadable, a
                checkpoint cannot be written, or another process has died or hangs.
        """
        self._resume()
        if self.progress.step < self.steps or self.evaluation_due:
            self.begin()
            try:
                self.train()
                if unreadable := describe(self.quarantine.path):
                    self.say(unreadable)
            except RuntimeError as error:
                raise self._lost_others(error) from error
            finally:
                self.writer.close()
                self.profiler.close()
                self.log.close()
                self.requests.close()
        else:
            self.say(f"{self.run.folder} has finished already and is left alone")
        assert self.evaluation is not None
        return self.evaluation

    def train(self) -> None:
        """The loop: an update or an evaluation, and then what is due."""
        batches = self.data.train(self.progress.step)
        self.model.train()
        while self.progress.step < self.steps or self.evaluation_due:
            if self.evaluation_due:
                self.evaluate()
            else:
                self.update(batches)
                self.profiler.step()
                if self.log_due:
                    self.report()
            self.save_or_stop_if_asked()
        self.writer.wait()

    def update(self, batches: Iterator[Batch]) -> None:
        """One step of the optimizer, over a global batch."""
        config = self.config
        set_lr(self.optimizer, self._lr_at(self.progress.step))
        for micro in range(config.train.accumulation):
            with self.clock.waiting():
                batch = next(batches)
            self.quarantine.add(batch.unreadable, training=True)
            seed_step(config.train.seed, self.progress.step, micro, self.accelerator.process_index)
            inputs, targets = batch.inputs, batch.targets
            if config.mixup.on:
                classes = len(self.data.classes)
                inputs, targets = mix(
                    config.mixup, inputs, targets, classes, config.train.seed, self.progress.step
                )
            with self.accelerator.accumulate(self.model):
                logits = self.model(inputs)
                loss = loss_sum(config.loss, logits, targets)
                self.accelerator.backward(loss * self.loss_scale)
                self._clip()
                self.prepared_optimizer.step()
                self.prepared_optimizer.zero_grad()
            self.meter.add(loss, logits, batch.targets)
        self.progress.step += 1
        self.clock.steps += 1
        if self.ema:
            self.ema.update(self.plain_model, step=self.progress.step)

    def report(self) -> None:
        """Write a log entry: the only place of the loop that waits for the device. All ranks call this."""
        values = self.meter.compute()
        if not math.isfinite(values["loss"]):
            raise self.divergence(f"the loss is {values['loss']}")
        values |= {"lr": self._lr_at(self.progress.step - 1)} | self.clock.rates()
        remaining = (self.steps - self.progress.step) * self.clock.seconds_per_step()
        self.log.train(self.progress.step, self.epoch, values, remaining)
        self.meter = TrainMeter(self.accelerator.device)
        self.clock.restart()

    def evaluate(self) -> None:
        """Evaluate, note the best, and save; comes to no result if a stop is asked for meanwhile."""
        model = self.ema.module if self.ema else self.plain_model
        worst = Worst()
        parallel.share_buffers(model)
        result = evaluate(
            model,
            self.data.val(),
            len(self.data.classes),
            self.accelerator.device,
            autocast=self.accelerator.autocast,
            interrupted=lambda: self._poll() is Request.STOP,
            on_unreadable=lambda samples: self.quarantine.add(samples, training=False),
            worst=worst,
        )
        if result is None:
            return
        self.evaluation = {key: value for key, value in result.items() if isinstance(value, (int, float))}
        more = {"classes": self.data.classes, "worst": worst.compute()}
        if self.accelerator.is_main_process:
            write_json(self.run.folder / "evaluation.json", result | more)
        self.progress.evaluated_step = self.progress.step
        if result["top1"] > self.progress.best:
            self.progress.best, self.progress.best_step = result["top1"], self.progress.step
        self.log.evaluation(self.progress.step, self.epoch, result)
        self.save()
        self.clock.restart()

    def save_or_stop_if_asked(self) -> None:
        """Save when it is time to; on a stop that the ranks agreed on, save and leave. All ranks call this."""
        if self.writer.failed:
            self.requests.ask(Request.FAIL)
        every, minutes = self.config.checkpoint.every_steps, self.config.checkpoint.every_minutes
        if self.accelerator.is_main_process and minutes and time.monotonic() > self.saved_at + 60 * minutes:
            self.requests.ask(Request.SAVE)  # clocks differ between ranks: the main process's counts
            self.saved_at = time.monotonic()  # asked once, although several ranks hear of it a step later
        asked = self._poll()
        if asked is Request.FAIL:
            self.writer.wait()
        if asked or (every and self.progress.step % every == 0):
            self.save()
        if asked is Request.STOP:
            self.writer.wait()
            self.accelerator.wait_for_everyone()  # a launcher may end the others as soon as one process has left
            self.say(f"stopped at step {self.progress.step} of {self.steps}; the same command continues it")
            raise Stopped
        self.asked = Request.NOTHING

    def save(self) -> None:
        """Write a checkpoint of this moment, unless it is written already. All ranks call this."""
        moment = (self.progress.step, self.progress.evaluated_step)
        if moment == self.saved:
            return
        self.saved, self.saved_at = moment, time.monotonic()
        self.writer.save(self.progress.step, state.capture(self), self.progress.best_step)

    @property
    def epoch(self) -> float:
        """Progress in epochs."""
        return self._epoch_at(self.progress.step)

    @property
    def log_due(self) -> bool:
        """Whether the last update ends a log interval, or the training."""
        return self.progress.step % self.config.log.every == 0 or self.progress.step == self.steps

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation's turn has come since the last one."""
        step, last, every = self.progress.step, self.progress.evaluated_step, self.config.train.eval_every
        return step > last and (
            step == self.steps or self._epoch_at(step) // every > self._epoch_at(last) // every
        )

    def say(self, line: str) -> None:
        """Print a line on the main process."""
        if self.accelerator.is_main_process:
            print(line, flush=True)

    def divergence(self, what: str) -> RunError:
        """The error of a training that has come to numbers that are not finite."""
        self.writer.close()
        last = checkpoint.newest(self.run.checkpoints) if self.accelerator.is_main_process else None
        lr = self._lr_at(self.progress.step - 1)
        return RunError(
            f"{what} at step {self.progress.step} (learning rate {lr:.4g}); last good checkpoint: {last or 'none'}; "
            "try a lower optim.lr, a longer schedule.warmup_epochs, or optim.clip_norm"
        )

    def _prepare(self, model: nn.Module) -> None:
        train, accelerator = self.config.train, self.accelerator
        self.checkpoint = checkpoint.to_continue(self.run.checkpoints, self.ranks)
        if self.config.weights and not self.checkpoint:
            self.say(load_weights(model, self.config.weights, self.config.weights_strict))
        if train.channels_last:
            model = model.to(memory_format=_channels_last(model))
        if train.grad_checkpointing:
            _checkpoint_gradients(model)
        model.to(accelerator.device)
        if train.sync_bn:
            model = synchronise(model, accelerator.device, train.compile)
        self.plain_model = model
        each = (
            self.config.parallel == "fsdp"
        )  # parameters in parts do not go with whole buffers in one operation
        self.ema = ModelEmaV3(model, decay=train.ema, foreach=not each) if train.ema else None
        if train.compile:
            model.compile()
        for network in [model, *([self.ema.module] if self.ema else [])]:
            parallel.shard(network, self.config)
        self.optimizer = build_optimizer(model, self.config.optim)
        self.model, self.prepared_optimizer = parallel.prepare(
            accelerator, self.config, model, self.optimizer
        )
        # accelerate divides by the micro-batches and DDP by the ranks: this makes a mean over the global batch.
        self.loss_scale = train.accumulation * accelerator.num_processes / train.batch_size

    def _resume(self) -> None:
        if self.checkpoint is None:
            return
        if self.config.resume == "never":
            raise ConfigError(
                f"resume = never: {self.checkpoint} exists; choose another --out, or --resume auto"
            )
        state.restore(self, self.checkpoint)
        self.say(f"continuing {self.checkpoint} at step {self.progress.step} of {self.steps}")

    def begin(self) -> None:
        """Open the run's folder and start its clock, log and signal handlers. All ranks call this."""
        main, accelerator = self.accelerator.is_main_process, self.accelerator
        if main:
            self.run.lock()
            if not checkpoint.is_newest(self.run.checkpoints, self.checkpoint):
                raise UserError(
                    f"out = {str(self.run.folder)!r}: another process has trained there meanwhile; the same "
                    "command continues from its checkpoint"
                )
            self.run.record(self.identity["config"], accelerator.num_processes, str(accelerator.device))
            if self.checkpoint:
                keep, best = self.config.checkpoint.keep, self.progress.best_step
                checkpoint.prune(self.run.checkpoints, self.checkpoint, keep, best)
            self.run.rewind(self.progress.step, self.progress.evaluated_step)
        accelerator.wait_for_everyone()
        limit = self.data.max_unreadable * self.data.samples
        self.quarantine = Quarantine(self.run.folder / "quarantine.jsonl", limit)
        self.log = Log(self.run, self.config.log, self.steps, self.progress.step, main)
        self.requests, self.asked = Requests(self.config.train.timeout_minutes), Request.NOTHING
        self.clock = Clock(accelerator.device, self.config.train.batch_size)
        profiled = main and self.config.profile
        self.profiler = Profiler(self.run.folder, accelerator.device, profiled, self.config.profile_memory)
        self.saved, self.saved_at = (self.progress.step, self.progress.evaluated_step), time.monotonic()

    def _lost_others(self, error: RuntimeError) -> Exception:
        """The error itself, or where it is a collective call's, what it means."""
        signs = ("Timed out", "timed out", "Timeout", "Connection closed", "Connection reset")
        if not dist.is_initialized() or not any(sign in str(error) for sign in signs):
            return error
        self.writer.close()
        return RunError(
            f"at step {self.progress.step} another process has died or hangs (train.timeout_minutes = "
            f"{self.config.train.timeout_minutes:g}): {str(error).splitlines()[0][:200]}; last checkpoint: "
            f"{checkpoint.newest(self.run.checkpoints) or 'none'}"
        )

    def _clip(self) -> None:
        optim, parameters = self.config.optim, self.model.parameters()
        if not self.accelerator.sync_gradients:
            return
        if optim.clip_value:
            self.accelerator.clip_grad_value_(parameters, optim.clip_value)
        if optim.clip_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), optim.clip_norm)

    def _poll(self) -> Request:
        self.asked = max(self.asked, self.requests.poll())
        return self.asked

    def _lr_at(self, step: int) -> float:
        """The learning rate of the update after ``step`` others, before the groups' own factors."""
        progress = factor(self.config.schedule, self._epoch_at(step), self.config.train.epochs)
        return self.config.optim.lr * progress

    def _epoch_at(self, step: int) -> float:
        return step * self.config.train.batch_size / self.data.samples


def _channels_last(model: nn.Module) -> torch.memory_format:
    video = any(isinstance(module, nn.Conv3d) for module in model.modules())
    return torch.channels_last_3d if video else torch.channels_last


def _checkpoint_gradients(model: nn.Module) -> None:
    try:
        cast(Any, model).set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError):
        name = type(model).__name__
        raise ConfigError(f"train.grad_checkpointing = true: {name} does not offer it") from None
