"""Which frames, which crops: the published rules, in numbers and in distribution."""

import random
from collections import Counter

import pytest
import torch
from torch import nn

from common.data.video.clips import ClipConfig, ClipNormalize
from common.data.video.crops import (
    Box,
    centre_box,
    cut,
    five_boxes,
    multi_scale_box,
    resize,
    resize_shorter,
    three_boxes,
)
from common.data.video.sampling import clip_frames, span, test_offsets, train_offsets
from common.data.video.views import VIEWS, ViewAverage
from video.segments import average_segments

test_offsets.__test__ = False


def test_a_clip_spans_its_frames_and_repeats_the_last():
    assert span(8, 8) == 57
    assert clip_frames(3, 100, 4, 8) == [3, 11, 19, 27]
    assert clip_frames(0, 20, 8, 8) == [0, 8, 16, 19, 19, 19, 19, 19]


@pytest.mark.parametrize("frames, segments", [(300, 1), (300, 3), (58, 1), (59, 3)])
def test_training_offsets_are_even_over_their_part(frames, segments):
    random.seed(0)
    places = frames - 57 + 1
    draws = [train_offsets(frames, segments, 8, 8) for _ in range(4000)]
    for segment in range(segments):
        seen = Counter(draw[segment] for draw in draws)
        average = places // segments
        low, high = (segment * average, (segment + 1) * average) if average else (0, places)
        assert min(seen) == low
        assert max(seen) == high - 1
        assert max(seen.values()) < 4000 / (high - low) * 2 + 20


def test_training_offsets_of_short_videos():
    random.seed(0)
    draws = [train_offsets(58, 4, 8, 8) for _ in range(200)]
    assert all(draw == sorted(draw) for draw in draws)
    assert {place for draw in draws for place in draw} == {0, 1}
    for frames in (57, 56, 1):
        assert train_offsets(frames, 4, 8, 8) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "frames, segments, expected",
    [
        (300, 1, [122]),  # tick 244
        (
            300,
            10,
            [12, 36, 61, 85, 109, 134, 158, 182, 207, 231],
        ),  # tick 24.4; 7.5 ticks are 182.99… in floats
        (250, 3, [32, 97, 161]),  # tick 64.67
        (66, 10, [0] * 10),  # 10 + 57 − 1 = 66 is not enough
        (67, 10, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]),  # tick 1.1
        (57, 1, [0]),
        (20, 1, [0]),
    ],
)
def test_test_offsets(frames, segments, expected):
    assert test_offsets(frames, segments, 8, 8) == expected


