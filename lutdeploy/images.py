"""From tensors in [−1, 1] to pictures: PNG, grids, GIF."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def to_uint8(images: NDArray[np.floating[Any]]) -> Pixels:
    """Images [..., C, S, S] in [−1, 1] (clipped) to uint8 [..., S, S, C]."""
    scaled = np.clip(images, -1, 1) * 127.5 + 127.5
    return np.moveaxis(np.rint(scaled).astype(np.uint8), -3, -1)


def _picture(pixels: Pixels) -> Image.Image:
    """uint8 [H, W, C] with one, three or four channels."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def encode_png(pixels: Pixels) -> bytes:
    """Encode uint8 [H, W, C] as PNG; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    _picture(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> Pixels:
    """Decode a PNG file to uint8 [H, W, C]."""
    with Image.open(io.BytesIO(data)) as file:
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
