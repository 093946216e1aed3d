"""Pictures of what a video network attends to, with the command of the docs on a real run."""

import sys

import pytest

from common.errors import UserError
from tests.processes import run
from video import visualize

pytestmark = pytest.mark.xdist_group("video")


def test_every_frame_and_the_temporal_matrix_are_drawn(reference, digits):
    videos = [path for path in sorted(digits.rglob("*")) if path.suffix in (".mp4", ".mkv", ".avi", ".webm")]
    done = run("video/visualize.py", reference, videos[0])
    assert done.returncode == 0, done.stderr[-2000:]
    folder = reference / "attention"
    page = (folder / "index.html").read_text()
    assert "temporal matrix" in page
    assert all(f"frame {frame}" in page for frame in range(4))
    assert len(list(folder.glob("*.png"))) == page.count("<img") - 1


def test_what_is_not_a_video_is_named(reference, tmp_path, monkeypatch):
    (tmp_path / "no.mp4").write_bytes(b"no video")
    monkeypatch.setattr(sys, "argv", ["visualize.py", str(reference), str(tmp_path / "no.mp4")])
    with pytest.raises(UserError, match="cannot be read as a video"):
        visualize.main()
