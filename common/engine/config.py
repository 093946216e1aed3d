"""What every task's training script can set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from common.data.mixup import MixupConfig
from common.engine.checkpoint import CheckpointConfig
from common.engine.log import LogConfig
from common.engine.loss import LossConfig
from common.engine.optim import OptimConfig
from common.engine.parallel import Parallel
from common.engine.schedule import ScheduleConfig


@dataclass
class TrainConfig:
    """The training itself."""

    epochs: float = 90
    """Passes over the data."""
    batch_size: int = 256
    """Samples per update, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches per update on each process."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass; weights stay float32. fp16 waits for the device at each step, to scale."""
    seed: int = 0
    """Seed of weights, order, augmentation and dropout."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then what is evaluated; 0 is off."""
    sync_bn: bool = False
    """Batch norm's statistics over all processes; else each process takes those of its own samples."""
    channels_last: bool = False
    """Channels-last memory format: faster convolutions on GPUs."""
    compile: bool = False
    """torch.compile the model."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass, for memory."""
    deterministic: bool = False
    """Bit-equal repetition also on GPUs, at some cost; on the CPU runs repeat anyway."""
    tf32: bool = True
    """TensorFloat-32 matrix products and convolutions on GPUs, where the precision is fp32."""
    timeout_minutes: float = 10
    """Longest that a process waits for the others; then the run ends instead of hanging."""
    eval_every: float = 1
    """Epochs between evaluations; the end of training is always evaluated."""
    eval_batch_size: int = 256
    """Samples per batch in evaluation, over all processes."""

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "batch_size",
            "accumulation",
            "timeout_minutes",
            "eval_every",
            "eval_batch_size",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: expected more than 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema = {self.ema}: expected a decay, 0 or more and below 1")


@dataclass
class EngineConfig:
    """Settings of the engine; a task's own configuration adds its model and data."""

    out: str = "runs/default"
    """Folder of this run: checkpoints, logs, pictures."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues this run from its newest checkpoint; never refuses a folder that holds one."""
    weights: str | None = None
    """Weights to start from: a published checkpoint, one of ours, a run's folder, or safetensors."""
    weights_strict: bool = True
    """Whether every key of `weights` must fit; else what fits is loaded and the rest listed."""
    profile: bool = False
    """Profile steps 6 to 10 of this start: a trace and the ten largest operators go to OUT/profile."""
    profile_memory: bool = False
    """Also a memory snapshot, with `profile`."""
    parallel: Parallel = "auto"
    """How several processes share the network: ddp gives each a copy, fsdp a part of every block (FSDP2); with
    DeepSpeed's zero1 the optimizer's state is in parts, with zero2 gradients too, with zero3 weights too. auto is what
    `accelerate launch` asks for, else ddp."""
    offload: bool = False
    """With zero1 to zero3: keep the optimizer's state in the CPU's memory, and update there."""
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    mixup: MixupConfig = field(default_factory=MixupConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
