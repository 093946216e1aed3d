"""Batch norms: as a scale and a shift, and with ReLU and pooling in one pass where :mod:`kernels.norm` has a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernels import norm as kernel


def normed(x: Tensor, norm: Any, act: Any, pool: Any = None) -> Tensor:
    """``pool(act(norm(x)))``, by one operator for batch norm, ReLU and plain max pooling of channels-last maps.

    Args:
        x: (N, C, H, W).
        norm, act, pool: modules; no pool for none.
    """
    if _plain(norm, act, pool) and _takes(x):
        return _by_kernel(x, norm, 1 if pool is None else pool.kernel_size)
    x = act(norm(x))
    return x if pool is None else pool(x)


def _plain(norm: Any, act: Any, pool: Any) -> bool:
    if type(norm) is not nn.BatchNorm2d or not norm.affine or type(act) is not nn.ReLU:
        return False
    if pool is None:
        return True
    others = ("stride", "padding", "dilation", "ceil_mode", "return_indices")
    found = [getattr(pool, name, None) for name in others]
    side = getattr(pool, "kernel_size", None)
    return type(pool) is nn.MaxPool2d and isinstance(side, int) and found == [side, 0, 1, False, False]


def _takes(x: Tensor) -> bool:
    enough = x.dim() == 4 and x[:, 0].numel() > 1  # else torch says what is wrong
    return enough and x.is_contiguous(memory_format=torch.channels_last) and kernel.runs(x.device, x.dtype)


def _by_kernel(x: Tensor, norm: Any, window: int) -> Tensor:
    known = (None, None) if uses_batch(norm) else (norm.running_mean, norm.running_var)
    exact = torch.promote_types(x.dtype, torch.float32)
    y, mean, variance = kernel.norm_relu(
        x, norm.weight.to(exact), norm.bias.to(exact), *known, norm.eps, window
    )
    update_running(norm, mean, variance, x[:, 0].numel())
    return y


def uses_batch(norm: nn.BatchNorm2d) -> bool:
    """Whether ``norm`` takes its statistics from the batch."""
    return norm.training or norm.running_mean is None


def folded(
    norm: Any, count: int, batch_moments: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """``norm`` as a scale and shift per channel, of its parameters' dtype or float32 if that is finer.

    In training from ``batch_moments()``, the mean and biased variance over ``count`` samples, which
    also go into the running statistics by torch's rules.
    """
    if uses_batch(norm):
        mean, variance = batch_moments()
        update_running(norm, mean, variance, count)
    else:
        mean, variance = norm.running_mean, norm.running_var
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return scale.to(dtype), (norm.bias - mean * scale).to(dtype)


def update_running(norm: Any, mean: Tensor, variance: Tensor, count: int) -> None:
    """A batch's mean and biased variance, over ``count`` samples, into the running statistics that ``norm`` keeps."""
    if not (norm.training and norm.track_running_stats):
        return
    norm.num_batches_tracked.add_(1)  # torch.compile returns it in place of the result when it is `+= 1`
    momentum = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    unbiased = variance * (count / (count - 1))
    for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.mul_(1 - momentum).add_((batch.detach() * momentum).to(running.dtype))
