"""3-D layers computed on frames against torch's own."""

import pytest
import torch
from torch import nn

from common.frames import FrameConv3d, FrameMaxPool, FrameNorm, TimeMaxPool, clips, frames

FORMATS = [torch.contiguous_format, torch.channels_last_3d]


def random_clips(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """Equal outputs and gradients."""
    results = []
    for module in (ours.double(), theirs.double()):
        y = module(x)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        results.append((y, torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10, check_stride=False)


def test_frames_and_clips_are_views_in_the_channels_last_format() -> None:
    x = torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    folded = frames(x)
    assert folded.data_ptr() == x.data_ptr()
    assert folded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(folded[4 * 1 + 2], x[1, :, 2])
    back = clips(folded, 4)
    assert torch.equal(back, x)
    assert back.stride() == x.stride()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "kernel, stride, padding",
    [
        ((1, 1, 1), (1, 1, 1), (0, 0, 0)),
        ((1, 1, 1), (1, 2, 2), (0, 0, 0)),
        ((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        ((1, 7, 1), (1, 1, 1), (0, 0, 0)),
        ((3, 1, 1), (1, 1, 1), (1, 0, 0)),
        ((4, 1, 1), (1, 1, 1), (0, 0, 0)),
        ((3, 1, 1), (2, 1, 1), (1, 0, 0)),
        ((1, 3, 3), (1, 1, 1), (1, 1, 1)),
        ((5, 7, 7), (1, 2, 2), (2, 3, 3)),
        ((3, 3, 3), (1, 1, 1), "same"),
    ],
)
def test_convolution_is_torchs(kernel, stride, padding, memory_format) -> None:
    x = random_clips(2, 3, 4, 8, 9).contiguous(memory_format=memory_format).detach().requires_grad_()
    ours, theirs = (cls(3, 5, kernel, stride, padding) for cls in (FrameConv3d, nn.Conv3d))
    theirs.load_state_dict(ours.state_dict())
    assert_same(ours, theirs, x)


def test_convolution_keeps_dilation_and_groups() -> None:
    x = random_clips(1, 4, 3, 6, 6)
    for options in ({"dilation": (1, 2, 2)}, {"groups": 2}):
        ours, theirs = (cls(4, 4, (1, 3, 3), **options) for cls in (FrameConv3d, nn.Conv3d))
        theirs.load_state_dict(ours.state_dict())
        assert_same(ours, theirs, x)


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 1, 1)])
def test_these_kernels_run_in_2d_without_a_copy_of_the_clips(kernel, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("3-D convolution")

    monkeypatch.setattr(torch.nn.functional, "conv3d", refuse)
    inputs = []
    run = torch.nn.functional.conv2d

    def watched(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        inputs.append(x)
        return run(x, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    x = torch.randn(2, 4, 4, 6, 6).contiguous(memory_format=torch.channels_last_3d)
    FrameConv3d(4, 8, kernel)(x)
    assert inputs[0].data_ptr() == x.data_ptr()
    assert inputs[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
def test_norm_is_torchs(training: bool) -> None:
    x = random_clips(2, 3, 4, 5, 6)
    ours, theirs = FrameNorm(3), nn.BatchNorm3d(3)
    theirs.load_state_dict(ours.state_dict())
    assert_same(ours.train(training), theirs.train(training), x)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name])


@pytest.mark.parametrize("kernel, stride", [(3, 2), (2, 2)])
@pytest.mark.parametrize("size", [(8, 9), (2, 3), (1, 1)])
def test_pooling_of_frames(kernel: int, stride: int, size: tuple[int, int]) -> None:
    x = random_clips(2, 3, 4, *size)
    clipped = tuple(min(kernel, side) for side in size)
    assert_same(FrameMaxPool(kernel, stride), nn.MaxPool3d((1, *clipped), (1, stride, stride)), x)


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_pooling_of_time(length: int) -> None:
    assert_same(TimeMaxPool(), nn.MaxPool3d((2, 1, 1), (2, 1, 1)), random_clips(2, 3, length, 2, 2))


def test_a_single_frame_is_kept() -> None:
    x = torch.randn(2, 3, 1, 4, 4)
    assert TimeMaxPool()(x) is x
