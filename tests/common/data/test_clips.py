"""List files, and the rows of a video data set."""

import random
import shutil

import numpy as np
import pytest
import torch

from common.data.loader import FILLER, UNREADABLE
from common.data.order import Draw
from common.data.source import DataError
from common.data.video.clips import ClipConfig, ClipSet, VideoDataConfig, open_videos
from common.data.video.digits import CLASSES, Scene, moving_frames, prepare_moving_digits
from common.data.video.lists import read_list, write_list
from common.data.video.views import ViewSet

CLIP = ClipConfig(num_segments=2, seq_length=4, sample_rate=3, size=24, short_side=32)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits"
    assert prepare_moving_digits(path, {"train": 1, "val": 1})
    return path


@pytest.fixture
def copy(digits, tmp_path):
    return shutil.copytree(digits, tmp_path / "copy")


def rows(path, training=True, clip=CLIP, seed=0):
    return ClipSet(open_videos(VideoDataConfig(path=str(path)), "train"), clip, seed, training)


def test_a_list_is_read_back(tmp_path):
    path = tmp_path / "train.txt"
    clips = [("a b/c d.mp4", 30, 1), ("x.mp4", 1, 0), ("/abs/ü.mkv", 300, 2), ("3 4", 5, 1)]
    write_list(path, clips)
    found = read_list(path, tmp_path, 3)
    assert [(found.name(i), int(found.frames[i]), int(found.labels[i])) for i in range(4)] == clips
    assert found.file(0) == tmp_path / "a b/c d.mp4"
    assert str(found.file(2)) == "/abs/ü.mkv"
    assert found.where(1) == f"{path}:2 x.mp4"


def test_a_path_that_a_list_cannot_hold(tmp_path):
    with pytest.raises(DataError, match="line break"):
        write_list(tmp_path / "list.txt", [("a\nb.mp4", 3, 0)])
    assert not (tmp_path / "list.txt").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ("only.mp4 30", "expected path, number of frames and label"),
        ("a.mp4 30 x", "label 'x': expected a whole number"),
        ("a.mp4 30 -1", "label '-1': expected a whole number"),
        ("a.mp4 30 3", "label 3: there are 3 classes, so at most 2"),
        ("a.mp4 0 1", "number of frames '0': expected a whole number, 1 or more"),
        ("a.mp4 3.5 1", "number of frames '3.5'"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "list.txt"
    path.write_text(f"good.mp4 10 0\n\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_list(path, tmp_path, 3)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_or_missing_list(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_list(tmp_path / "no.txt", tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no clips"):
        read_list(tmp_path / "empty.txt", tmp_path)


def test_a_row_is_a_function_of_the_draw(digits):
    first, again = rows(digits), rows(digits)
    row = first.row(Draw(1, 3))
    assert row.inputs.shape == (2, 3, 4, 24, 24)
    assert row.inputs.dtype == torch.uint8
    assert row.target == 3
    random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(row.inputs, again.row(Draw(1, 3)).inputs)
    assert not torch.equal(row.inputs, again.row(Draw(2, 3)).inputs)
    assert not torch.equal(row.inputs, rows(digits, seed=1).row(Draw(1, 3)).inputs)
    assert first.filler().target == FILLER
    assert first.filler().inputs.shape == row.inputs.shape


def test_drawing_leaves_the_generators_as_they_were(digits):
    random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), torch.get_rng_state()
    rows(digits).row(Draw(0, 0))
    assert before[0] == random.getstate()
    assert torch.equal(before[1], torch.get_rng_state())


def test_evaluation_takes_the_middle(digits):
    clip = ClipConfig(num_segments=1, seq_length=3, sample_rate=2, size=24, short_side=32)
    data = rows(digits, False, clip)
    videos, count = data.videos, int(data.videos.clips.frames[1])
    offset = int((count - 4) / 2)
    found = videos.decoder.frames(videos.clips.file(1), [offset, offset + 2, offset + 4], "")
    assert data.row(Draw(0, 1)).inputs.shape == (1, 3, 3, 24, 24)
    whole = ViewSet(videos, 1, clip).row(Draw(0, 1)).inputs
    top, left = ((side - 24) // 2 for side in whole.shape[-2:])
    assert torch.equal(data.row(Draw(0, 1)).inputs, whole[..., top : top + 24, left : left + 24])
    middle = found[offset].float().mean((1, 2))
    assert (whole[0, :, 0].float().mean((1, 2)) - middle).abs().max() < 3


def test_one_decode_serves_all_segments(digits, monkeypatch):
    data = rows(
        digits, False, ClipConfig(num_segments=10, seq_length=4, sample_rate=2, size=24, short_side=32)
    )
    asked = []
    read = data.videos.decoder.frames
    monkeypatch.setattr(data.videos.decoder, "frames", lambda *a: asked.append(a) or read(*a))
    assert data.row(Draw(0, 0)).inputs.shape == (10, 3, 4, 24, 24)
    assert len(asked) == 1


def test_an_unreadable_video_is_replaced_in_training_and_wrong_in_evaluation(copy):
    for name in ("moves_left", "moves_right"):
        (copy / "train" / name / "0000.mp4").write_bytes(b"no video")
    row = rows(copy).row(Draw(0, 0))
    assert row.target == 2
    assert [bad.reason for bad in row.unreadable] == ["corrupt", "corrupt"]
    assert row.unreadable[0].where == f"{copy}/train.txt:1 train/moves_left/0000.mp4"
    with_neighbour = rows(copy).row(Draw(0, 0)).inputs
    assert torch.equal(row.inputs, with_neighbour)
    row = rows(copy, training=False).row(Draw(0, 0))
    assert row.target == UNREADABLE
    assert len(row.unreadable) == 1
    row = ViewSet(open_videos(VideoDataConfig(path=str(copy)), "train"), 10, CLIP).row(Draw(0, 0))
    assert row.target == UNREADABLE
    assert len(row.unreadable) == 1


def test_a_video_shorter_than_its_list_says_is_named(copy):
    lines = (copy / "train.txt").read_text().splitlines()
    lines[4] = "train/turns_left/0000.mp4 90 4"
    (copy / "train.txt").write_text("\n".join(lines))
    clip = ClipConfig(num_segments=3, seq_length=4, sample_rate=3, size=24, short_side=32)
    row = rows(copy, False, clip).row(Draw(0, 4))
    assert row.target == UNREADABLE
    assert row.unreadable[0].reason == "truncated"
    assert "train.txt:5 " in row.unreadable[0].where


def test_a_data_folder_that_is_not_one(tmp_path, digits):
    with pytest.raises(DataError, match="not an existing folder"):
        open_videos(VideoDataConfig(path=str(tmp_path / "no")), "val")
    with pytest.raises(DataError, match=r"classes.txt is missing"):
        open_videos(VideoDataConfig(path=str(tmp_path)), "val")
    with pytest.raises(DataError, match=r"other.txt: No such file"):
        open_videos(VideoDataConfig(path=str(digits), val="other.txt"), "val")


def test_the_motions_come_in_pairs_that_only_time_tells_apart():
    digit = np.tri(32, dtype=np.uint8) * 200
    scene = Scene.draw(digit, np.random.default_rng(0))
    assert len(CLASSES) == 12
    for one, other in zip(CLASSES[::2], CLASSES[1::2]):
        first, second = (list(moving_frames(motion, scene)) for motion in (one, other))
        assert len(first) == scene.frames
        assert all(np.array_equal(a, b) for a, b in zip(first, reversed(second)))
        assert not np.array_equal(first[0], second[0])
