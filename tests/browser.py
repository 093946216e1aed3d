"""A page in a real browser: headless Chromium, where it is there or apt-get can install it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

CHECK = """<script>
document.documentElement.dataset.seen = JSON.stringify({
  widths: [...document.images].map(image => image.naturalWidth),
  scripts: document.scripts.length, text: document.body.innerText});
</script>"""


def chromium() -> str:
    """Its path; skips the test where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return name
    install = "apt-get update && apt-get install -y --no-install-recommends chromium"
    done = subprocess.run(install, shell=True, capture_output=True, text=True, timeout=300)
    if done.returncode or not shutil.which("chromium"):
        pytest.skip(f"no Chromium, and apt-get cannot install it: {done.stderr.strip()[-200:]}")
    return "chromium"


def seen_in(page: Path, scratch: Path) -> dict:
    """What a browser without network shows: ``widths`` of the pictures, ``text``, ``scripts``, ``console``."""
    copy = scratch / "checked.html"
    copy.write_text(page.read_text().replace("</body>", f"{CHECK}</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={scratch / 'chromium'}"]
    done = subprocess.run(
        [chromium(), *flags, *offline, copy.as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    seen: dict = json.loads(unescape(found[1]))
    return seen | {"console": [line for line in done.stderr.splitlines() if "CONSOLE" in line]}
