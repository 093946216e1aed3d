"""Real video files for the tests, with the number of each frame drawn into its pixels."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

HEIGHT, WIDTH = 48, 64
_BITS = 8


def numbered(number: int) -> np.ndarray:
    """A frame that shows ``number`` in binary: eight blocks, white for 1."""
    bits = (number >> np.arange(_BITS)) & 1
    rows = np.repeat(bits.reshape(2, 4), HEIGHT // 2, 0)
    return np.repeat(np.repeat(rows, WIDTH // 4, 1)[..., None] * 255, 3, 2).astype(np.uint8)


def number_of(frame: Tensor) -> int:
    """The number that a frame (3, H, W) shows."""
    blocks = frame.float().mean(0).reshape(2, HEIGHT // 2, 4, WIDTH // 4).mean((1, 3)).flatten()
    return int(sum(1 << bit for bit, block in enumerate(blocks.tolist()) if block > 127))


def film(
    path: Path, frames: int = 60, variable: bool = False, codec: str = "libx264", **options: str
) -> Path:
    """Write a numbered video; ``variable`` gives frames irregular times."""
    rng = np.random.default_rng(0)
    moments = np.cumsum(rng.integers(5, 120, frames)) if variable else np.arange(frames) * 40
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.options = {"g": "12", "crf": "12", "threads": "1"} | options
        for number, moment in enumerate(moments.tolist()):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def lying(path: Path, turns: int) -> Path:
    """Have an MP4 file say that its frames must be turned to the left so many times to be upright."""
    data = bytearray(path.read_bytes())
    sin, cos = ((0, 1), (-1, 0), (0, -1), (1, 0))[turns]
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(
        ">9i", cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30
    )
    path.write_bytes(data)
    return path


def sound(path: Path) -> Path:
    """Write a file with sound alone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        for start in range(0, 8000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
