"""What decides the bytes that are written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from common.data.forms import FORMS
from common.errors import ConfigError

DEFAULT_QUALITY = 95
"""im2rec's, where images are resized and no quality is asked for."""


@dataclass(frozen=True)
class Settings:
    """How a data set is written. The same samples and settings give the same bytes.

    Raises:
        ConfigError: a value out of range, or one that this form has no use for.
    """

    format: str
    """``folder``, ``recordio`` or ``webdataset``."""
    resize: int | None = None
    """The shorter side in pixels; smaller images are enlarged, as im2rec does."""
    quality: int | None = None
    """Compress as JPEG of this quality, 1 to 100. With neither this nor ``resize`` the original bytes are kept."""
    check: bool = False
    """Decode every image whose bytes are kept, and leave out those that cannot be."""
    shuffle: int | None = None
    """Seed of the order; the source's order without one."""
    parts: int = 1
    """Number of ``.rec`` files of a split."""
    shard_mb: int = 256
    """Megabytes (2²⁰ bytes) at which a shard is full."""
    shard_samples: int = 10_000
    """Samples at which a shard is full."""

    def __post_init__(self) -> None:
        if self.format not in FORMS:
            raise ConfigError(f"format: {self.format!r} is not one of {', '.join(FORMS)}")
        bounds = {
            "resize": (self.resize, 1, 8192),
            "quality": (self.quality, 1, 100),
            "shuffle": (self.shuffle, 0, 2**63 - 1),
            "parts": (self.parts, 1, 10_000),
            "shard-size": (self.shard_mb, 1, 1 << 20),
            "shard-samples": (self.shard_samples, 1, 10**9),
        }
        for name, (value, low, high) in bounds.items():
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name}: {value} is not between {low} and {high}")

    @property
    def reencodes(self) -> bool:
        """Whether images are compressed anew."""
        return self.resize is not None or self.quality is not None

    @property
    def jpeg_quality(self) -> int:
        """The quality images are compressed with, if they are."""
        return self.quality or DEFAULT_QUALITY

    def as_dict(self) -> dict[str, Any]:
        """The settings that have an effect on this form."""
        values = asdict(self) | {"quality": self.jpeg_quality if self.reencodes else None}
        useless = {"recordio": {"shard_mb", "shard_samples"}, "webdataset": {"parts"}}
        return {
            name: value
            for name, value in values.items()
            if name not in useless.get(self.format, {"shard_mb", "shard_samples", "parts"})
        }
