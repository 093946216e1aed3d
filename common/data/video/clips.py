"""Video data sets: clips of the videos in a list, decoded and augmented by draw."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common.data.augment import seeded
from common.data.loader import FILLER, UNREADABLE, LoaderConfig, Row, Unreadable
from common.data.order import Draw
from common.data.source import BadSample, DataError, local_path, read_classes
from common.data.video.crops import centre_box, cut, multi_scale_box, resize, resize_shorter
from common.data.video.decode import Decoder, Each, folder_frames
from common.data.video.decoders import DecoderName, make_decoder
from common.data.video.lists import ClipList
from common.data.video.sampling import clip_frames, test_offsets, train_offsets
from common.data.video.shards import open_clips

_RGB_MEAN = (123.68, 116.779, 103.939)


@dataclass
class VideoDataConfig(LoaderConfig):
    """Where videos are and how they are read."""

    path: str = "data/moving-digits"
    """Folder with classes.txt and the list files, whose lines are: path frames label; and shards, if there are any."""
    format: Literal["auto", "list", "webdataset"] = "auto"
    """Where the videos are: the files that the lists name, or WebDataset shards beside them; auto looks."""
    train: str = "train.txt"
    """Training list, in `path`."""
    val: str = "val.txt"
    """Validation list, in `path`."""
    root: str | None = None
    """Folder that the lists' paths are relative to; by default `path`."""
    read_mode: Literal["video", "img"] = "video"
    """Whether the lists name video files, or folders of frames img_00000.jpg (or img_00001.jpg), …"""
    decoder: DecoderName = "auto"
    """What decodes videos: pyav, which auto is, torchcodec (needs a system's FFmpeg) or dali (on a GPU)."""
    decode_seconds: float = 60.0
    """Time limit for decoding one video, which then counts as unreadable."""
    decode_threads: int = 1
    """Threads of each worker's decoder; 0 is the codec's own choice."""
    max_unreadable: float = 0.01
    """Share of unreadable samples above which training stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.max_unreadable <= 1:
            raise ValueError(f"max_unreadable = {self.max_unreadable}: expected a share, 0 to 1")
        if self.read_mode == "img" and self.format == "webdataset":
            raise ValueError("format = webdataset: shards hold videos; expected list with read_mode = img")
        if self.decode_seconds <= 0:
            raise ValueError(f"decode_seconds = {self.decode_seconds}: expected more than 0")
        if self.decode_threads < 0:
            raise ValueError(f"decode_threads = {self.decode_threads}: expected 0 or more")


@dataclass
class ClipConfig:
    """How clips are sampled, cropped and normalised."""

    num_segments: int = 1
    """Clips a video, one from each of as many equal parts; their logits are averaged before the loss."""
    seq_length: int = 8
    """Frames of a clip."""
    sample_rate: int = 8
    """A clip takes every so manyeth frame of the video."""
    size: int = 224
    """Height and width of the network's input, pixels."""
    short_side: int = 256
    """Shorter side of a frame in evaluation, before it is cropped, pixels."""
    scales: list[float] = field(default_factory=lambda: [1.0, 0.875, 0.75, 0.66])
    """Sides of random crops, as shares of the frame's shorter side (training)."""
    hflip: float = 0.5
    """Probability of a horizontal flip (training)."""
    colour: Literal["rgb", "published"] = "rgb"
    """rgb subtracts the mean of each channel; published as the published runs do: the means in the order blue, green,
    red, from RGB frames (read_mode video) or from BGR frames (img). Published weights depend on it."""

    def __post_init__(self) -> None:
        for name in ("num_segments", "seq_length", "sample_rate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 1")
        if self.size < 16:
            raise ValueError(f"size = {self.size}: expected at least 16 pixels")
        if self.short_side < self.size:
            raise ValueError(f"short_side = {self.short_side}: expected at least size = {self.size}")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ValueError(
                f"scales = {self.scales}: expected shares of the shorter side, above 0 and at most 1"
            )
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip = {self.hflip}: expected a probability, 0 to 1")


class ClipNormalize:
    """uint8 RGB clips (…, 3, T, H, W) on their device → float32, on the scale 0–255 less the channels' means."""

    def __init__(self, colour: str, read_mode: str, device: torch.device) -> None:
        published = colour == "published"
        self.swap = published and read_mode == "img"
        mean = _RGB_MEAN[::-1] if published else _RGB_MEAN
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1, 1)

    def __call__(self, clips: Tensor) -> Tensor:
        return torch.sub(clips.flip(-4) if self.swap else clips, self.mean)


