"""A picture file as pixels, as a viewer shows them: every picture that is read goes through here.

Upright, in sRGB, on white, 8 bits, the first frame. Where that cannot be, a remark says what was
done instead; whoever reads a folder adds the file's name.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, _imaging, features

from lutdeploy.errors import ran_out_of_memory

# Kinds of files by Pillow's name, and how their names end. Others that Pillow opens are left
# out: vector graphics, which start other programs, and files without a signature.
SUFFIXES = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "QOI": (".qoi",),
}
OPTIONAL = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # that Pillow may lack

ORIENTATION = 0x0112  # of EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags, and a value
GREY_MODES = ("1", "L", "LA", "La")
DEEP_MODES = ("I", "F")  # and all whose name begins with the former
SAME_LEVELS = 2  # a profile that moves no colour by more is sRGB, written by another hand

PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = (b"tRNS", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"eXIf")  # that decide how it looks


@dataclass(frozen=True)
class Picture:
    """A decoded file."""

    image: Image.Image  # "L" for grey, else "RGB"
    size: tuple[int, int]  # width and height in the file; ``image`` may be smaller
    remarks: tuple[str, ...]  # where it is not what a viewer shows

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [H, W, C], C 1 or 3."""
        pixels = np.asarray(self.image, np.uint8)
        return pixels[..., None] if pixels.ndim == 2 else pixels


@cache
def formats() -> tuple[str, ...]:
    """The kinds of files that are read, as far as this Pillow knows them."""
    Image.init()
    known = (name for name in SUFFIXES if name in Image.OPEN)
    return tuple(name for name in known if name not in OPTIONAL or features.check(OPTIONAL[name]))


@cache
def suffixes() -> frozenset[str]:
    """How the names of picture files end, in lower case."""
    return frozenset(suffix for name in formats() for suffix in SUFFIXES[name])


def decode(data: bytes, side: int | None = None) -> Picture:
    """Decode a picture file.

    Args:
        data: the file.
        side: a JPEG may be decoded at a reduced scale, with twice so many pixels on each side.

    Raises:
        Exception: of almost any kind, as Pillow's decoders do on bad bytes.
    """
    with _listening() as heard:
        try:
            picture = _decode(data, side)
        except Exception as error:
            if ran_out_of_memory(error):
                raise
            bare = _without_metadata(data)
            if bare == data:
                raise
            heard.clear()
            picture = _decode(bare, side)
            heard.append("damaged metadata is left out")
    return Picture(picture.image, picture.size, tuple(dict.fromkeys([*picture.remarks, *heard])))


