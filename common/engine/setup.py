"""Setting a process up: device, precision, process group, determinism."""

from __future__ import annotations

import os
from datetime import timedelta

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from common.engine import parallel, zero
from common.engine.config import EngineConfig
from common.errors import ConfigError


def start_accelerator(engine: EngineConfig, training: bool = True) -> Accelerator:
    """Make the process ready to build a model and train it, or only evaluate it; seeds torch with ``train.seed``.

    Raises:
        ConfigError: the precision needs a GPU that is not there; see also :func:`common.engine.parallel.choose`.
    """
    config = engine.train
    parallel.choose(engine, training)
    gpu = torch.cuda.is_available()
    if config.precision == "fp16" and not gpu:
        raise ConfigError("train.precision = fp16: needs a GPU; on the CPU use fp32 or bf16")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    torch.manual_seed(config.seed)
    sharing = zero.plugin(engine) if training and engine.parallel.startswith("zero") else None
    precision = "no" if config.precision == "fp32" or sharing else config.precision
    group = InitProcessGroupKwargs(
        backend="nccl" if gpu else "gloo", timeout=timedelta(minutes=config.timeout_minutes)
    )
    return Accelerator(
        cpu=not gpu and sharing is None,
        deepspeed_plugin=sharing,
        mixed_precision=precision,
        gradient_accumulation_steps=config.accumulation,
        # accelerate takes a backend as a sign of a process group, which a process alone has not.
        kwargs_handlers=[group] if "LOCAL_RANK" in os.environ else [],
    )


def seed_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed dropout and the like as a function of where training stands, so that no generator needs saving."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, micro, rank]).generate_state(1, np.uint64)[0]))