@dataclass
class Videos:
    """The videos of a list, and how they are read."""

    clips: ClipList
    classes: tuple[str, ...]
    read_mode: str
    decoder: Decoder

    def __len__(self) -> int:
        return len(self.clips)

    def segments(self, index: int, offsets: list[int], clip: ClipConfig, each: Each | None = None) -> Tensor:
        """Decode clips that begin at ``offsets``: (segments · T, 3, H, W), in one pass over the file.

        Raises:
            BadSample: the video cannot be decoded, or is shorter than its list says.
        """
        count, where = int(self.clips.frames[index]), self.clips.where(index)
        numbers = [
            number
            for offset in offsets
            for number in clip_frames(offset, count, clip.seq_length, clip.sample_rate)
        ]
        if self.read_mode == "img":
            found = folder_frames(self.clips.root / self.clips.name(index), numbers, where, each)
        else:
            found = self.decoder.frames(self.clips.file(index), numbers, where, each)
        frames = [found[number] for number in numbers]
        if len({frame.shape for frame in frames}) > 1:
            raise BadSample("corrupt", where, "the size of the frames changes")
        return torch.stack(frames)


@dataclass
class ClipSet:
    """One split of a video data set; see :class:`common.data.loader.DrawDataset`."""

    videos: Videos
    clip: ClipConfig
    seed: int
    training: bool

    def row(self, draw: Draw) -> Row:
        """The clips (segments, 3, T, size, size) uint8 of a video, and its label.

        An unreadable video is named in the row. In training its place is taken by the next readable one of the
        list, in evaluation it keeps its place and counts as wrong.
        """
        unreadable: list[Unreadable] = []
        for offset in range(len(self.videos)):
            index = (draw.sample + offset) % len(self.videos)
            try:
                with seeded(self.seed, draw):
                    clips = self._train_clips(index) if self.training else self._test_clips(index)
                return Row(clips, int(self.videos.clips.labels[index]), tuple(unreadable))
            except BadSample as bad:
                unreadable.append(
                    Unreadable(bad.where, bad.reason, bad.detail, self.videos.clips.shard(index))
                )
                if not self.training:
                    return Row(self.filler().inputs, UNREADABLE, tuple(unreadable))
        raise RuntimeError("no video of the list can be read")

    def filler(self) -> Row:
        """A row that only fills up a batch."""
        clip = self.clip
        shape = (clip.num_segments, 3, clip.seq_length, clip.size, clip.size)
        return Row(torch.zeros(shape, dtype=torch.uint8), FILLER)

    def _train_clips(self, index: int) -> Tensor:
        clip, count = self.clip, int(self.videos.clips.frames[index])
        offsets = train_offsets(count, clip.num_segments, clip.seq_length, clip.sample_rate)
        frames = self.videos.segments(index, offsets, clip)
        height, width = frames.shape[-2:]
        frames = cut(frames, multi_scale_box(height, width, clip.scales))
        frames = resize(frames, clip.size, clip.size)
        if random.random() < clip.hflip:
            frames = frames.flip(-1)
        return stack_segments(frames, clip.num_segments)

    def _test_clips(self, index: int) -> Tensor:
        clip, count = self.clip, int(self.videos.clips.frames[index])
        offsets = test_offsets(count, clip.num_segments, clip.seq_length, clip.sample_rate)
        frames = self.videos.segments(index, offsets, clip, shorter(clip.short_side))
        height, width = frames.shape[-2:]
        frames = cut(frames, centre_box(height, width, clip.size))
        return stack_segments(frames, clip.num_segments)


def shorter(side: int) -> Each:
    """What makes a frame's shorter side ``side`` pixels as soon as it is decoded."""
    return lambda frame: resize_shorter(frame[None], side)[0]


def stack_segments(frames: Tensor, segments: int) -> Tensor:
    """(segments · T, 3, H, W) → (segments, 3, T, H, W), contiguous."""
    return frames.unflatten(0, (segments, -1)).transpose(1, 2).contiguous()


def open_videos(data: VideoDataConfig, split: Literal["train", "val"]) -> Videos:
    """Open the list of a split.

    Raises:
        DataError: the folder, ``classes.txt`` or the list is missing, or a line is wrong.
        ConfigError: what the decoder needs is not there.
    """
    path = local_path(data.path)
    if not path.is_dir():
        raise DataError(f"data: {str(path)!r} is not an existing folder")
    classes = read_classes(path)
    file = path / (data.train if split == "train" else data.val)
    form = "list" if data.read_mode == "img" else data.format
    clips = open_clips(file, Path(data.root) if data.root else path, classes, form)
    decoder = make_decoder(data.decoder, data.decode_seconds, data.decode_threads)
    return Videos(clips, classes, data.read_mode, decoder)
