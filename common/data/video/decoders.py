"""The decoders beside PyAV: torchcodec, and DALI with the video engine of a GPU. All give the same frames.

What they cannot do is left to PyAV: it says what is wrong with a file. They do not tell that a frame is damaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from common.data.source import DataError
from common.data.video.decode import (
    Clock,
    Decoder,
    Each,
    Video,
    decoded_frames,
    opened,
    quarter_turns,
    upright,
)
from common.errors import ConfigError

DecoderName = Literal["auto", "pyav", "torchcodec", "dali"]


def make_decoder(name: DecoderName, seconds: float = 60.0, threads: int = 1) -> Decoder:
    """The decoder ``name``; ``auto`` is PyAV, which reads most and needs nothing else.

    Raises:
        ConfigError: what the decoder needs is not there.
    """
    if name == "torchcodec":
        _check_torchcodec()
        return TorchcodecDecoder(seconds, threads)
    if name == "dali":
        _check_dali()
        return DaliDecoder(seconds, threads)
    return Decoder(seconds, threads)


@dataclass
class TorchcodecDecoder(Decoder):
    """torchcodec, in its exact mode: it walks through the packets first, as :class:`Decoder` does."""

    name: ClassVar[str] = "torchcodec"

    def frames(
        self, video: Video, wanted: Iterable[int], where: str, each: Each | None = None
    ) -> dict[int, Tensor]:
        """As :meth:`Decoder.frames`; a :class:`DataError` where only torchcodec cannot decode the file."""
        from torchcodec.decoders import VideoDecoder

        clock, numbers, found = Clock(self.seconds, where), sorted(set(wanted)), {}
        with opened(video, where, self, clock):  # names what is no video, and follows no playlist
            pass
        try:
            decoder = VideoDecoder(video, num_ffmpeg_threads=self.threads)
            for number in numbers:
                clock.check()
                frame = decoder.get_frame_at(number).data
                found[number] = each(frame) if each else frame
        except (RuntimeError, ValueError, IndexError):
            raise _cannot(self, video, numbers, where) from None
        return found


@dataclass
class DaliDecoder(Decoder):
    """DALI's video decoder.

    Args:
        device: ``mixed`` decodes on the GPU (NVDEC), ``cpu`` on the processor, where it knows VP8, VP9 and MJPEG only.
    """

    device: Literal["mixed", "cpu"] = "mixed"
    name: ClassVar[str] = "DALI"

    def frames(
        self, video: Video, wanted: Iterable[int], where: str, each: Each | None = None
    ) -> dict[int, Tensor]:
        """As :meth:`Decoder.frames`; a :class:`DataError` where only DALI cannot decode the file."""
        clock, numbers = Clock(self.seconds, where), sorted(set(wanted))
        with opened(video, where, self, clock) as (container, stream):
            first = next(decoded_frames(container, stream, clock), None)
        turns = quarter_turns(first) if first else 0  # DALI gives the frames as they are stored
        data = np.frombuffer(video, np.uint8) if isinstance(video, bytes) else np.fromfile(video, np.uint8)
        pipeline = _pipeline(self.device, self.threads)
        try:
            pipeline.feed_input("video", [data])
            pipeline.feed_input("frames", [np.array(numbers, np.int32)])
            (output,) = pipeline.run()
            images = torch.from_numpy(np.array(output.as_cpu().at(0))).permute(0, 3, 1, 2)
        except RuntimeError:
            _pipeline.cache_clear()  # it cannot be used any more
            raise _cannot(self, video, numbers, where) from None
        clock.check()
        frames = (upright(image, turns) for image in images)
        return {number: each(frame) if each else frame for number, frame in zip(numbers, frames)}


@cache
def _pipeline(device: str, threads: int) -> Any:
    """DALI's decoder of one video at a time, one a process."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(
        batch_size=1,
        num_threads=max(1, threads),
        device_id=int(os.environ.get("LOCAL_RANK", "0")) if device == "mixed" else None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    def decode() -> Any:
        video = fn.external_source(name="video", dtype=types.UINT8, ndim=1)
        frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        return fn.decoders.video(video, frames=frames, device=device, pad_mode="none")

    pipeline = decode()
    pipeline.build()
    return pipeline


def _cannot(
    decoder: TorchcodecDecoder | DaliDecoder, video: Video, numbers: list[int], where: str
) -> DataError:
    """What to say of a file that ``decoder`` cannot decode and PyAV can.

    Raises:
        BadSample: PyAV cannot decode it either.
    """
    pyav = Decoder(decoder.seconds, decoder.threads)
    pyav.frames(video, numbers, where, each=lambda _: torch.empty(0))
    with opened(video, where, pyav, Clock(pyav.seconds, where)) as (container, stream):
        codec, form = stream.codec_context.name, container.format.name
    return DataError(f"{where}: {decoder.name} cannot decode {codec} in {form}; use --data.decoder pyav")


def _check_torchcodec() -> None:
    try:
        from torchcodec.decoders import VideoDecoder

        VideoDecoder(b"no video")
    except ImportError:
        raise ConfigError("data.decoder = torchcodec: torchcodec is not installed; use pyav") from None
    except (RuntimeError, ValueError) as error:
        if "load libtorchcodec" in str(error):
            raise ConfigError(
                "data.decoder = torchcodec: torchcodec finds no shared libraries of FFmpeg 4 to 9 "
                "(Debian: apt-get install ffmpeg); pyav brings its own"
            ) from None


def _check_dali() -> None:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        raise ConfigError("data.decoder = dali: nvidia-dali is not installed; use pyav") from None
    if not torch.cuda.is_available():
        raise ConfigError("data.decoder = dali: DALI decodes on an NVIDIA GPU, and there is none; use pyav")
