"""torchcodec and DALI give the frames that PyAV gives, and name file, codec and decoder where they cannot."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch

from common.data.loader import evaluation_loader
from common.data.source import BadSample, DataError
from common.data.video.clips import ClipConfig, ClipSet, VideoDataConfig, open_videos
from common.data.video.decode import Decoder
from common.data.video.decoders import DaliDecoder, TorchcodecDecoder, make_decoder
from common.errors import ConfigError
from tests.processes import ROOT
from tests.video.films import film, lying, number_of
from tests.video.test_decode import KINDS, bad_file

UNSEEKABLE = ("ts-b-frames", "avi-b-frames")
VP9 = {
    "webm": {},
    "webm-variable": {"variable": True},
    "mkv-variable": {"variable": True, "g": "1000"},
    "mp4-hidden-frames": {"auto-alt-ref": "1", "lag-in-frames": "25", "b": "200k"},
}


def torchcodec_loads():
    try:
        make_decoder("torchcodec")
    except ConfigError:
        return False
    return True


needs_ffmpeg = pytest.mark.skipif(not torchcodec_loads(), reason="torchcodec finds no FFmpeg")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    paths = {kind: folder / f"{kind}.{kind.partition('-')[0]}" for kind in KINDS | VP9}
    return {
        kind: film(path, **{"codec": "libvpx-vp9"} | VP9[kind]) if kind in VP9 else film(path, **KINDS[kind])
        for kind, path in paths.items()
    }


def assert_same_frames(decoder, path):
    """Each frame alone, some and all, from a file and from its bytes: the numbers drawn in them, and PyAV's pixels."""
    rng, right = random.Random(0), Decoder().frames(path, range(60), "")
    for numbers in [
        [0],
        [59],
        range(60),
        [10, 23, 24, 25, 47],
        *(rng.sample(range(60), 8) for _ in range(4)),
    ]:
        for video in (path, path.read_bytes()):
            found = decoder.frames(video, numbers, "")
            assert {number: number_of(frame) for number, frame in found.items()} == {n: n for n in numbers}
            assert list(found) == sorted(numbers)
            for number, frame in found.items():
                assert frame.dtype == torch.uint8
                assert (frame.int() - right[number].int()).abs().max() <= 3


def test_torchcodec_with_the_ffmpeg_of_pyav(tmp_path):
    """Where the system has no FFmpeg, the tests below that need one run in a process that finds PyAV's."""
    if torchcodec_loads():
        return
    libraries = Path(av.__file__).parents[1] / "av.libs"
    for path in libraries.glob("lib*.so.*"):
        name = re.sub(r"-[0-9a-f]{8}\.so\.(\d+)\b.*", r".so.\1", path.name)
        (tmp_path / name).symlink_to(path)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    words = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        __file__,
        "-k",
        "on_torchcodec",
    ]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout
    assert re.search(r"\d\d passed", done.stdout)


@needs_ffmpeg
@pytest.mark.parametrize("kind", [kind for kind in KINDS | VP9 if kind not in UNSEEKABLE])
def test_on_torchcodec_the_frames_asked_for_arrive(films, kind):
    assert_same_frames(TorchcodecDecoder(), films[kind])


@needs_ffmpeg
@pytest.mark.parametrize("kind", UNSEEKABLE)
def test_on_torchcodec_what_it_cannot_decode_is_named(films, kind):
    form = {"ts": "mpegts", "avi": "avi"}[kind.partition("-")[0]]
    expected = f"list.txt:7 f: torchcodec cannot decode h264 in {form}; use --data.decoder pyav"
    with pytest.raises(DataError, match=expected):
        TorchcodecDecoder().frames(films[kind], range(60), "list.txt:7 f")


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["missing", "empty", "text", "cut mp4", "audio", "no frames", "pipe"])
def test_on_torchcodec_a_bad_file_is_the_same_typed_error(tmp_path, films, kind):
    path, reasons = bad_file(tmp_path, films, kind), []
    for decoder in (Decoder(), TorchcodecDecoder()):
        with pytest.raises(BadSample) as caught:
            decoder.frames(path, [0, 59], "list.txt:3 bad.mp4")
        reasons.append((caught.value.reason, caught.value.where))
    assert reasons[0] == reasons[1]


