"""3-D layers on clips, computed as 2-D layers on frames wherever that is the same.

Clips are (N, C, T, H, W). In the memory format ``torch.channels_last_3d`` a clip's frames, (N·T, C, H, W), are a
view in ``torch.channels_last``, so that folding time into the batch and back costs nothing. Parameters have the
shapes and names of torch's 3-D layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def frames(clips: Tensor) -> Tensor:
    """(N, C, T, H, W) → (N·T, C, H, W)."""
    return clips.transpose(1, 2).flatten(0, 1)


def clips(frames: Tensor, length: int) -> Tensor:
    """(N·T, C, H, W) → (N, C, T, H, W), with T = ``length``; a view."""
    return frames.unflatten(0, (-1, length)).transpose(1, 2)


class FrameConv3d(nn.Conv3d):
    """``nn.Conv3d`` as a 2-D convolution where its kernel allows that: kernels 1×h×w, on frames, and t×1×1, on
    (N, C, T, H·W), a view that is in ``torch.channels_last`` where the clips are in ``torch.channels_last_3d``.

    Other kernels are convolved in 3-D: the windows of a t×h×w kernel side by side as channels, which would make
    it 2-D too, are t times the memory, and no faster where that was tried (CPU, 3×3×3 and 5×7×7).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, C', T', H', W')."""
        (time, *space), stride, padding = self.kernel_size, self.stride, self.padding
        if self.groups != 1 or set(self.dilation) != {1} or isinstance(padding, str):
            return super().forward(x)
        if time == stride[0] == 1 and padding[0] == 0:
            y = F.conv2d(frames(x), self.weight.squeeze(2), self.bias, stride[1:], padding[1:])
            return clips(y, x.shape[2])
        if space == [1, 1] and stride == (1, 1, 1) and padding[1:] == (0, 0):
            y = F.conv2d(x.flatten(3), self.weight.squeeze(4), self.bias, padding=(padding[0], 0))
            return y.unflatten(3, x.shape[3:])
        if x.device.type == "cpu":
            # Not in bfloat16: oneDNN's weight gradient of 5×7×7 kernels then reads memory that nothing wrote
            # (torch 2.14.1; not finite in most of 150 runs over poisoned memory).
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.to(self.weight.dtype))
        return super().forward(x)


class FrameNorm(nn.BatchNorm2d):
    """``nn.BatchNorm3d``, whose statistics over clips are those of ``nn.BatchNorm2d`` over all their frames."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, C, T, H, W)."""
        return clips(super().forward(frames(x)), x.shape[2])


class FrameMaxPool(nn.Module):
    """Max pooling of every frame, without padding; a map smaller than the kernel is pooled whole.

    Args:
        kernel, stride: of both sides.
    """

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, C, T, (H − kernel) // stride + 1, likewise of W)."""
        kernel = [min(self.kernel, side) for side in x.shape[3:]]
        return clips(F.max_pool2d(frames(x), kernel, self.stride), x.shape[2])

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}"


class TimeMaxPool(nn.Module):
    """The maximum of every two successive frames. An odd last frame is dropped, a single one kept."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, C, max(1, T // 2), H, W)."""
        pairs = x.shape[2] // 2
        return x if pairs == 0 else x[:, :, : 2 * pairs : 2].maximum(x[:, :, 1::2])
