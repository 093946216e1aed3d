"""How the processes of a run share the network: each a whole copy (DDP), or each a part (FSDP, ZeRO)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from common.engine.parts import Part, Stored
from common.errors import ConfigError

if TYPE_CHECKING:
    from common.engine.config import EngineConfig

Parallel = Literal["auto", "ddp", "fsdp", "zero1", "zero2", "zero3"]


def choose(config: EngineConfig, training: bool = True) -> None:
    """Make ``config.parallel`` what this start is: its own setting, or with auto what the launcher asks for.

    An evaluation has a whole copy of the network in each process, however it was trained.

    Raises:
        ConfigError: the setting and the launcher differ, there is one process only, or a setting does not go with it.
    """
    launched = _launched()
    if training:
        _check_launcher(config)
    if launched and config.parallel not in ("auto", launched):
        raise ConfigError(
            f"parallel = {config.parallel}: accelerate launch was told {launched}; give one of the two"
        )
    if config.parallel == "auto" or not training:
        config.parallel = cast(Parallel, launched or "ddp") if training else "ddp"
    if config.parallel == "ddp":
        if config.offload and training:
            raise ConfigError("offload = true: does not go with parallel = ddp; zero1 to zero3 have it")
        return
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise ConfigError(
            f"parallel = {config.parallel}: there is one process, and nothing to share; start several by "
            "torchrun --nproc_per_node N or accelerate launch --num_processes N, or leave it out"
        )
    zero = config.parallel.startswith("zero")
    for name, set_ in (
        ("train.precision = fp16; use bf16 or fp32", config.train.precision == "fp16"),
        ("train.ema", zero and config.train.ema),
        ("optim.clip_value; use optim.clip_norm", zero and config.optim.clip_value),
        ("offload, which zero1 to zero3 have", config.offload and not zero),
    ):
        if set_:
            raise ConfigError(f"parallel = {config.parallel}: does not go with {name}")


def _launched() -> str | None:
    """The mode that `accelerate launch` was told. It is taken from the environment: what follows is done here."""
    asked = {
        name: os.environ.pop(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("FSDP", "DEEPSPEED")
    }
    # accelerate takes these for a contradiction to the plugin that it is given.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    if asked["DEEPSPEED"]:
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return "fsdp" if asked["FSDP"] else None


def _check_launcher(config: EngineConfig) -> None:
    environment = os.environ
    # Only accelerate's launcher of one process sets the first; it sets the second when it was told of several.
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= environment.keys() and "WORLD_SIZE" not in environment:
        raise ConfigError(
            "accelerate launch was told of several processes and started one, as it does without GPUs (MASTER_ADDR is "
            "set, WORLD_SIZE is not); give it --config_file slurm/accelerate/cpu.yaml, or use torchrun"
        )
    told = environment.get("ACCELERATE_MIXED_PRECISION", "no").replace("no", "fp32")
    if told not in ("fp32", config.train.precision):
        raise ConfigError(
            f"train.precision = {config.train.precision}: accelerate launch was told {told}; give --train.precision "
            f"{told}, or the launcher --mixed_precision no"
        )
    if environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE") == "cpu":
        config.offload = True


def shard(model: nn.Module, config: EngineConfig) -> None:
    """Divide the parameters over the processes where the mode does, in place. All ranks call this.

    Parameters become DTensors: each rank holds 1/world of each and of its gradient and optimizer state. A block's are
    gathered when it runs and let go after. Buffers stay whole.
    """
    if config.parallel == "fsdp":
        for block in blocks(model):
            fully_shard(block)
        fully_shard(model)


def prepare(
    accelerator: Accelerator, config: EngineConfig, model: nn.Module, optimizer: Optimizer
) -> tuple[nn.Module, Any]:
    """The model and the optimizer as the loop uses them. All ranks call this.

    Raises:
        ConfigError: what came out is not what was asked for.
    """
    if config.parallel.startswith("zero") and config.train.precision == "bf16":
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        model.forward = convert_outputs_to_fp32(autocast(model.forward))
    if config.parallel == "fsdp":
        # Autocast without DDP; the reductions are in the blocks' own hooks.
        model = accelerator.prepare_model(model, evaluation_mode=True)
        prepared = accelerator.prepare_optimizer(optimizer)
    else:
        model, prepared = accelerator.prepare(model, optimizer)
    found = mode_of(accelerator, model)
    if found != config.parallel:
        raise ConfigError(f"parallel = {config.parallel}: became {found} with {accelerator.distributed_type}")
    return model, prepared


def mode_of(accelerator: Accelerator, model: nn.Module) -> str:
    """What a prepared model is, by what it is made of."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "fsdp"
    if accelerator.distributed_type == DistributedType.DEEPSPEED and dist.get_world_size() > 1:
        return f"zero{cast(Any, model).zero_optimization_stage()}"
    alone = accelerator.distributed_type == DistributedType.NO
    return "ddp" if alone or isinstance(model, nn.parallel.DistributedDataParallel) else "nothing"


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The network's blocks: what is made of modules and stands in a sequence, outermost first."""
    for child in model.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            for member in child:
                if isinstance(member, (nn.Sequential, nn.ModuleList)):
                    yield from blocks(nn.ModuleList([member]))
                elif any(True for _ in member.children()) and any(True for _ in member.parameters()):
                    yield member
        else:
            yield from blocks(child)


def own(tensor: Tensor) -> Tensor | Part:
    """The tensor itself, or of one that FSDP divides this rank's rows; both share its memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())
    first = min(rows * tensor.device_mesh.get_local_rank(), tensor.shape[0])
    return Part(tensor.to_local(), tuple(tensor.shape), first * math.prod(tensor.shape[1:]))


def own_state(module: nn.Module) -> dict[str, Tensor | Part]:
    """The module's state dict, of which each rank has :func:`own`; it shares the module's memory."""
    return {name: own(tensor) for name, tensor in module.state_dict().items()}


def load_own_state(module: nn.Module, stored: Stored) -> None:
    """Load a checkpoint's weights, of any mode."""
    for name, tensor in own_state(module).items():
        stored.fill(name, tensor)


def everywhere(flag: Tensor) -> bool:
    """Whether all ranks' ``flag`` is true. All ranks call this."""
    if dist.is_initialized():
        flag = flag.int()
        dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def share_buffers(model: nn.Module) -> None:
    """Give all ranks the main process's batch-norm statistics: those that are saved. All ranks call this."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
