"""Which frames of a video make its clips."""

from __future__ import annotations

import random


def span(length: int, rate: int) -> int:
    """Frames from the first to the last of a clip of ``length`` frames, every ``rate``-th of the video."""
    return (length - 1) * rate + 1


def train_offsets(frames: int, segments: int, length: int, rate: int) -> list[int]:
    """First frames of the clips of a video of ``frames`` frames, one a segment, drawn from Python's ``random``.

    One from each of ``segments`` equal parts where each has room to choose; else anywhere, in order; else 0.
    """
    places = frames - span(length, rate) + 1
    average = places // segments
    if average > 0:
        return [segment * average + random.randrange(average) for segment in range(segments)]
    if places > 1:
        return sorted(random.randrange(places) for _ in range(segments))
    return [0] * segments


def test_offsets(frames: int, segments: int, length: int, rate: int) -> list[int]:
    """First frames of the clips, each in the middle of its segment; all 0 in a video that is too short."""
    need = span(length, rate)
    if frames <= segments + need - 1:
        return [0] * segments
    tick = (frames - need + 1) / segments
    return [int(tick / 2 + tick * segment) for segment in range(segments)]


def clip_frames(offset: int, frames: int, length: int, rate: int) -> list[int]:
    """The clip's frames from ``offset`` on; the video's last one again where it runs past the end."""
    return [min(offset + step * rate, frames - 1) for step in range(length)]
