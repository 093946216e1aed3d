"""Real digits that move: scikit-learn's handwritten digits in short H.264 videos, classes defined by motion alone.

Every class has its mirror in time: played backwards, a clip of one is a clip of the other. So neither a frame nor
all frames without their order tell the two apart, and a network that averages over time gets at most half of the
clips right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from common.data.digits import digits_images
from common.data.source import DataError
from common.data.video.encode import same_bytes
from common.data.video.lists import Clip, write_classes, write_list
from common.files import atomic_folder

CLASSES = (
    "moves_left",
    "moves_right",
    "moves_up",
    "moves_down",
    "turns_left",
    "turns_right",
    "grows",
    "shrinks",
    "brightens",
    "fades",
    "left_then_right",
    "right_then_left",
)
SPLITS = {"train": 50, "val": 16}
"""Videos of each class."""
_DIGIT = 32


@dataclass
class Scene:
    """Everything of a video but its motion, drawn alike for every class."""

    digit: np.ndarray
    height: int
    width: int
    frames: int
    rate: int
    background: np.ndarray
    tint: np.ndarray
    place: tuple[float, float]
    angle: float
    size: float
    reach: float

    @classmethod
    def draw(cls, digit: np.ndarray, rng: np.random.Generator) -> Scene:
        """A random scene around a digit (32, 32)."""
        height, width = (2 * int(side) for side in rng.integers(32, 49, 2))
        return cls(
            digit,
            height,
            width,
            frames=int(rng.integers(24, 41)),
            rate=int(rng.choice([12, 15, 24, 25, 30])),
            background=rng.integers(0, 70, 3),
            tint=rng.integers(180, 256, 3),
            place=(float(rng.uniform(-0.06, 0.06)), float(rng.uniform(-0.06, 0.06))),
            angle=float(rng.uniform(-0.3, 0.3)),
            size=float(rng.uniform(0.38, 0.5)),
            reach=float(rng.uniform(0.4, 0.5)),
        )


def moving_frames(motion: str, scene: Scene) -> Iterator[np.ndarray]:
    """The frames (H, W, 3) uint8 of a scene in which the digit moves as the class ``motion`` says."""
    index = CLASSES.index(motion)
    for number in range(scene.frames):
        moment = number / (scene.frames - 1)
        # Odd classes move as `_frame` says, even ones are the same backwards.
        yield _frame(index // 2, moment if index % 2 else 1 - moment, scene)


def _frame(kind: int, moment: float, scene: Scene) -> np.ndarray:
    """The frame of the motion that at ``moment`` 1 ends on the right, below, turned right, small, dark, or left."""
    away = 2 * moment - 1
    (x, y), angle, size, light = scene.place, scene.angle, scene.size, 1.0
    if kind == 0:
        x += scene.reach * away * 0.7
    elif kind == 1:
        y += scene.reach * away * 0.7
    elif kind == 2:
        angle += math.pi * 0.75 * away
    elif kind == 3:
        size *= 2.0 ** (-0.75 * away)
    elif kind == 4:
        light = 0.55 - 0.45 * away
    else:
        x += 0.5 * scene.reach * (1 if away < 0 else -1)
    return _draw(scene, x, y, angle, size, light)


def _draw(scene: Scene, x: float, y: float, angle: float, size: float, light: float) -> np.ndarray:
    """The digit with its centre at (x, y) from the frame's, lengths as shares of the shorter side."""
    side = min(scene.height, scene.width)
    centre_x, centre_y = scene.width / 2 + x * side, scene.height / 2 + y * side
    scale = _DIGIT / (size * side)
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    matrix = (
        cos,
        sin,
        _DIGIT / 2 - cos * centre_x - sin * centre_y,
        -sin,
        cos,
        _DIGIT / 2 + sin * centre_x - cos * centre_y,
    )
    shape = Image.fromarray(scene.digit).transform(
        (scene.width, scene.height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    share = np.asarray(shape, np.float32)[..., None] * (light / 255)
    return np.rint(scene.background + share * (scene.tint - scene.background.astype(np.float32))).astype(
        np.uint8
    )


def write_video(path: Path, frames: Iterator[np.ndarray], rate: int) -> int:
    """Write frames as H.264 in MP4, the same bytes for the same frames; returns their number."""
    count = 0
    with av.open(str(path), "w", format="mp4") as container:
        stream = None
        for image in frames:
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(rate))
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = "yuv420p"
                same_bytes(stream, {"preset": "veryfast", "crf": "18", "g": "12", "bf": "2"})
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            count += 1
        if stream is not None:
            container.mux(stream.encode())
    return count


def prepare_moving_digits(out: Path, splits: dict[str, int] | None = None) -> bool:
    """Write the moving digits into the folder ``out``, which appears when all of it is written.

    Args:
        splits: videos of each class in ``train`` and ``val``; :data:`SPLITS` by default.

    Returns:
        False if they were there already, and nothing was done.

    Raises:
        DataError: ``out`` holds something else.
    """
    if all((out / name).is_file() for name in ("train.txt", "val.txt", "classes.txt")):
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            f"{out} is there already, and not the moving digits; remove it or name another folder"
        )
    try:
        with atomic_folder(out) as folder:
            for split, count in (splits or SPLITS).items():
                write_list(folder / f"{split}.txt", list(_write_split(folder, split, count)))
            write_classes(folder, CLASSES)
    except FileExistsError:  # another process was faster
        return False
    return True


def _write_split(folder: Path, split: str, count: int) -> Iterator[Clip]:
    images = [np.asarray(image.convert("L")) for _, image, _ in digits_images(split, _DIGIT)]
    for label, motion in enumerate(CLASSES):
        (folder / split / motion).mkdir(parents=True)
        for number in range(count):
            rng = np.random.default_rng([label, number, split == "val"])
            scene = Scene.draw(images[int(rng.integers(len(images)))], rng)
            name = f"{split}/{motion}/{number:04d}.mp4"
            yield name, write_video(folder / name, moving_frames(motion, scene), scene.rate), label
