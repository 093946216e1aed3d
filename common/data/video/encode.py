"""Smaller videos: all frames at their times, as H.264 in MP4."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from common.data.source import BadSample
from common.data.video.decode import (
    Clock,
    Decoder,
    Video,
    decoded_frames,
    opened,
    packet_index,
    quarter_turns,
)

KEY_FRAMES = 32
"""Frames from one key frame to the next, at most: a reader decodes half as many in vain to get to its first one."""


def reencode(video: Video, side: int, crf: int, where: str, decoder: Decoder) -> bytes:
    """A video with the same frames at the same times, the shorter side ``side`` pixels long: the same bytes each time.

    Smaller videos keep their size, both sides are rounded to even numbers, frames are turned upright, and sound is
    left out.

    Args:
        crf: x264's quality, 0 to 51; less is better and larger.

    Raises:
        BadSample: not all frames can be decoded; see :meth:`Decoder.frames`.
    """
    clock, target, count = Clock(decoder.seconds, where), io.BytesIO(), 0
    with opened(video, where, decoder, clock) as (container, stream):
        index = packet_index(container, stream, where, clock)
    times = set(index.times)
    with (
        opened(video, where, decoder, clock) as (container, stream),
        av.open(target, "w", format="mp4") as out,
    ):
        rate = stream.average_rate or Fraction(25)
        encoder = out.add_stream("libx264", rate=rate, pix_fmt="yuv420p")
        same_bytes(encoder, {"preset": "medium", "crf": str(crf), "g": str(KEY_FRAMES)})
        time_base = stream.time_base if times and stream.time_base else 1 / rate
        encoder.codec_context.time_base = time_base
        for frame in decoded_frames(container, stream, clock):
            if times and frame.pts not in times:
                continue
            if frame.is_corrupt:
                raise BadSample("corrupt", where, f"frame {count} is damaged")
            image = _upright(frame)
            if count == 0:
                encoder.height, encoder.width = _even(image.height, image.width, side)
            image = image.reformat(encoder.width, encoder.height, "yuv420p", interpolation="AREA")
            image.pts, image.time_base = frame.pts if times else count, time_base
            image.pict_type = PictureType.NONE  # else the encoder would take over which frames are key frames
            out.mux(encoder.encode(image))
            count += 1
        if count:
            out.mux(encoder.encode())
    if count < index.length:
        raise BadSample("truncated", where, f"{count} of {index.length} frames can be decoded")
    return target.getvalue()


def same_bytes(stream: VideoStream, options: dict[str, str]) -> None:
    """Have x264 encode with ``options``, and give the same bytes for the same frames in every process."""
    stream.codec_context.thread_count = 1  # the threads' number changes the bytes
    # Its adaptive quantisation reads memory that it has not written.
    stream.options = {**options, "x264-params": "aq-mode=0:mbtree=0"}


def _even(height: int, width: int, side: int) -> tuple[int, int]:
    short = min(height, width)
    scale = min(1.0, side / short)
    return max(2, 2 * round(height * scale / 2)), max(2, 2 * round(width * scale / 2))


def _upright(frame: VideoFrame) -> VideoFrame:
    turns = quarter_turns(frame)
    if turns == 0:
        return frame
    image = np.rot90(frame.to_ndarray(format="rgb24"), turns)
    return VideoFrame.from_ndarray(np.ascontiguousarray(image, np.uint8), format="rgb24")
