"""DeepSpeed's ZeRO: optimizer state (1), gradients (2) and weights (3) in parts, by name, to and from checkpoints.

Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter models", SC 2020.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from accelerate import DeepSpeedPlugin
from torch import Tensor, nn

from common.engine.optim import state_keys
from common.engine.parts import Part, Stored

if TYPE_CHECKING:
    from common.engine.config import EngineConfig


def plugin(config: EngineConfig) -> DeepSpeedPlugin:
    """What Accelerate needs to know. The precision is autocast's, not DeepSpeed's, so that batch norm stays float32."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed compiles an operator at its first use, with ninja, which lies beside this Python.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    parts: dict[str, Any] = {"stage": int(config.parallel[-1])}
    if config.offload:
        parts["offload_optimizer"] = {"device": "cpu"}
    world = int(os.environ["WORLD_SIZE"])
    micro = max(1, config.train.batch_size // world // config.train.accumulation)
    return DeepSpeedPlugin(
        hf_ds_config={
            "zero_optimization": parts,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": config.train.accumulation,
            "gradient_clipping": config.optim.clip_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    )


def weights(model: nn.Module) -> dict[str, Tensor | Part]:
    """The model's state dict: in stage 3 this rank's part of every weight, else whole."""
    state: dict[str, Tensor | Part] = dict(model.state_dict())
    return state | {
        name: _of_stage_3(parameter, cast(Any, parameter).ds_tensor)
        for name, parameter in model.named_parameters()
        if _in_stage_3(parameter)
    }


def load_weights(model: nn.Module, optimizer: Any, stored: Stored) -> None:
    """Load a checkpoint's weights: into the model, and into the optimizer's own copy of them. All ranks call this."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()  # small weights, of which stage 3 has a whole copy too, let go of it
    for name, own in weights(model).items():
        stored.fill(name, own)
    for parameter in model.parameters():
        if parameter.requires_grad and _in_stage_3(parameter):
            safe_set_local_fp32_param(parameter, cast(Any, parameter).ds_tensor)
        elif parameter.requires_grad:
            safe_set_full_fp32_param(parameter, parameter.detach())
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()


def named_state(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Tensor | Part]]:
    """This rank's parts of the optimizer's state by parameter name, as :func:`common.engine.optim.named_state`.

    Args:
        optimizer: DeepSpeed's.
    """
    _link(optimizer)
    found: dict[str, Any] = next(iter(optimizer.optimizer.state.values()), {})
    return {
        name: {key: _own(parameter, key, value) if value.dim() else value for key, value in found.items()}
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and found
    }


def load_named_state(model: nn.Module, optimizer: Any, stored: Stored) -> None:
    """Load the optimizer's state of a checkpoint, from any mode."""
    from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

    keys = state_keys(stored)
    if not keys:
        return
    # DeepSpeed makes the state at the first step; here it is there before.
    example = next(iter(keys))
    for flat in _flat_parts(optimizer):
        optimizer.optimizer.state[flat] = {
            key: torch.zeros_like(flat)
            if stored.shape(f"{example}.{key}")
            else stored.whole(f"{example}.{key}")
            for key in keys[example]
        }
    _link(optimizer)
    for name, parameter in model.named_parameters():
        for key in (key for key in keys.get(name, []) if stored.shape(f"{name}.{key}")):
            if _in_stage_3(parameter):
                local = safe_get_local_optimizer_state(parameter, key)
                stored.fill(f"{name}.{key}", _of_stage_3(parameter, local))
                safe_set_local_optimizer_state(parameter, local, key)
            else:
                stored.fill(f"{name}.{key}", _of_stages_1_and_2(parameter, key, parameter))


def _flat_parts(optimizer: Any) -> list[Tensor]:
    """This rank's part of all weights, a tensor a group of parameters."""
    parts = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # stage 3
    return list(optimizer.single_partition_of_fp32_groups if parts is None else parts)


def _link(optimizer: Any) -> None:
    """Let parameters find their part of the state: DeepSpeed 0.19 does so after its first group's first step only."""
    if hasattr(optimizer, "_hp_optimizer_states_linked") and optimizer.optimizer.state:  # stages 1 and 2
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _in_stage_3(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _own(parameter: Any, key: str, like: Tensor) -> Part:
    """This rank's part of a parameter's optimizer state, on the device of ``like``."""
    from deepspeed.utils import safe_get_local_optimizer_state

    if _in_stage_3(parameter):
        return _of_stage_3(parameter, safe_get_local_optimizer_state(parameter, key).to(like.device))
    return _of_stages_1_and_2(parameter, key, like)


def _of_stages_1_and_2(parameter: Any, key: str, like: Tensor) -> Part:
    fragment = parameter._hp_mapping  # None where this rank has nothing of the parameter
    if fragment is None:
        return Part(like.new_empty(0), tuple(parameter.shape), 0)
    return Part(fragment.get_hp_fragment(key), tuple(parameter.shape), fragment.lp_fragment_address.start)


def _of_stage_3(parameter: Any, local: Tensor) -> Part:
    """Here all ranks' parts are of one size; the last may have more than there is."""
    offset = min(dist.get_rank() * local.numel(), parameter.ds_numel)
    size = min(local.numel(), parameter.ds_numel - offset)
    return Part(local[:size], tuple(parameter.ds_shape), offset)
