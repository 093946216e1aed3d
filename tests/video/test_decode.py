"""The right frames arrive, from real files whose pixels tell each frame's number; bad files are typed errors."""

import os
import random

import av
import numpy as np
import pytest
import torch
from PIL import Image

import common.data.video.decode as decoding
from common.data.source import BadSample
from common.data.video.decode import Decoder, folder_frames, write_frames
from tests.video.films import film, lying, number_of, numbered, sound

DECODER = Decoder()
KINDS = {
    "mp4": {},
    "mkv": {},
    "mp4-variable": {"variable": True},
    "mkv-variable": {"variable": True},
    "mp4-no-b-frames": {"bf": "0"},
    "mp4-b-frames": {"bf": "3"},
    "mkv-b-frames": {"bf": "3", "variable": True},
    "mp4-open-gop": {"bf": "3", "x264-params": "open-gop=1:scenecut=0", "variable": True},
    "mkv-open-gop": {"bf": "3", "x264-params": "open-gop=1:scenecut=0"},
    "ts-b-frames": {"bf": "3"},
    "avi-b-frames": {"bf": "3"},
    "mp4-one-gop": {"g": "1000"},
    "mp4-all-keys": {"g": "1"},
}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    return {
        kind: film(folder / f"{kind}.{kind.partition('-')[0]}", **options) for kind, options in KINDS.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_frames_asked_for_arrive(films, kind):
    path = films[kind]
    assert DECODER.length(path, "") == 60
    rng = random.Random(kind)
    wanted = [[0], [59], list(range(60)), [11, 12, 13], [10, 23, 24, 25, 47], [3, 50]]
    wanted += [sorted(rng.sample(range(60), 8)) for _ in range(6)]
    for numbers in wanted:
        found = DECODER.frames(path, numbers, "")
        assert {number: number_of(frame) for number, frame in found.items()} == {n: n for n in numbers}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "b-frames" in kind or "gop" in kind])
def test_frames_that_are_not_decoded_change_no_pixel(films, kind):
    whole = DECODER.frames(films[kind], range(60), "")
    for start in range(7):
        for number, frame in DECODER.frames(films[kind], range(start, 60, 7), "").items():
            assert torch.equal(frame, whole[number])


def test_frames_that_no_other_needs_are_not_decoded(films):
    with av.open(str(films["mp4-b-frames"])) as container:
        stream, clock = container.streams.video[0], decoding.Clock(60, "")
        packets = sorted(packet.pts for packet in container.demux(stream) if packet.size)
        container.seek(0, stream=stream)
        frames = [frame.pts for frame in decoding.decoded_frames(container, stream, clock, {packets[30]})]
    assert packets[30] in frames
    assert len(frames) < 45


@pytest.mark.parametrize("kind", ["mp4", "mkv-b-frames", "mp4-open-gop"])
def test_only_the_groups_that_are_needed_are_decoded(films, kind, monkeypatch):
    count = [0]
    decoded = decoding.decoded_frames

    def counting(*args):
        for frame in decoded(*args):
            count[0] += 1
            yield frame

    monkeypatch.setattr(decoding, "decoded_frames", counting)
    DECODER.frames(films[kind], [1, 58], "")
    assert 2 <= count[0] < 30, "two groups of about 12 frames each"


@pytest.mark.parametrize("codec, ending", [("mpeg4", "mp4"), ("libvpx-vp9", "webm"), ("mjpeg", "avi")])
def test_other_codecs(tmp_path, codec, ending):
    path = film(tmp_path / f"film.{ending}", 30, codec=codec) if codec != "mjpeg" else _mjpeg(tmp_path)
    found = DECODER.frames(path, [0, 7, 29], "")
    assert [number_of(frame) for frame in found.values()] == [0, 7, 29]


