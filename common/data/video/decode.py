"""The frames that are asked for of a video file, each picked by its presentation time, decoded by PyAV."""

from __future__ import annotations

import io
import os
import stat
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image
from torch import Tensor

from common.data.decode import decode_rgb
from common.data.source import BadSample

av.logging.set_level(av.logging.PANIC)  # FFmpeg's own lines; what is wrong comes as an exception

# Seeking in these lands late or has wrong times: they are decoded from the start.
_UNSEEKABLE = {"avi", "mpegts", "mpeg"}

Video = str | Path | bytes
"""A video file, or what is in one."""
Each = Callable[[Tensor], Tensor]
"""What is done to a frame (3, H, W) as soon as it is decoded, such as making it smaller."""


@dataclass
class Decoder:
    """How files are decoded.

    Args:
        seconds: time limit of one file.
        threads: of the codec; 0 is its own choice.
    """

    seconds: float = 60.0
    threads: int = 1

    def frames(
        self, video: Video, wanted: Iterable[int], where: str, each: Each | None = None
    ) -> dict[int, Tensor]:
        """Frames of a video file by number in order of presentation, from 0.

        Returns:
            (3, H, W) uint8 RGB of each number, upright, or what ``each`` makes of it.

        Raises:
            BadSample: ``unreadable``, ``empty``, ``corrupt``, ``truncated`` (also a frame beyond the last),
                ``no video`` (audio only), ``no frames``, ``no decoder`` or ``too slow``.
        """
        clock, numbers = Clock(self.seconds, where), sorted(set(wanted))
        found: dict[int, Tensor] = {}
        with opened(video, where, self, clock) as (container, stream):
            index = packet_index(container, stream, where, clock)
            _check_numbers(numbers, index.length, where)
            if index.times:
                found = _seek_frames(container, stream, index, numbers, clock, each)
        missing = [number for number in numbers if number not in found]
        if missing:
            with opened(video, where, self, clock) as (container, stream):
                found |= _frames_in_order(container, stream, index, missing, where, clock, each)
        return found

    def length(self, video: Video, where: str) -> int:
        """The number of frames of a video file, from its packets: nothing is decoded.

        Raises:
            BadSample: as :meth:`frames`.
        """
        clock = Clock(self.seconds, where)
        with opened(video, where, self, clock) as (container, stream):
            return packet_index(container, stream, where, clock).length

    def check(self, video: Video, where: str) -> int:
        """Decode all of a file; returns the number of its frames. Raises :class:`BadSample` as :meth:`frames`."""
        length = self.length(video, where)
        self.frames(video, range(length), where, each=lambda _: torch.empty(0))
        return length


def folder_frames(
    folder: str | Path, wanted: Iterable[int], where: str, each: Each | None = None
) -> dict[int, Tensor]:
    """Frames of a folder ``img_00000.jpg``, … (or from ``img_00001.jpg``), by number from 0; as :class:`Decoder`."""
    folder, found = Path(folder), {}
    first = first_number(folder, where)
    for number in sorted(set(wanted)):
        name = f"img_{number + first:05d}.jpg"
        try:
            data = (folder / name).read_bytes()
        except FileNotFoundError:
            raise BadSample("truncated", where, f"{name} is missing") from None
        except OSError as error:
            raise BadSample("unreadable", where, f"{name}: {error.strerror}") from None
        image = _tensor(np.array(decode_rgb(data, f"{where} {name}")))
        found[number] = each(image) if each else image
    return found


def first_number(folder: Path, where: str) -> int:
    """The number, 0 or 1, of the first frame in a folder of frames."""
    for number in (0, 1):
        if (folder / f"img_{number:05d}.jpg").exists():
            return number
    reason = "no frames" if folder.is_dir() else "unreadable"
    raise BadSample(reason, where, "neither img_00000.jpg nor img_00001.jpg is there")


def write_frames(video: Video, folder: Path, decoder: Decoder, where: str) -> int:
    """Write all frames of a video file as ``img_00001.jpg``, … into ``folder``; returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    length = decoder.length(video, where)
    for start in range(0, length, 64):  # not all at once in memory
        part = decoder.frames(video, range(start, min(start + 64, length)), where)
        for number, frame in part.items():
            image = Image.fromarray(frame.permute(1, 2, 0).numpy())
            image.save(folder / f"img_{number + 1:05d}.jpg", quality=95)
    return length


@dataclass
class Index:
    """The frames of a stream."""

    length: int
    times: list[int]
    """Of presentation, rising; empty where they cannot be relied on."""
    keys: list[int]
    """Those of key frames."""


class Clock:
    """The time limit of one file."""

    def __init__(self, seconds: float, where: str) -> None:
        self.seconds, self.where, self.end = seconds, where, time.monotonic() + seconds

    def check(self) -> None:
        """Raise :class:`BadSample` when the time is over."""
        if time.monotonic() > self.end:
            raise BadSample("too slow", self.where, f"not decoded within {self.seconds:g} s")


@contextmanager
def opened(
    video: Video, where: str, decoder: Decoder, clock: Clock
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video opened by PyAV; what goes wrong with it becomes a :class:`BadSample`."""
    try:
        # Only this file: a playlist could name others, or addresses.
        options = {"protocol_whitelist": "file"}
        with av.open(_checked(video, where), "r", options=options, timeout=decoder.seconds) as container:
            if not container.streams.video:
                raise BadSample("no video", where, f"only {_kinds(container)}")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = decoder.threads
            yield container, stream
    except av.error.DecoderNotFoundError as error:
        raise BadSample("no decoder", where, f"{error.strerror}; convert it to H.264") from None
    except (av.error.ExitError, av.error.TimeoutError):
        clock.end = 0
        clock.check()
    except av.error.InvalidDataError as error:
        raise BadSample("corrupt", where, _detail(error)) from None
    except av.error.EOFError as error:
        raise BadSample("truncated", where, _detail(error)) from None
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadSample("unreadable", where, _detail(error)) from None


