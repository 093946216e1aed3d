"""Clips in WebDataset shards: ``{split}-000000.tar`` with members ``KEY.json`` and ``KEY.mp4``, read by index.

Beside them stand the shards' indexes and manifest (see :mod:`common.data.shards`), ``classes.txt``, and the list
``{split}.txt`` of what the clips were made of, a line a clip, in the shards' order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data.shards import Member, open_shards, read_member
from common.data.source import DataError, Names, digest, safe_name
from common.data.video.lists import ClipList, read_list
from common.files import RandomReads


@dataclass
class ClipShards(ClipList):
    """The clips of a list, in shards beside it.

    Args:
        files: the shards.
        members: the videos' names in them.
        places: (n, 3) shard, offset and size of each video.
        made: what tells videos that were encoded anew from the list's own.
    """

    files: RandomReads
    members: Names
    places: np.ndarray
    made: str

    def file(self, index: int) -> bytes:
        """The clip's video.

        Raises:
            BadSample: it cannot be read, or its shard is damaged there.
        """
        shard, offset, size = self.places[index].tolist()
        key, _, ending = self._member(index).partition(".")
        return read_member(self.files, shard, Member(key, ending, offset, size), self.where(index))

    def where(self, index: int) -> str:
        """Shard and member, for messages."""
        return f"{self.shard(index)}: {self._member(index)}"

    def shard(self, index: int) -> str:
        """The tar file."""
        return self.files.paths[int(self.places[index, 0])].name

    def fingerprint(self) -> str:
        """As the list's, where the videos are the list's own."""
        return digest(super().fingerprint(), self.made) if self.made else super().fingerprint()

    def _member(self, index: int) -> str:
        return os.fsdecode(self.members[index])


def open_clips(path: Path, root: Path, classes: Sequence[str], form: str = "auto") -> ClipList:
    """The clips of the list at ``path``: the files below ``root`` that it names, or those of shards beside it.

    Args:
        form: ``list``, ``webdataset``, or ``auto`` for the shards if there are any.

    Raises:
        DataError: a line is wrong, or shards and list do not fit together.
    """
    there = any(path.parent.glob(f"{path.stem}-[0-9]*.tar")) if path.parent.is_dir() else False
    if form == "webdataset" and not there:
        raise DataError(
            f"{path.parent}: no webdataset data of {path.stem!r}: expected {path.stem}-000000.tar"
        )
    clips = read_list(path, root, len(classes))
    return _in_shards(clips, classes) if there and form != "list" else clips


def _in_shards(clips: ClipList, classes: Sequence[str]) -> ClipShards:
    root, split = clips.path.parent, clips.path.stem
    shards, checksums = open_shards(root, split, classes, _video)
    videos = [member for _, members in shards for member in members]
    rows = [(n, *member[2:]) for n, (_, members) in enumerate(shards) for member in members]
    if len(videos) != len(clips):
        raise DataError(f"{clips.path} has {len(clips)} clips, the shards beside it have {len(videos)}")
    for index, member in enumerate(videos):
        if not member.key.endswith(f"-{_key_name(clips.name(index))}"):
            line = f"{clips.path}:{clips.lines[index]} {clips.name(index)}"
            raise DataError(f"{line}: this place in the shards has {member.name}")
    encoded = Names(os.fsencode(member.name) for member in videos)
    places = np.array(rows, np.int64).reshape(-1, 3)
    files = RandomReads([path for path, _ in shards])
    made = "\n".join(checksums) if _encoded_anew(root / f"{split}.json") else ""
    return ClipShards(**vars(clips), files=files, members=encoded, places=places, made=made)


def _video(members: list[Member], tar: Path) -> Member:
    key = members[0].key
    about = [member for member in members if (member.key, member.ext) == (key, "json")]
    others = [member for member in members if member.key == key and member.ext != "json"]
    if len(about) != 1 or len(others) != 1:
        names = ", ".join(member.name for member in members[:6])
        raise DataError(f"{tar}: expected one video and one .json of the same key in a sample, found {names}")
    return others[0]


def _key_name(name: str) -> str:
    return safe_name(Path(name).stem)


def _encoded_anew(manifest: Path) -> bool:
    settings = json.loads(manifest.read_bytes()).get("settings") if manifest.exists() else None
    return isinstance(settings, dict) and settings.get("resize") is not None
