"""Batch norm over the batches of all processes, as one process with the whole batch would have it."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import ConfigError
from common.frames import FrameNorm

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d, FrameNorm)


def synchronise(model: nn.Module, device: torch.device, compiled: bool = False) -> nn.Module:
    """``model`` with synchronised batch norms: the same parameters, buffers and names. All ranks call this.

    They are torch's own on GPUs, and :class:`SyncBatchNorm` on the CPU, which torch's do not know. A process alone
    needs none.

    Args:
        compiled: whether torch.compile will follow.

    Raises:
        ConfigError: there is no batch norm, or one of an unknown kind, or it would be compiled on the CPU.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise ConfigError("train.sync_bn = true: the network has no batch norm; leave it out")
    for norm in norms:
        if type(norm) not in _KINDS:
            raise ConfigError(
                f"train.sync_bn = true: cannot synchronise a {type(norm).__name__}; leave it out"
            )
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    if compiled and device.type == "cpu":
        raise ConfigError(
            "train.sync_bn = true: does not go with train.compile on the CPU; leave one of them out"
        )
    model = cast(nn.Module, convert_sync_batchnorm(model))
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm) and device.type == "cpu":
            cast(Any, module).__class__ = SyncBatchNorm
    return model


class SyncBatchNorm(_BatchNorm):
    """``nn.SyncBatchNorm`` on any device, with the dropout and activation that timm puts into batch norms.

    No subclass of torch's, which DDP refuses on the CPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, …) → (N, C, …). In training all ranks call this, and its backward pass."""
        y = self._over_all_ranks(input) if self.training else super().forward(input)
        for follows in ("drop", "act"):
            if hasattr(self, follows):
                y = getattr(self, follows)(y)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions, as in ``nn.SyncBatchNorm``."""

    def _over_all_ranks(self, x: Tensor) -> Tensor:
        dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        own = values.new_tensor([x.numel() // x.shape[1]])  # ranks may have unequal parts
        total, count = _sum_of_ranks(torch.cat([values.sum(dims), own])).split([x.shape[1], 1])
        count = count.detach()
        mean = (total / count).view(shape)
        centred = values - mean
        variance = (_sum_of_ranks(centred.square().sum(dims)) / count).view(shape)
        if self.track_running_stats:
            self._track(mean.detach().flatten(), variance.detach().flatten() * (count / (count - 1)))
        y = centred * (variance + self.eps).rsqrt()
        if self.affine:
            y = y * self.weight.view_as(mean) + self.bias.view_as(mean)
        return y.to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else torch.tensor(self.momentum)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share.to(self.running_mean))
        self.running_var.lerp_(variance.to(self.running_var.dtype), share.to(self.running_var))


class _Sum(torch.autograd.Function):
    """The sum over all ranks; each rank's loss depends on each rank's part of it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.forward(ctx, grad)


def _sum_of_ranks(part: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(part)
    return total
