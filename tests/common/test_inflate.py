"""2-D weights in 3-D networks."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from common.attention.bat import BATBlock
from common.attention.bat_video import BATBlock3d
from common.attention.non_local import NonLocal, NonLocal3d
from common.frames import FrameConv3d
from common.inflate import inflate, load_inflated
from common.weights import WeightsError


class Clips(nn.Module):
    """A video network, or with ``flat`` the image network that it comes from."""

    def __init__(self, flat: bool, time: int = 3, classes: int = 4, block: nn.Module | None = None) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if flat else nn.BatchNorm3d
        self.conv1 = (
            nn.Conv2d(3, 8, 3) if flat else FrameConv3d(3, 8, (time, 3, 3), padding=(time // 2, 0, 0))
        )
        self.bn1 = norm(8)
        self.layer2 = nn.Sequential()
        if block is not None:
            self.layer2.add_module("nl1", block)
        self.fc = nn.Linear(8, classes) if flat else FrameConv3d(8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.bn1(self.conv1(x)).relu())
        if x.ndim == 4:
            return self.fc(x.mean((2, 3)))
        return self.fc(x[:, :, 1:-1].mean((2, 3, 4), keepdim=True)).flatten(1)


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
    return model.eval()


def test_still_clips_give_the_images_logits() -> None:
    image, clip = randomised(Clips(flat=True)), Clips(flat=False).eval()
    report = load_inflated(clip, image.state_dict())
    assert not report
    assert report.inflated == ["conv1.weight", "fc.weight"]
    assert report.matched[:2] == ["conv1.bias", "bn1.weight"]
    x = torch.randn(2, 3, 6, 6)
    still = x.unsqueeze(2).expand(-1, -1, 5, -1, -1)
    torch.testing.assert_close(clip(still), image(x))
    torch.testing.assert_close(clip.conv1.weight[:, :, 1] * 3, image.conv1.weight)


def test_weights_of_clips_are_taken_as_they_are() -> None:
    one, other = randomised(Clips(flat=False)), Clips(flat=False)
    report = load_inflated(other, {"state_dict": {f"module.{k}": v for k, v in one.state_dict().items()}})
    assert not report.inflated
    assert len(report.matched) == len(one.state_dict())
    assert torch.equal(one.conv1.weight, other.conv1.weight)


@pytest.mark.parametrize(
    "image_block, video_block",
    [
        (BATBlock(8, size=2, groups=2), BATBlock3d(8, size=2, groups=2)),
        (NonLocal(8), NonLocal3d(8)),
        (NonLocal(8), NonLocal3d(8, sub_sample=False)),
    ],
)
def test_blocks_match_by_name(image_block: nn.Module, video_block: nn.Module) -> None:
    image = randomised(Clips(flat=True, block=image_block))
    clip = Clips(flat=False, block=video_block)
    assert not load_inflated(clip, image.state_dict())
    given = sorted(v.sum().item() for v in image.state_dict().values())
    kept = sorted(v.sum().item() for v in clip.state_dict().values())
    assert kept == pytest.approx(given)


def test_unsampled_non_local_block_computes_the_same() -> None:
    image, clip = (
        Clips(flat=True, block=NonLocal(8)),
        Clips(flat=False, block=NonLocal3d(8, sub_sample=False)),
    )
    load_inflated(clip.eval(), randomised(image).state_dict())
    x = torch.randn(1, 3, 6, 6)
    features = image.bn1(image.conv1(x)).relu()
    torch.testing.assert_close(clip.layer2(features.unsqueeze(2)).squeeze(2), image.layer2(features))


def test_differences_are_named() -> None:
    state = dict(randomised(Clips(flat=True)).state_dict())
    state["extra.weight"] = state.pop("bn1.bias")
    state["conv1.weight"] = torch.randn(8, 3, 5, 5)
    model = Clips(flat=False)
    with pytest.raises(WeightsError) as error:
        load_inflated(model, state)
    for part in (
        "1 missing: bn1.bias",
        "1 unexpected: extra.weight",
        "1 misshapen: conv1.weight (8, 3, 5, 5) for (8, 3, 3, 3, 3)",
    ):
        assert part in str(error.value)
    before = model.conv1.weight.clone()
    report = load_inflated(model, state, strict=False)
    assert report.missing == ["bn1.bias"]
    assert report.inflated == ["fc.weight"]
    assert torch.equal(model.conv1.weight, before)
    assert torch.equal(model.bn1.weight, state["bn1.weight"])


def test_classifier_of_other_classes_is_left_and_named() -> None:
    model = Clips(flat=False, classes=7)
    before = model.fc.weight.clone()
    report = load_inflated(model, randomised(Clips(flat=True)).state_dict())
    assert not report
    assert report.classifier == ["fc.weight", "fc.bias"]
    assert "left, of other classes: fc.weight, fc.bias" in str(report)
    assert torch.equal(model.fc.weight, before)


def test_counters_may_be_absent_and_nothing_fitting_is_an_error(tmp_path: Path) -> None:
    state = randomised(Clips(flat=True)).state_dict()
    del state["bn1.num_batches_tracked"]
    torch.save({"state_dict": state}, tmp_path / "image.pth")
    assert not load_inflated(Clips(flat=False), tmp_path / "image.pth")
    with pytest.raises(WeightsError, match="does not fit Clips"):
        load_inflated(Clips(flat=False), {"a": torch.zeros(1)}, strict=False)
    with pytest.raises(WeightsError, match="does not exist"):
        load_inflated(Clips(flat=False), tmp_path / "none.pth")


def test_an_image_resnet_fills_c2d_and_i3d() -> None:
    """By timm's own names; only tests may know both tasks' models."""
    import video.models  # noqa: F401

    source = timm.create_model("resnet50", num_classes=5)
    for name, kernel in (("c2d_resnet50", 1), ("i3d_resnet50", 3)):
        model = timm.create_model(name)
        state, report = inflate(source.state_dict(), model)
        assert not report
        assert report.classifier == ["fc.weight", "fc.bias"]
        weight = state["layer1.0.conv1.weight"]
        assert weight.shape == (64, 64, kernel, 1, 1)
        torch.testing.assert_close(weight.sum(2), source.layer1[0].conv1.weight)
