"""A list's clips written as WebDataset shards; see :mod:`common.data.video.shards`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data.prepare.convert import Kind, convert
from common.data.prepare.feed import Item, Progress
from common.data.prepare.settings import Settings
from common.data.shard_writer import Parts
from common.data.shards import read_index, read_member
from common.data.source import BadSample, read_file
from common.data.video.decode import Decoder
from common.data.video.encode import reencode
from common.data.video.lists import Clip, ClipList, write_list
from common.data.video.probe import VIDEO_ENDINGS
from common.errors import ConfigError
from common.files import RandomReads


@dataclass(frozen=True)
class ClipSettings(Settings):
    """How clips are written. The same clips and settings give the same bytes."""

    format: str = "webdataset"
    resize: int | None = None
    """Encode anew, with a shorter side of this many pixels; smaller videos keep their size."""
    crf: int = 20
    """x264's quality, 0 to 51, where videos are encoded anew; less is better and larger."""
    seconds: float = 60.0
    """Time limit of one video."""

    def __post_init__(self) -> None:
        if self.resize is not None and not 16 <= self.resize <= 8192:
            raise ConfigError(f"short-side: {self.resize} is not between 16 and 8192")
        super().__post_init__()
        if not 0 <= self.crf <= 51:
            raise ConfigError(f"crf: {self.crf} is not between 0 and 51")

    def as_dict(self) -> dict[str, Any]:
        """The settings that have an effect."""
        names = ("format", "resize", "check", "shuffle", "shard_mb", "shard_samples")
        return {name: getattr(self, name) for name in names} | ({"crf": self.crf} if self.resize else {})


@dataclass
class ClipSource:
    """The clips of a list as they are stored; see :class:`common.data.source.Source`."""

    clips: ClipList
    classes: tuple[str, ...]
    settings: ClipSettings

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, index: int) -> tuple[bytes, int]:
        """The video's bytes, and its label.

        Raises:
            BadSample: it cannot be read, or has another number of frames than the list says.
        """
        where, said = self.where(index), int(self.clips.frames[index])
        file = self.clips.file(index)
        data = file if isinstance(file, bytes) else read_file(file, where)
        frames = Decoder(self.settings.seconds).length(data, where)
        if frames != said:
            raise BadSample("wrong frame count", where, f"the list says {said}, there are {frames}")
        return data, int(self.clips.labels[index])

    def where(self, index: int) -> str:
        """List, line and path."""
        return self.clips.where(index)

    def shard(self, index: int) -> str:
        """The list, or the tar file."""
        return self.clips.shard(index)

    def name(self, index: int) -> str:
        """The file's name without its ending."""
        return Path(self.clips.name(index)).stem

    def fingerprint(self) -> str:
        """Of the list."""
        return self.clips.fingerprint()


def write_clip_shards(
    lists: Mapping[str, ClipList],
    classes: tuple[str, ...],
    out: str | Path,
    settings: ClipSettings,
    max_unreadable: float = 0.01,
    workers: int = 1,
    progress: Progress | None = None,
) -> bool:
    """Write the clips of lists, by split, as shards with their lists; see :func:`convert`."""
    sources = {split: ClipSource(clips, classes, settings) for split, clips in lists.items()}
    kind = Kind(encode_clip, clip_parts, write_shards_list)
    return convert(sources, out, settings, max_unreadable, workers, progress, kind)


def encode_clip(data: bytes, where: str, settings: ClipSettings) -> bytes:
    """What is stored of a video: itself, or encoded anew; raises :class:`BadSample`."""
    decoder = Decoder(settings.seconds)
    if settings.resize:
        return reencode(data, settings.resize, settings.crf, where, decoder)
    if settings.check:
        decoder.check(data, where)
    return data


def clip_parts(source: ClipSource, index: int, item: Item) -> Parts:
    """The files of a clip: what is known of it, and the video."""
    name, frames = source.clips.name(index), int(source.clips.frames[index])
    about = {"path": name, "frames": frames, "label": item.label, "class": source.classes[item.label]}
    suffix = Path(name).suffix.lower()
    ending = suffix[1:] if suffix in VIDEO_ENDINGS and not source.settings.resize else "mp4"
    return sorted([("json", json.dumps(about).encode()), (ending, item.data)])


def write_shards_list(folder: Path, split: str) -> None:
    """Write the list of a split's shards, from what they say of each clip."""
    paths = sorted(folder.glob(f"{split}-*.tar"))
    files = RandomReads(paths)
    rows: list[Clip] = []
    for shard, path in enumerate(paths):
        for members in read_index(path):
            member = next(member for member in members if member.ext == "json")
            about = json.loads(read_member(files, shard, member, path.name))
            rows.append((about["path"], about["frames"], about["label"]))
    write_list(folder / f"{split}.txt", rows)
