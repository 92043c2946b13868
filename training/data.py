"""Images to train on or to compare with: a folder's, or drawn ones; uint8 [n, C, S, S]."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lutdeploy.errors import UsageError, ran_out_of_memory
from lutdeploy.machine import memory_bytes, processors
from lutdeploy.training.synthetic import draw_cat

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SYNTHETIC_IMAGES = 2048

OnProgress = Callable[[int, int], None]  # how many are done, of how many


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


def _generator(seed: int, index: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed | index << 64))


@dataclass(frozen=True)
class ImageSet:
    """Decoded images and the files that could not be decoded."""

    images: NDArray[np.uint8]  # [n, C, S, S], in memory or mapped from an unnamed file
    skipped: tuple[str, ...]  # "path: reason"

    def split(self, fraction: float, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Indices of the training images and of a held-out ``fraction``, by seed.

        At least one image stays for training.
        """
        order = _generator(seed).permutation(len(self.images))
        held = min(round(fraction * len(order)), len(order) - 1)
        return np.sort(order[held:]), np.sort(order[:held])


def find_images(folder: Path) -> list[Path]:
    """Every PNG, JPEG and WebP file below a folder, sorted by path; at least one."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of images")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if not files:
        raise UsageError(f"{folder} holds no image ({', '.join(SUFFIXES)})")
    return files


def decode(path: Path, size: int, channels: int = 3) -> NDArray[np.uint8]:
    """One file as uint8 [C, size, size]: upright, on white, cropped to the centre, resized."""
    with Image.open(path) as file:
        # A JPEG may be decoded at a reduced scale, never below what is needed.
        file.draft("RGB", (2 * size, 2 * size))
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's convert would clip
            image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        mode = "L" if channels == 1 else "RGB"
        image = ImageOps.fit(image.convert(mode), (size, size), Image.Resampling.LANCZOS)
        pixels = np.asarray(image, np.uint8)
    return pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0)


def _allocate(count: int, shape: tuple[int, ...], limit: int, scratch: Path) -> NDArray[np.uint8]:
    """An array in memory, or above ``limit`` bytes in a file without a name.

    The file goes with the process, however that ends; the system pages it in and out.
    """
    if count * int(np.prod(shape)) <= limit:
        return np.empty((count, *shape), np.uint8)
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=scratch) as file:  # the mapping outlives the handle
        return np.memmap(file, np.uint8, "w+", shape=(count, *shape))


def load_folder(
    folder: Path,
    size: int,
    channels: int = 3,
    memory_limit: int | None = None,
    scratch: Path | None = None,
    on_progress: OnProgress = no_progress,
) -> ImageSet:
    """Decode every image below a folder; unreadable ones are skipped and named.

    Args:
        memory_limit: bytes of pixels above which they live in a file, not in memory; half
            of what this process may take by default.
        scratch: where that file is made; the system's temporary folder by default.
    """
    files = find_images(folder)
    limit = memory_bytes() // 2 if memory_limit is None else memory_limit
    shape = (channels, size, size)
    pixels = _allocate(len(files), shape, limit, scratch or Path(tempfile.gettempdir()))
    skipped: list[str] = []
    kept = 0

    def attempt(path: Path) -> NDArray[np.uint8] | str:
        try:
            return decode(path, size, channels)
        except Exception as error:  # Pillow's decoders raise almost anything on bad bytes
            if ran_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or ["?"])[0]
            return f"{path}: {type(error).__name__}: {reason}"[:300]

    with ThreadPoolExecutor(processors()) as pool:
        for start in range(0, len(files), 1024):  # bounded: decoded images wait in memory
            for result in pool.map(attempt, files[start : start + 1024]):
                if isinstance(result, str):
                    skipped.append(result)
                else:
                    pixels[kept] = result
                    kept += 1
                on_progress(kept + len(skipped), len(files))
    if not kept:
        raise UsageError(
            f"{folder}: none of {len(files)} image files is readable; first: {skipped[0]}"
        )
    return ImageSet(pixels[:kept], tuple(skipped))


def draw_set(
    size: int, channels: int = 3, count: int = SYNTHETIC_IMAGES, seed: int = 0
) -> ImageSet:
    """Drawn cat faces, uint8 [count, C, size, size]; image i depends on (seed, i) alone."""
    images = np.empty((count, channels, size, size), np.uint8)
    for index in range(count):
        picture = draw_cat(_generator(seed, index), size)
        pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"), np.uint8)
        images[index] = pixels if channels == 1 else np.moveaxis(pixels, -1, 0)
    return ImageSet(images, ())


def load_images(
    source: str,
    size: int,
    channels: int,
    scratch: Path | None = None,
    on_progress: OnProgress = no_progress,
) -> ImageSet:
    """The images that --data names: a folder's (:func:`load_folder`), or drawn for "synthetic"."""
    if source == "synthetic":
        return draw_set(size, channels)
    return load_folder(Path(source), size, channels, scratch=scratch, on_progress=on_progress)


def batch_indices(count: int, batch: int, seed: int, start: int) -> Iterator[NDArray[np.intp]]:
    """Endless batches of positions in [0, count), each epoch in a new order.

    The batch of a step is a function of (seed, step) alone, so a resumed run continues
    exactly: ``start`` is the step to begin at.
    """
    epoch, place = divmod(start * batch, count)
    orders = (_generator(seed, k + 1).permutation(count) for k in itertools.count(epoch))
    positions = itertools.islice(itertools.chain.from_iterable(orders), place, None)
    while True:
        yield np.fromiter(itertools.islice(positions, batch), np.intp, batch)