def _mjpeg(folder):
    path = folder / "film.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
        for number in range(30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(stream.encode())
    return path


def test_a_frame_is_made_smaller_as_soon_as_it_is_decoded(films):
    found = DECODER.frames(films["mp4"], [5], "", each=lambda frame: frame[:, :4, :2])
    assert found[5].shape == (3, 4, 2)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_frames_come_out_upright(tmp_path, turns):
    path = lying(film(tmp_path / "film.mp4", 20), turns)
    frame = DECODER.frames(path, [11], "")[11]
    assert frame.shape == ((3, 48, 64), (3, 64, 48))[turns % 2]
    assert number_of(torch.rot90(frame, -turns, (1, 2))) == 11


def test_colours_are_rgb(tmp_path):
    path = tmp_path / "red.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        image = np.zeros((48, 64, 3), np.uint8)
        image[..., 0] = 250
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    red, green, blue = DECODER.frames(path, [0], "")[0].float().mean((1, 2)).tolist()
    assert red > 230
    assert max(green, blue) < 25


def bad_file(folder, films, kind):
    path = folder / "bad.mp4"
    data = films["mp4"].read_bytes()
    if kind == "missing":
        pass
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_bytes(b"this is no video\n" * 50)
    elif kind == "cut mp4":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "overwritten":
        path.write_bytes(data[:600] + os.urandom(len(data) // 2) + data[600 + len(data) // 2 :])
    elif kind == "audio":
        sound(path)
    elif kind == "no frames":
        path = _no_frames(folder)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    return path


def _no_frames(folder):
    path = folder / "none.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    return path


@pytest.mark.parametrize(
    "kind, reasons",
    [
        ("missing", {"unreadable"}),
        ("empty", {"empty"}),
        ("text", {"corrupt"}),
        ("cut mp4", {"corrupt", "truncated"}),
        ("overwritten", {"corrupt", "truncated"}),
        ("audio", {"no video"}),
        ("no frames", {"no frames"}),
        ("folder", {"unreadable"}),
        ("pipe", {"unreadable"}),
    ],
)
def test_a_bad_file_is_a_typed_error(tmp_path, films, kind, reasons):
    path = bad_file(tmp_path, films, kind)
    with pytest.raises(BadSample) as caught:
        DECODER.check(path, "list.txt:3 bad.mp4")
    assert caught.value.reason in reasons
    assert caught.value.where == "list.txt:3 bad.mp4"
    assert "\n" not in caught.value.detail


def test_a_film_that_ends_too_early_is_truncated(films, tmp_path):
    with pytest.raises(BadSample, match="truncated: frame 61 is wanted, there are 60"):
        DECODER.frames(films["mp4"], [3, 60], "film")
    cut = tmp_path / "cut.mkv"
    data = films["mkv"].read_bytes()
    cut.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(BadSample):
        DECODER.frames(cut, [59], "cut")
    early = DECODER.frames(cut, [5], "cut")
    assert number_of(early[5]) == 5, "what is there is read"


def test_decoding_has_a_time_limit(films):
    with pytest.raises(BadSample, match="too slow"):
        Decoder(seconds=1e-6).frames(films["mp4"], range(60), "film")


def test_a_playlist_reads_no_other_file(tmp_path, films):
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{films['ts-b-frames']}\n#EXT-X-ENDLIST\n"
    )
    playlist.rename(tmp_path / "film.mp4")
    with pytest.raises(BadSample):
        DECODER.frames(tmp_path / "film.mp4", [0], "")


@pytest.mark.parametrize("first", [0, 1])
def test_folders_of_frames_count_from_0_or_1(tmp_path, first):
    for number in range(4):
        Image.fromarray(numbered(number)).save(tmp_path / f"img_{number + first:05d}.jpg", quality=95)
    found = folder_frames(tmp_path, [0, 3], "")
    assert [number_of(frame) for frame in found.values()] == [0, 3]
    with pytest.raises(BadSample, match=f"img_{4 + first:05d}.jpg is missing"):
        folder_frames(tmp_path, [4], "")


def test_folders_without_frames(tmp_path):
    for path, reason in ((tmp_path, "no frames"), (tmp_path / "no", "unreadable")):
        with pytest.raises(BadSample) as caught:
            folder_frames(path, [0], "")
        assert caught.value.reason == reason


def test_extracted_frames_are_the_films(films, tmp_path):
    assert write_frames(films["mp4-b-frames"], tmp_path, DECODER, "") == 60
    assert len(list(tmp_path.glob("img_*.jpg"))) == 60
    assert (tmp_path / "img_00001.jpg").exists()
    found = folder_frames(tmp_path, range(60), "")
    assert [number_of(found[number]) for number in range(60)] == list(range(60))
