"""Every kind of picture comes out as upright 8-bit RGB or is refused by name."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from common.data import decode
from common.data.decode import decode_rgb
from common.data.source import BadSample
from tests.common.data.forms import damage, few_digits


def picture(width: int = 48, height: int = 32) -> Image.Image:
    """A smooth picture whose corners differ."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - (x + y) / 2], axis=-1).round().astype(np.uint8))


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode_rgb(data, "here")
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


RGB = np.asarray(picture()).astype(int)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])  # the bytes count, not the file's name
def test_lossless_formats_come_out_exactly(format: str) -> None:
    assert (pixels(encode(picture(), format)) == RGB).all()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}])
def test_jpeg(options: dict) -> None:
    data = encode(picture(), "JPEG", quality=95, **options)
    assert (pixels(data) == np.asarray(Image.open(io.BytesIO(data)))).all()
    assert abs(pixels(data) - RGB).max() < 24


def test_webp_and_first_frame_of_a_gif() -> None:
    assert (pixels(encode(picture(), "WEBP", lossless=True)) == RGB).all()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    gif = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(gif) == (255, 0, 0)).all()


def test_grey_is_repeated() -> None:
    grey = picture().convert("L")
    expected = np.repeat(np.asarray(grey)[..., None], 3, axis=-1)
    assert (pixels(encode(grey, "PNG")) == expected).all()
    assert abs(pixels(encode(grey, "JPEG", quality=95)) - expected).max() < 12
    one_bit = pixels(encode(grey.convert("1"), "PNG"))
    assert set(np.unique(one_bit)) == {0, 255}


def test_cmyk() -> None:
    data = encode(picture().convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert abs(pixels(data) - RGB).max() < 24


def test_palette_with_and_without_transparency() -> None:
    palette = picture().quantize(64)
    expected = np.asarray(palette.convert("RGB")).astype(int)
    assert (pixels(encode(palette, "PNG")) == expected).all()
    assert (pixels(encode(palette, "PNG", transparency=3)) == expected).all()
    assert (pixels(encode(palette, "PNG", transparency=bytes(range(64)))) == expected).all()


def test_alpha_is_dropped() -> None:
    rgba = picture()
    rgba.putalpha(picture().convert("L"))
    assert (pixels(encode(rgba, "PNG")) == RGB).all()
    grey = picture().convert("LA")
    grey.putalpha(17)
    assert (pixels(encode(grey, "PNG"))[..., 0] == np.asarray(picture().convert("L"))).all()


def png16(samples: np.ndarray, colour: int) -> bytes:
    """A 16-bit PNG: grey (colour 0) or RGB (colour 2)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_of_16_bits_the_upper_8_are_kept() -> None:
    values = np.linspace(0, 65535, 48 * 32).round().astype(np.uint16).reshape(32, 48)
    expected = np.repeat((values >> 8)[..., None], 3, axis=-1)
    assert (pixels(png16(values, 0)) == expected).all()
    assert (pixels(png16(expected.astype(np.uint16) * 257, 2)) == expected).all()
    for mode in ("I;16", "I"):
        tiff = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
        assert (pixels(encode(tiff, "TIFF")) == expected).all()


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda image: image),
        (2, lambda image: image[:, ::-1]),
        (3, lambda image: image[::-1, ::-1]),
        (4, lambda image: image[::-1]),
        (5, lambda image: image.transpose(1, 0, 2)),
        (6, lambda image: np.rot90(image, -1)),
        (7, lambda image: np.rot90(image, 2).transpose(1, 0, 2)),
        (8, lambda image: np.rot90(image, 1)),
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation(orientation: int, turn, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encode(picture(), format, exif=exif)
    plain = pixels(encode(picture(), format))
    assert (pixels(stored) == turn(plain)).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_ignored() -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0"):
        data = encode(picture(), "JPEG", exif=exif)
        assert decode_rgb(data, "here").size == (48, 32)


def test_min_side_decodes_smaller_but_never_below() -> None:
    data = encode(picture(480, 320), "JPEG")
    sizes = {side: decode_rgb(data, "here", min_side=side).size for side in (320, 161, 160, 80, 40, 10)}
    assert sizes == {
        320: (480, 320),
        161: (480, 320),
        160: (240, 160),
        80: (120, 80),
        40: (60, 40),
        10: (60, 40),
    }
    assert decode_rgb(encode(picture(480, 320), "PNG"), "here", min_side=10).size == (480, 320)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_truncated(format: str) -> None:
    data = encode(picture(), format)
    for keep in (len(data) * 3 // 4, len(data) // 2, 30, 12):
        with pytest.raises(BadSample) as raised:
            decode_rgb(data[:keep], "here")
        assert raised.value.where == "here"
        assert raised.value.reason in (
            ("truncated",) if format in ("JPEG", "PNG") else ("truncated", "unreadable")
        )
    with pytest.raises(BadSample, match="truncated"):
        decode_rgb(b"", "here")


@pytest.mark.parametrize(
    "data", [b"hello", b"\0" * 100, b"<html>404</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF"]
)
def test_not_an_image(data: bytes) -> None:
    with pytest.raises(BadSample, match="not an image"):
        decode_rgb(data, "here")


@pytest.mark.filterwarnings("ignore")  # Pillow warns before it raises
def test_bombs_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def claims(width: int, height: int) -> bytes:
        data = bytearray(png16(np.zeros((1, 1)), 0))
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        return bytes(data)

    for width, height in ((10_000, 9_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(BadSample, match="too large"):
            decode_rgb(claims(width, height), "here")
    monkeypatch.setattr(decode, "MAX_PIXELS", 48 * 32 - 1)
    with pytest.raises(BadSample, match=r"48 × 32 pixels, the limit is 1535"):
        decode_rgb(encode(picture(), "PNG"), "here")


def test_values_without_a_range_are_refused() -> None:
    with pytest.raises(BadSample, match="wrong channels: mode F"):
        decode_rgb(encode(picture().convert("F"), "TIFF"), "here")


@pytest.mark.filterwarnings("ignore")
def test_any_damage_gives_an_image_or_a_typed_error() -> None:
    draw = random.Random(3)
    originals = [encode(picture(), name) for name in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM")]
    originals.append(encode(picture(), "JPEG", progressive=True))
    originals.append(few_digits(1)[0][1])
    refused: list[str] = []
    for _ in range(400):
        data = damage(draw.choice(originals), draw)
        try:
            assert decode_rgb(data, "here").mode == "RGB"
        except BadSample as bad:
            refused.append(str(bad))
    assert 100 < len(refused) < 400
    assert "\n" not in "".join(refused)
