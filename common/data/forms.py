"""The forms that a data set can have in a folder, and opening it in the one that is there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from common.data.folder import FolderSource
from common.data.recordio import RecordioSource
from common.data.remote import open_remote
from common.data.shards import ShardSource
from common.data.source import Cache, DataError, Source, local_path

FORMS = {
    "folder": "{split}/CLASS/*.jpg",
    "recordio": "{split}.rec or {split}_0.rec",
    "webdataset": "{split}-000000.tar",
}


def open_source(path: str | Path, split: str, format: str = "auto", cache: Cache | None = None) -> Source:
    """Open one split of the data set in the folder ``path``.

    Args:
        path: a folder: PATH/{train,val}/CLASS/*.jpg, PATH/{split}.rec with .idx, or PATH/{split}-*.tar; the last
            also on a server, as ``https://``, ``http://`` or ``s3://``.
        split: ``train`` or ``val``, or however the files are called.
        format: ``folder``, ``recordio``, ``webdataset``, or ``auto`` for the one that is there.
        cache: where the shards of a server are kept.

    Raises:
        DataError: nothing is there, it is incomplete, or not in this form.
    """
    if not re.fullmatch(r"[\w-]+", split):
        raise DataError(f"split: {split!r} is not a name such as 'train' or 'val'")
    if format != "auto" and format not in FORMS:
        raise DataError(f"format: {format!r} is not one of auto, {', '.join(FORMS)}")
    if re.match("(?:https?|s3)://", str(path), re.IGNORECASE):
        return _open_remote(str(path), split, format, cache or Cache())
    root = local_path(path)
    try:
        if not root.is_dir():
            raise DataError(f"data: {str(root)!r} is not an existing folder")
        form = find_form(root, split, format)
        openers: dict[str, Callable[[Path, str], Source]] = {
            "folder": FolderSource,
            "recordio": RecordioSource,
            "webdataset": ShardSource,
        }
        source = openers[form](root, split)
    except OSError as error:
        raise DataError(f"{os.fsdecode(error.filename or root)}: {error.strerror or error}") from None
    if len(source) == 0:
        raise DataError(f"{root}: split {split!r} ({form}) holds no samples")
    return source


def _open_remote(url: str, split: str, format: str, cache: Cache) -> Source:
    if format not in ("auto", "webdataset"):
        raise DataError(
            f"data: {url!r}: {format} is read from local folders only; expected webdataset shards"
        )
    return open_remote(url, split, cache)


def forms_there(root: Path, split: str) -> list[str]:
    """The forms in which the folder ``root`` has the split."""
    names = os.listdir(root)
    patterns = {"recordio": rf"{split}(_\d+)?\.rec", "webdataset": rf"{split}-\d+\.tar"}
    there = [form for form, pattern in patterns.items() if any(re.fullmatch(pattern, name) for name in names)]
    return ["folder", *there] if (root / split).is_dir() else there


def find_form(root: Path, split: str, format: str = "auto") -> str:
    """The form in which the folder ``root`` has the split.

    Raises:
        DataError: it has none, not ``format``, or several.
    """
    names, there = os.listdir(root), forms_there(root, split)
    if format in there:
        return format
    found = ", ".join(sorted(names)[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
    if format == "auto" and len(there) == 1:
        return there[0]
    if format == "auto" and there:
        raise DataError(f"{root}: split {split!r} is there as {' and '.join(there)}; name one as the format")
    wanted = FORMS.values() if format == "auto" else [FORMS[format]]
    what = "data" if format == "auto" else f"{format} data"
    expected = " or ".join(wanted).format(split=split)
    raise DataError(
        f"{root}: no {what} of split {split!r}: expected {expected}; there is {found or 'nothing'}"
    )