def _decode(data: bytes, side: int | None) -> Picture:
    with Image.open(io.BytesIO(data), formats=formats()) as file:
        size, profile, remarks = file.size, file.info.get("icc_profile"), []
        if getattr(file, "is_animated", False) and file.format != "MPO":
            remarks.append("only the first frame is read")
        if side is not None:
            file.draft("RGB", (2 * side, 2 * side))
        file.load()
        image: Image.Image = file
        try:
            turn = TURNS.get(file.getexif().get(ORIENTATION, 1))
        except Exception:  # EXIF is parsed as TIFF, which fails in as many ways
            turn = None
            remarks.append("damaged EXIF data: taken as it lies")
        if turn is not None:
            image = image.transpose(turn)
        if image.mode.startswith(DEEP_MODES):
            image = _eight_bits(image, file)
        grey, alpha = image.mode in GREY_MODES, None
        if image.has_transparency_data:
            image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
            alpha = image.getchannel("A")
        if grey:
            image = image.convert("L")
        elif image.mode not in ("CMYK", "LAB"):
            image = image.convert("RGB")
        if image.mode == "LAB":
            profile = profile or ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        if profile:
            try:
                image = _in_srgb(image, profile)
            except Exception as error:  # lcms and the parsing before it fail in many ways
                remarks.append(f"colour profile not used, {_line(error)}")
        image = image.convert("L" if grey else "RGB")
        if alpha is not None:
            image = image.convert("RGB")
            image.putalpha(alpha)
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if grey else "RGB")
        return Picture(image, size, tuple(remarks))


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _eight_bits(image: Image.Image, file: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of floats in [0, 1], as "L" or "LA"; Pillow's convert would clip it."""
    tags: dict[int, Any] = getattr(file, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0] if image.mode.startswith("I;") else 16
    most = 1.0 if image.mode == "F" else 2.0**bits - 1
    values = np.asarray(image).astype(np.float64)
    if not (values.min() >= 0 and values.max() <= most):  # NaN included
        raise ValueError("32-bit values of no known range; save it with 8 or 16 bits")
    levels = np.rint(values / (most / 255)).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = 255 - levels
    made = Image.fromarray(levels)
    clear = file.info.get("transparency")
    if isinstance(clear, int):
        made.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return made


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An image with a colour profile as sRGB; unchanged where that is what the profile says."""
    space, mode = _space(profile)
    if (image.mode, mode) == ("L", "RGB"):
        image = image.convert("RGB")
    if image.mode != mode:
        raise ValueError(f"it is for {space}, the pixels are {image.mode}")
    transform = _transform(profile, mode)
    return image if transform is None else transform.apply(image)


@lru_cache(maxsize=64)
def _space(profile: bytes) -> tuple[str, str | None]:
    """A profile's colour space, and Pillow's mode for it."""
    space = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    return space, {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}.get(space)


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """To sRGB; None where that changes nothing worth it. Threads may share it."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    srgb = ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(
        source,
        srgb,
        mode,
        "RGB",
        flags=ImageCms.Flags.NOCACHE,  # a cache is not for threads
    )
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    if mode == "RGB":
        probe = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    elif mode == "L":
        probe = np.repeat(levels[None, :, None], 3, axis=2)
    else:
        return transform
    asked = Image.fromarray(probe).convert(mode)
    moved = np.asarray(transform.apply(asked), np.int16) - probe
    return None if np.abs(moved).max() <= SAME_LEVELS else transform


def _without_metadata(data: bytes) -> bytes:
    """A PNG without the chunks that viewers pass over: Pillow refuses the file for a bad one."""
    if not data.startswith(PNG_START):
        return data
    kept, place = [PNG_START], len(PNG_START)
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunk = data[place : place + 12 + length]
        kind, place = chunk[4:8], place + len(chunk)
        whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind[:1].isupper() or (kind in PNG_KEPT and whole):  # upper case: critical
            kept.append(chunk)
    return b"".join(kept)


class _Heard(threading.local):
    """What Pillow said in this thread while a picture is being decoded; None outside."""

    lines: list[str] | None = None


_heard = _Heard()


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    lines: list[str] = []
    _heard.lines = lines
    try:
        yield lines
    finally:
        _heard.lines = None


def _without_numbers(text: str) -> str:
    """What is said of one picture in the words in which it is said of all."""
    return re.sub(r"\d+", "N", " ".join(text.split())).rstrip(".")


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if _heard.lines is not None:
            _heard.lines.append(_without_numbers(record.getMessage()))


@cache
def _quiet_libtiff() -> None:
    """Keep libtiff from printing what is wrong with a file whose name it does not know.

    It is an error of Pillow's as well. On Windows libtiff is part of Pillow, out of reach.
    """
    with contextlib.suppress(OSError, AttributeError):
        set_handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
        set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
        set_handler(None)


@contextlib.contextmanager
def warnings_as_remarks() -> Iterator[None]:
    """Make Pillow's warnings and log lines remarks of the picture that they are about.

    Python has one place for all threads where warnings go: enter before threads decode.
    """
    with warnings.catch_warnings():
        others = warnings.showwarning

        def keep(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if _heard.lines is None:
                others(message, category, *where, **more)
            elif not issubclass(category, Image.DecompressionBombWarning):  # it is only large
                _heard.lines.append(_without_numbers(str(message)))

        _quiet_libtiff()
        warnings.simplefilter("always")
        warnings.showwarning = keep
        logger, handler = logging.getLogger("PIL"), _Lines(logging.WARNING)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