def _checked(video: Video, where: str) -> str | io.BytesIO:
    """What PyAV opens of a video that is a file and not empty."""
    if isinstance(video, bytes):
        size = len(video)
    else:
        status = os.stat(video)
        if not stat.S_ISREG(status.st_mode):
            raise BadSample("unreadable", where, "not a regular file")
        size = status.st_size
    if size == 0:
        raise BadSample("empty", where, "0 bytes")
    return io.BytesIO(video) if isinstance(video, bytes) else f"file:{os.path.abspath(video)}"


def _kinds(container: InputContainer) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams})) or "an empty container"


def _detail(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def packet_index(container: InputContainer, stream: VideoStream, where: str, clock: Clock) -> Index:
    """The frames of a stream, from its packets: number times rate would be wrong where the rate varies."""
    times: list[Any] = []
    keys = []
    for packet in container.demux(stream):
        clock.check()
        if packet.size == 0 or packet.is_discard:
            continue
        times.append(packet.pts)
        if packet.is_keyframe and packet.pts is not None:
            keys.append(packet.pts)
    if not times:
        raise BadSample("no frames", where, "the video stream is empty")
    names = set(container.format.name.split(","))
    reliable = None not in times and len(set(times)) == len(times) and not names & _UNSEEKABLE
    return Index(len(times), sorted(times) if reliable else [], sorted(keys))


def _check_numbers(numbers: list[int], length: int, where: str) -> None:
    if numbers and not 0 <= numbers[0] <= numbers[-1] < length:
        raise BadSample("truncated", where, f"frame {numbers[-1] + 1} is wanted, there are {length}")


def _seek_frames(
    container: InputContainer,
    stream: VideoStream,
    index: Index,
    numbers: list[int],
    clock: Clock,
    each: Each | None,
) -> dict[int, Tensor]:
    """What seeking finds of the frames: from the key frame before each, over key frames that need no decoding."""
    todo = [(index.times[number], number) for number in reversed(numbers)]
    found: dict[int, Tensor] = {}
    wanted = {moment for moment, _ in todo}
    while todo:
        before = len(todo)
        group = max(bisect_right(index.keys, todo[-1][0]) - 1, 0)
        container.seek(index.keys[group] if index.keys else todo[-1][0], stream=stream, backward=True)
        for frame in decoded_frames(container, stream, clock, wanted):
            if frame.pts is None:
                return found
            while todo and todo[-1][0] <= frame.pts:
                moment, number = todo.pop()
                if moment == frame.pts and not frame.is_corrupt:
                    found[number] = _finished(frame, each)
            if not todo or bisect_right(index.keys, todo[-1][0]) > bisect_right(index.keys, frame.pts):
                break
        else:
            return found
        if len(todo) == before:  # seeking does not get there
            return found
    return found


def _frames_in_order(
    container: InputContainer,
    stream: VideoStream,
    index: Index,
    numbers: list[int],
    where: str,
    clock: Clock,
    each: Each | None,
) -> dict[int, Tensor]:
    """The frames, decoded from the start of the file."""
    places = {moment: number for number, moment in enumerate(index.times)}
    missing, found = set(numbers), {}
    for count, frame in enumerate(decoded_frames(container, stream, clock)):
        number = places.get(frame.pts, -1) if places and frame.pts is not None else count
        if number in missing:
            if frame.is_corrupt:
                raise BadSample("corrupt", where, f"frame {number} is damaged")
            found[number] = _finished(frame, each)
            missing.remove(number)
        if not missing:
            return found
    raise BadSample("truncated", where, f"frame {min(missing)} of {index.length} cannot be decoded")


def decoded_frames(
    container: InputContainer, stream: VideoStream, clock: Clock, wanted: set[int] | None = None
) -> Iterator[VideoFrame]:
    """The frames from where the container is, within the time limit.

    Args:
        wanted: times; of other frames those may be missing that none is predicted from: they are not decoded.
    """
    codec = stream.codec_context
    needed = wanted if codec.name == "h264" else None  # in others "no reference" does not always mean this
    for packet in container.demux(stream):
        clock.check()
        if needed is not None:
            codec.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in needed else "NONREF"
        for frame in packet.decode():
            clock.check()
            yield frame


def quarter_turns(frame: VideoFrame) -> int:
    """Turns to the left that make a frame upright, 0 to 3: a telephone's videos are stored lying."""
    return round(frame.rotation / 90) % 4


def upright(image: Tensor, turns: int) -> Tensor:
    """A frame (3, H, W), turned; see :func:`quarter_turns`."""
    return torch.rot90(image, turns, (1, 2)) if turns else image


def _finished(frame: VideoFrame, each: Each | None) -> Tensor:
    image = upright(_tensor(frame.to_ndarray(format="rgb24")), quarter_turns(frame))
    return each(image) if each else image


def _tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)