@needs_ffmpeg
def test_on_torchcodec_a_frame_beyond_the_last_and_the_time_limit(films):
    with pytest.raises(BadSample, match="truncated: frame 61 is wanted, there are 60"):
        TorchcodecDecoder().frames(films["mp4"], [3, 60], "film")
    with pytest.raises(BadSample, match="too slow"):
        TorchcodecDecoder(seconds=1e-6).frames(films["mp4"], range(60), "film")


@needs_ffmpeg
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_on_torchcodec_frames_come_out_upright(tmp_path, turns):
    path = lying(film(tmp_path / "film.mp4", 60), turns)
    assert torch.equal(TorchcodecDecoder().frames(path, [11], "")[11], Decoder().frames(path, [11], "")[11])


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_on_dali_frames_come_out_upright(tmp_path, turns):
    path, decoder = (
        lying(film(tmp_path / "film.mp4", 20, codec="libvpx-vp9"), turns),
        DaliDecoder(device="cpu"),
    )
    assert torch.equal(decoder.frames(path, [11], "")[11], Decoder().frames(path, [11], "")[11])


@needs_ffmpeg
def test_on_torchcodec_clips_are_the_same(digits):
    clips = {}
    for name in ("pyav", "torchcodec"):
        videos = open_videos(VideoDataConfig(path=str(digits), decoder=name), "train")
        rows = ClipSet(videos, ClipConfig(2, 4, 5, 32, 32), 0, training=False)
        loader = evaluation_loader(
            rows, 8, 4, 1, 0, VideoDataConfig(workers=1), torch.device("cpu"), lambda x: x
        )
        clips[name] = torch.cat([batch.inputs for batch in loader()])
    assert (clips["pyav"].int() - clips["torchcodec"].int()).abs().max() <= 3


@pytest.mark.parametrize("kind", VP9)
def test_dali_on_the_processor_gives_the_frames_asked_for(films, kind):
    assert_same_frames(DaliDecoder(device="cpu"), films[kind])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [kind for kind in KINDS | VP9 if kind not in UNSEEKABLE])
def test_dali_on_the_gpu_gives_the_frames_asked_for(films, kind):
    assert_same_frames(DaliDecoder(), films[kind])


def test_what_dali_cannot_decode_is_named_and_the_next_file_is_read(films, tmp_path):
    decoder = DaliDecoder(device="cpu")
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            decoder.frames(films["mp4"], [3], "list.txt:7 a b.mp4")
        assert str(caught.value) == (
            "list.txt:7 a b.mp4: DALI cannot decode h264 in mov,mp4,m4a,3gp,3g2,mj2; use --data.decoder pyav"
        )
        assert number_of(decoder.frames(films["webm"], [7], "")[7]) == 7
    with pytest.raises(BadSample, match="truncated: frame 61 is wanted, there are 60"):
        decoder.frames(films["webm"], [3, 60], "film")
    with pytest.raises(BadSample, match="empty"):
        decoder.frames(b"", [0], "film")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_only_this_decoder_cannot_decode_stops_the_run(digits, workers):
    """It is not the file's fault: one line, from a worker too."""
    videos = open_videos(VideoDataConfig(path=str(digits)), "val")
    videos.decoder = DaliDecoder(device="cpu")
    rows = ClipSet(videos, ClipConfig(2, 4, 5, 32, 32), 0, training=False)
    config = VideoDataConfig(workers=workers)
    loader = evaluation_loader(rows, len(videos), 4, 1, 0, config, torch.device("cpu"), lambda x: x)
    with pytest.raises(DataError) as caught:
        next(iter(loader()))
    assert re.fullmatch(r"\S+/val.txt:1 val/\S+: DALI cannot decode h264 in .*", str(caught.value))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_decoder_that_is_not_there_is_one_line(digits):
    with pytest.raises(
        ConfigError, match=r"decoder = dali: DALI decodes on an NVIDIA GPU, and there is none; use pyav"
    ):
        open_videos(VideoDataConfig(path=str(digits), decoder="dali"), "val")
    if not torchcodec_loads():
        with pytest.raises(
            ConfigError, match=r"decoder = torchcodec: .* no shared libraries of FFmpeg 4 to 9"
        ):
            open_videos(VideoDataConfig(path=str(digits), decoder="torchcodec"), "val")


def test_auto_is_pyav():
    assert type(make_decoder("auto", 3, 2)) is type(make_decoder("pyav")) is Decoder
    assert make_decoder("auto", 3, 2) == Decoder(3, 2)