def test_multi_scale_crops_have_the_published_distribution():
    random.seed(0)
    scales, draws = (1, 0.875, 0.75, 0.66), 26000
    boxes = Counter(multi_scale_box(256, 340, scales) for _ in range(draws))
    sides = [256, 224, 192, 168]
    sizes = Counter()
    for box, count in boxes.items():
        sizes[box.height, box.width] += count
    pairs = {(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}
    assert set(sizes) == pairs
    assert len(pairs) == 10
    assert max(sizes.values()) < 1.15 * min(sizes.values())
    places = Counter()
    for box, count in boxes.items():
        if (box.height, box.width) == (224, 192):
            places[box.top // 8, box.left // 37] += count  # rooms of 32 and 148 in quarters
            assert (box.top % 8, box.left % 37) == (0, 0)
    corners_and_centre = {(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)}
    edges = {(0, 2), (2, 0), (4, 2), (2, 4)}
    quarters = {(1, 1), (1, 3), (3, 1), (3, 3)}
    assert set(places) == corners_and_centre | edges | quarters
    assert max(places.values()) < 1.5 * min(places.values())


def test_three_squares_along_the_longer_side():
    assert [box.left for box in three_boxes(256, 340)] == [0, 28, 57]  # 85/3, 170/3
    assert [box.top for box in three_boxes(340, 256)] == [0, 28, 57]
    assert [box.left for box in three_boxes(256, 340, "common")] == [0, 42, 84]
    assert {box[2:] for box in three_boxes(256, 340)} == {(256, 256)}
    assert three_boxes(256, 256) == [Box(0, 0, 256, 256)]


def test_five_squares():
    assert five_boxes(256, 340, 224) == [
        Box(0, 0, 224, 224),
        Box(0, 116, 224, 224),
        Box(32, 0, 224, 224),
        Box(32, 116, 224, 224),
        Box(16, 58, 224, 224),
    ]
    assert centre_box(256, 340, 224) == Box(16, 58, 224, 224)


def test_resizing_is_of_the_shorter_side_and_bilinear():
    frames = torch.randint(0, 256, (2, 3, 40, 60), dtype=torch.uint8)
    assert resize_shorter(frames, 20).shape == (2, 3, 20, 30)
    assert resize_shorter(frames.transpose(2, 3), 20).shape == (2, 3, 30, 20)
    assert resize(frames, 40, 60) is frames
    ramp = torch.arange(0, 240, 4, dtype=torch.uint8).expand(1, 3, 40, 60)
    enlarged = resize(ramp, 80, 120)[0, 0, 0].float()
    assert (enlarged[1:119] - (torch.arange(1, 119) + 0.5) * 2 + 2).abs().max() <= 1.0


@pytest.mark.parametrize(
    "colour, read_mode, expected",
    [
        ("rgb", "video", (100 - 123.68, 120 - 116.779, 140 - 103.939)),
        ("rgb", "img", (100 - 123.68, 120 - 116.779, 140 - 103.939)),
        ("published", "video", (100 - 103.939, 120 - 116.779, 140 - 123.68)),
        ("published", "img", (140 - 103.939, 120 - 116.779, 100 - 123.68)),
    ],
)
def test_colours_and_means(colour, read_mode, expected):
    clips = torch.tensor([100, 120, 140], dtype=torch.uint8).view(1, 1, 3, 1, 1, 1).expand(2, 2, 3, 4, 8, 8)
    out = ClipNormalize(colour, read_mode, torch.device("cpu"))(clips)
    assert out.dtype == torch.float32
    assert out.shape == clips.shape
    assert out[1, 1, :, 3, 7, 7].tolist() == pytest.approx(expected, abs=1e-4)


class MeanOfPixels(nn.Module):
    """Logits that tell which views came, and how many at a time."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x):
        self.batches.append(tuple(x.shape))
        position = torch.arange(x.shape[-1], dtype=x.dtype)
        return torch.stack([x.mean((1, 2, 3, 4)), (x * position).mean((1, 2, 3, 4))], 1)


@pytest.mark.parametrize("name, views", [("10x3", 30), ("25x10", 250), ("1x1", 1)])
def test_views_are_averaged_whatever_the_number_at_a_time(name, views):
    segments = VIEWS[name].segments
    clips = torch.randint(0, 256, (1, segments, 3, 2, 32, 44), dtype=torch.uint8)
    boxes = VIEWS[name].boxes(24)
    results = []
    for at_once in (1, 7, 1000):
        model = MeanOfPixels()
        results.append(ViewAverage(model, boxes, lambda x: x.double(), at_once)(clips))
        assert sum(batch[0] for batch in model.batches) == views
        assert max(batch[0] for batch in model.batches) == min(at_once, views)
    crops = [cut(clips[0], box).flip(-1) if mirror else cut(clips[0], box) for box, mirror in boxes(32, 44)]
    expected = MeanOfPixels()(torch.cat(crops).double()).mean(0)
    for result in results:
        torch.testing.assert_close(result[0].double(), expected, rtol=1e-5, atol=1e-3)


def test_mirrored_views_are_mirrored_and_a_square_has_one_crop():
    crops = VIEWS["25x10"].boxes(24)(32, 44)
    assert [mirror for _, mirror in crops] == [False] * 5 + [True] * 5
    assert len(VIEWS["10x3"].boxes(24)(32, 32)) == 1


def test_segments_are_averaged_without_changing_the_network():
    import timm

    import video.models  # noqa: F401

    args = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "num_classes": 5, "drop_rate": 0.0}
    torch.manual_seed(0)
    plain = timm.create_model("c2d_resnet50", **args).eval()
    both = timm.create_model("c2d_resnet50", **args).eval()
    both.load_state_dict(plain.state_dict())
    both = average_segments(both, 3)
    assert list(both.state_dict()) == list(plain.state_dict())
    assert both.pretrained_cfg["architecture"] == "c2d_resnet50"
    clips = torch.randn(2, 3, 3, 4, 32, 32)
    expected = torch.stack([plain(clips[:, segment]) for segment in range(3)]).mean(0)
    torch.testing.assert_close(both(clips), expected)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_segments": 0}, "num_segments = 0: expected at least 1"),
        ({"size": 224, "short_side": 200}, "short_side = 200: expected at least size = 224"),
        ({"scales": [1.2]}, "scales = [1.2]"),
        ({"hflip": 2}, "hflip = 2: expected a probability"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError) as caught:
        ClipConfig(**values)
    assert message in str(caught.value)
