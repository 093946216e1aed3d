"""DeepSpeed's ZeRO: optimizer state (1), gradients (2) and weights (3) in parts, to and from whole tensors by name.

Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter models", SC 2020.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DeepSpeedPlugin
from torch import Tensor, nn

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


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict, whole, on the CPU. All ranks call this."""
    from deepspeed.utils import safe_get_full_fp32_param

    state = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state[name] = safe_get_full_fp32_param(parameter).detach().cpu()
    return state


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a whole state dict: into the weights, and into the optimizer's own copy of them. All ranks call this."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    with GatheredParameters(list(model.parameters()), modifier_rank=0), torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(state[name])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            safe_set_full_fp32_param(parameter, state[name].to(parameter.device))


def named_state(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Any]]:
    """The optimizer's state by parameter name, whole, as :func:`common.engine.optim.named_state`. All ranks call this.

    Args:
        optimizer: DeepSpeed's.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    _link(optimizer)
    found: dict[str, Any] = next(iter(optimizer.optimizer.state.values()), {})
    state: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and found:
            state[name] = {
                key: safe_get_full_optimizer_state(parameter, key).cpu() if _divided(value) else value
                for key, value in found.items()
            }
    return state


def load_named_state(model: nn.Module, optimizer: Any, state: dict[str, dict[str, Any]]) -> None:
    """Load what :func:`named_state` gave, in any mode. All ranks call this."""
    from deepspeed.utils import safe_set_full_optimizer_state

    example = next(iter(state.values()), None)
    if example is None:
        return
    # DeepSpeed makes the state at the first step; here it is there before.
    for flat in _flat_parts(optimizer):
        optimizer.optimizer.state[flat] = {
            key: torch.zeros_like(flat) if _divided(value) else _copy(value) for key, value in example.items()
        }
    _link(optimizer)
    for name, parameter in model.named_parameters():
        for key, value in state.get(name, {}).items():
            if _divided(value):
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def _flat_parts(optimizer: Any) -> list[Tensor]:
    """This rank's part of all weights, a tensor a group of parameters."""
    parts = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # stage 3
    return list(optimizer.single_partition_of_fp32_groups if parts is None else parts)


def _link(optimizer: Any) -> None:
    """Let parameters find their part of the state: DeepSpeed 0.19 does so after its first group's first step only."""
    if hasattr(optimizer, "_hp_optimizer_states_linked") and optimizer.optimizer.state:  # stages 1 and 2
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _divided(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
