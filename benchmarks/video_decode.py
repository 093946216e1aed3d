"""Decoded clips per second of one core: `python benchmarks/video_decode.py`.

Our reader with each decoder, against a plain loop over PyAV that decodes from the file's start to the last frame it
wants, and torchcodec called directly. All decode the same random clips of 8 frames (every 8th) of the same files: ten
seconds of a camera that moves over photographs, 340×256, 30 frames/s, H.264 with x264's defaults (a key frame every
250 frames) and with a key frame a second. They alternate; measured is the processor's time of one thread. torchcodec
needs FFmpeg's shared libraries; without them its rows are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from common.data.video.decode import Decoder
from common.data.video.decoders import make_decoder
from common.data.video.sampling import clip_frames, span
from common.environment import environment
from common.errors import ConfigError

LENGTH, RATE, FRAMES = 8, 8, 300
HEIGHT, WIDTH = 256, 340
KEY_FRAMES: dict[str, dict[str, str]] = {"x264's defaults": {}, "a key frame a second": {"g": "30"}}
Read = Callable[[Path, list[int]], Tensor]
"""Frames of a file by number → (n, 3, H, W)."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=int, default=4, help="files of each kind")
    parser.add_argument("--clips", type=int, default=12, help="clips in a block")
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/video_decode.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    methods = readers()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, options in KEY_FRAMES.items():
            files = [write(Path(folder), seed, options) for seed in range(arguments.videos)]
            results[title] = measure(methods, files, arguments.clips, arguments.blocks)
            size = statistics.mean(file.stat().st_size for file in files) / 1e6
            print(f"{title} ({size:.1f} MB a file):")
            for name, row in results[title].items():
                print(
                    f"  {name:22} {row['clips_per_s']:6.1f} clips/s, {row['times']:.2f} times the plain loop"
                )
    settings = {
        "clip": f"{LENGTH} frames, every {RATE}th, of {FRAMES} of {WIDTH}×{HEIGHT}",
        "blocks": arguments.blocks,
        "decoders": {name: version(name) for name in ("av", "torchcodec")},
        "load": os.getloadavg()[1],
    }
    content = {"results": results, "device": "CPU, one thread"} | settings | environment()
    arguments.out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def readers() -> dict[str, Read]:
    """What is compared, by name."""
    found: dict[str, Read] = {"plain PyAV loop": plain, "pairwise, pyav": ours(Decoder())}
    try:
        found["pairwise, torchcodec"] = ours(make_decoder("torchcodec"))
        found["torchcodec"] = theirs
    except ConfigError as error:
        print(f"without torchcodec: {error}")
    return found


def plain(path: Path, numbers: list[int]) -> Tensor:
    """The loop that one would write by hand."""
    wanted, images = set(numbers), []
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                images.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))
            if number == numbers[-1]:
                break
    return torch.stack(images)


def ours(decoder: Decoder) -> Read:
    """The reader of video/train.py."""

    def read(path: Path, numbers: list[int]) -> Tensor:
        found = decoder.frames(path, numbers, path.name)
        return torch.stack([found[number] for number in numbers])

    return read


def theirs(path: Path, numbers: list[int]) -> Tensor:
    """torchcodec by itself."""
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(path, num_ffmpeg_threads=1).get_frames_at(numbers).data


def measure(
    methods: dict[str, Read], files: list[Path], clips: int, blocks: int
) -> dict[str, dict[str, float]]:
    """The median rate of each method, and the median of its ratios to the first, block by block."""
    rng = random.Random(0)
    rates: dict[str, list[float]] = {name: [] for name in methods}
    for block in range(blocks + 1):
        starts = [rng.randrange(FRAMES - span(LENGTH, RATE) + 1) for _ in range(clips)]
        work = [
            (files[i % len(files)], clip_frames(start, FRAMES, LENGTH, RATE))
            for i, start in enumerate(starts)
        ]
        outputs = []
        for name, read in methods.items():
            begun = time.process_time()
            images = [read(*each) for each in work]
            rates[name].append(clips / (time.process_time() - begun))
            outputs.append(torch.stack(images))
        if block == 0:
            assert all(torch.equal(outputs[0], other) for other in outputs), "they decode different frames"
    first = next(iter(rates.values()))
    return {
        name: {
            "clips_per_s": statistics.median(values[1:]),
            "times": statistics.median(value / base for value, base in zip(values[1:], first[1:])),
        }
        for name, values in rates.items()
    }


def write(folder: Path, seed: int, options: dict[str, str]) -> Path:
    """Write one video; returns its file."""
    path = folder / f"{seed}-{'-'.join(options.values())}.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt, stream.options = HEIGHT, WIDTH, "yuv420p", {**options}
        for image in flight(seed):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def flight(seed: int) -> Iterator[np.ndarray]:
    """Frames (H, W, 3) of a camera that wanders over a photograph, zooms and shakes a little."""
    rng = np.random.default_rng(seed)
    photo = Image.fromarray(load_sample_image(("china.jpg", "flower.jpg")[seed % 2]))
    phases, speeds = rng.uniform(0, 2 * np.pi, 3), rng.uniform(0.5, 1.5, 3)
    for number in range(FRAMES):
        x, y, zoom = (np.sin(phases + speeds * number / 40) + 1) / 2
        width = WIDTH * (0.8 + 0.6 * zoom)
        height = width * HEIGHT / WIDTH
        left, top = x * (photo.width - width - 4), y * (photo.height - height - 4)
        shake = rng.uniform(0, 3, 2)
        box = (left + shake[0], top + shake[1], left + shake[0] + width, top + shake[1] + height)
        image = np.asarray(photo.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR, box))
        yield np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
