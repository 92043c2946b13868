"""From tensors in [−1, 1] to pictures: PNG, grids, GIF."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

Pixels = NDArray[np.uint8]

PNG_COLOURS = {1: 0, 3: 2, 4: 6}  # channels → colour type: grey, RGB, RGBA
PNG_AVERAGE = 3  # the filter that subtracts ⌊(left + above) / 2⌋
MEMORY_LEVEL = 9  # of zlib: the most that it may use, which is fastest


def to_uint8(images: NDArray[np.floating[Any]]) -> Pixels:
    """Images [..., C, S, S] in [−1, 1] (clipped) to uint8 [..., S, S, C]."""
    scaled = np.clip(images, -1, 1) * 127.5 + 127.5
    return np.moveaxis(np.rint(scaled).astype(np.uint8), -3, -1)


def _picture(pixels: Pixels) -> Image.Image:
    """uint8 [H, W, C] with one, three or four channels."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


class _PngBuffer(io.BytesIO):
    """By its name Pillow knows what to write; asked for a format, it first loads several others."""

    name = "picture.png"


def encode_png(pixels: Pixels, texts: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """Encode uint8 [H, W, C] as PNG, with texts by keyword; the same give the same bytes."""
    buffer, told = _PngBuffer(), PngImagePlugin.PngInfo()
    for keyword, text in texts.items():
        told.add_text(keyword, text)
    _picture(pixels).save(buffer, pnginfo=told)
    return buffer.getvalue()


def encode_pictures(pixels: Pixels, texts: Sequence[bytes] | None = None) -> list[bytes]:
    """Encode uint8 [n, H, W, C], C 1, 3 or 4, as n PNGs, fast; equal pixels give equal bytes.

    ``texts`` are chunks of :func:`text_chunk` for each of them.

    Where all that matters is that many small photographs are written soon. Every row has the
    filter "average", found for all pictures at once, and zlib codes the differences without
    looking for repeats, which such pictures do not have. It computes outside Python's lock, so
    that threads encode beside one another. PNG's third edition: https://www.w3.org/TR/png-3/.
    """
    n, height, width, channels = pixels.shape
    around = np.zeros(pixels.shape, np.uint16)
    around[:, :, 1:] = pixels[:, :, :-1]
    around[:, 1:] += pixels[:, :-1]
    rows = np.empty((n, height, 1 + width * channels), np.uint8)
    rows[:, :, 0] = PNG_AVERAGE
    rows[:, :, 1:] = (pixels - (around >> 1).astype(np.uint8)).reshape(n, height, -1)
    start = b"\x89PNG\r\n\x1a\n" + _chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 8, PNG_COLOURS[channels], 0, 0, 0)
    )
    end = _chunk(b"IEND", b"")
    return [
        start + text + _chunk(b"IDAT", _huffman(picture.tobytes())) + end
        for text, picture in zip(texts or [b""] * n, rows, strict=True)
    ]


def text_chunk(keyword: str, text: str) -> bytes:
    """A chunk tEXt of a PNG file, whose texts are Latin-1."""
    return _chunk(b"tEXt", keyword.encode("latin-1") + b"\0" + text.encode("latin-1"))


def _chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file: length, kind, data, CRC."""
    check = zlib.crc32(data, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(data)), kind, data, struct.pack(">I", check)))


def _huffman(rows: bytes) -> bytes:
    """A zlib stream whose bytes are coded one by one, without looking for repeats."""
    stream = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, MEMORY_LEVEL, zlib.Z_HUFFMAN_ONLY)
    return stream.compress(rows) + stream.flush()


def decode_png(png: bytes | Path) -> Pixels:
    """What :func:`encode_png` encoded; pictures of others are read by :mod:`lutdeploy.decoding`."""
    with Image.open(png if isinstance(png, Path) else io.BytesIO(png)) as file:
        pixels = np.asarray(file, np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def encode_gif(frames: Sequence[Pixels], seconds: float = 4.0) -> bytes:
    """Encode uint8 [H, W, C] frames as an endless GIF that shows the last one for a second."""
    durations = [max(20, int(1000 * seconds / len(frames)))] * (len(frames) - 1) + [1000]
    first, *others = [_picture(frame) for frame in frames]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return buffer.getvalue()


def grid(pixels: Pixels, columns: int | None = None, gap: int = 0) -> Pixels:
    """Tile uint8 [n, H, W, C] row by row into one picture; empty places and gaps are black.

    By default it is about square, and up to half as wide again where that leaves no place empty.
    """
    n, height, width, channels = pixels.shape
    square = math.ceil(math.sqrt(n))
    full = (wide for wide in range(square, square * 3 // 2 + 1) if n % wide == 0)
    columns = columns or next(full, square)
    rows = math.ceil(n / columns)
    sheet = np.zeros((rows * columns, height + gap, width + gap, channels), np.uint8)
    sheet[:n, :height, :width] = pixels
    sheet = sheet.reshape(rows, columns, height + gap, width + gap, channels)
    sheet = sheet.swapaxes(1, 2).reshape(rows * (height + gap), columns * (width + gap), channels)
    return sheet[: sheet.shape[0] - gap, : sheet.shape[1] - gap]


def enlarge(pixels: Pixels, factor: int) -> Pixels:
    """Each pixel of uint8 [H, W, C] as a square of ``factor`` pixels."""
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def trajectory_rows(states: Sequence[NDArray[np.float32]], every: int = 4) -> Pixels:
    """The post's picture: images side by side, the noise on top, every fourth step below.

    Args:
        states: x after 0, 1, … steps, each [n, C, S, S] in [−1, 1].
        every: show every how many-th step; the last one is always shown.
    """
    kept = [state for k, state in enumerate(states) if k % every == 0 or k == len(states) - 1]
    return grid(to_uint8(np.concatenate(kept)), columns=len(states[0]))


def lut_sheet(entries: NDArray[np.float32], factor: int = 4) -> Pixels:
    """Draw LUT entries [K, C, P, P] as tiles, each scaled by its own largest magnitude."""
    peaks = np.abs(entries).max(axis=(1, 2, 3), keepdims=True)
    return enlarge(grid(to_uint8(entries / np.where(peaks, peaks, 1)), gap=1), factor)


def gram_picture(entries: NDArray[np.float32], side: int = 512) -> Pixels:
    """Draw the Gram matrix L·Lᵀ of LUT entries [K, C, P, P]: red positive, blue negative."""
    flat = entries.reshape(len(entries), -1)  # [K, C·P·P]
    gram = flat @ flat.T  # [K, K]
    signed = gram / (float(np.abs(gram).max()) or 1.0)
    positive, negative = np.clip(signed, 0, 1), np.clip(-signed, 0, 1)
    rgb = np.stack([1 - negative, 1 - positive - negative, 1 - positive], axis=-1)
    return enlarge(np.rint(rgb * 255).astype(np.uint8), max(1, side // len(gram)))
