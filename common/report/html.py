"""One self-contained HTML page: pictures inside it, everything from data escaped, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from common.files import atomic_write

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }
img { max-width: 100%; } figure { margin: 1rem 0; } figcaption { color: #555; }
table { border-collapse: collapse; } td, th { border: 1px solid #ccc; padding: .15rem .5rem; text-align: left; }
pre { background: #f5f5f5; overflow: auto; padding: .6rem; } .samples { display: flex; flex-wrap: wrap; gap: 1rem; }
.samples figure { margin: 0; width: 8rem; } .samples img { width: 8rem; image-rendering: pixelated; }
"""


def write_page(path: Path, title: str, parts: Iterable[str]) -> Path:
    """Write a page of ``parts``, each HTML already; returns its path."""
    head = (
        f'<meta charset="utf-8"><title>{escape(title)}</title><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style>"
    )
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    with atomic_write(path) as file:
        file.write(
            f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'.encode()
        )
    return path


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def folded(title: str, text: str) -> str:
    """Text as it is, behind a title that opens it."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table of plain texts."""
    lines = ["".join(f"<th>{escape(str(cell))}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def picture(png: bytes, caption: str) -> str:
    """A PNG with its caption."""
    data = base64.b64encode(png).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def samples(pictures: Iterable[tuple[bytes, str]]) -> str:
    """Small pictures side by side."""
    return f'<div class="samples">{"".join(picture(*each) for each in pictures)}</div>'


def png_of(figure: Figure, dpi: int = 100) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
