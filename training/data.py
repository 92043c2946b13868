"""Images to train on or to compare with: a folder's, or drawn ones; uint8 [n, C, S, S]."""

from __future__ import annotations

import itertools
import os
import re
import secrets
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from lutdeploy import decoding
from lutdeploy.artefacts import files
from lutdeploy.errors import UsageError, ran_out_of_memory
from lutdeploy.machine import memory_bytes, processors
from lutdeploy.training.picture_folder import find_pictures, in_words, printable, some
from lutdeploy.training.synthetic import draw_cat

if TYPE_CHECKING:
    from lutdeploy.training.processes import Processes

SYNTHETIC = "synthetic"  # in the place of a folder
SYNTHETIC_IMAGES = 2048
SHARED = "images"  # the file that several processes map, while it has a name
POLL_SECONDS = 0.1
IMAGES = ("image", "images")
NAMED_FILES = 5  # unreadable files that a line names

T = TypeVar("T")

OnProgress = Callable[[int, int], None]  # how many are done, of how many


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


def _generator(seed: int, index: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed | index << 64))


def split(count: int, fraction: float, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of the training images and of a held-out ``fraction`` of ``count``, by seed.

    At least one image stays for training.
    """
    order = _generator(seed).permutation(count)
    held = min(round(fraction * count), count - 1)
    return np.sort(order[held:]), np.sort(order[:held])


@dataclass(frozen=True)
class ImageSet:
    """Decoded images, where they come from, and what a person should know of them."""

    images: NDArray[np.uint8]  # [n, C, S, S], in memory or mapped from a file
    skipped: tuple[str, ...] = ()  # files that cannot be decoded, "path: reason"
    remarks: tuple[str, ...] = ()  # what was left out, and what is not as it was, for people
    names: tuple[str, ...] = ()  # of the images' files, below their folder
    sha256: tuple[str, ...] = ()  # of those files
    small: tuple[str, ...] = ()  # names and sizes of those that were enlarged

    def split(self, fraction: float, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Indices of the training images and of the held-out ones; see :func:`split`."""
        return split(len(self.images), fraction, seed)

    def all_remarks(self) -> tuple[str, ...]:
        """The remarks, with a line for unreadable files."""
        return self.remarks + unreadable(self.skipped)

    def write_list(self, path: Path) -> None:
        """Write names and hashes as `sha256sum` does, and reads them in the images' folder."""
        lines = []
        for digest, name in zip(self.sha256, self.names, strict=True):
            escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
            lines.append(("\\" if escaped != name else "") + f"{digest}  {escaped}\n")
        files.write_atomic(path, os.fsencode("".join(lines)))


def unreadable(skipped: Sequence[str]) -> tuple[str, ...]:
    """A line that names files that could not be decoded, if there are any."""
    if not skipped:
        return ()
    named = "; ".join(skipped[:NAMED_FILES]) + ("; …" if len(skipped) > NAMED_FILES else "")
    return (f"{len(skipped)} unreadable files skipped: {named}",)


def read_list(path: Path) -> tuple[str, ...]:
    """The hashes that :meth:`ImageSet.write_list` wrote, in order."""
    found = re.findall(rb"^\\?([0-9a-f]{64})  .", path.read_bytes(), re.MULTILINE)
    return tuple(digest.decode() for digest in found)


@dataclass(frozen=True)
class _Decoded:
    """An image of a file, uint8 [C, S, S], with its hash and remarks."""

    pixels: NDArray[np.uint8]
    size: tuple[int, int]
    sha256: str
    remarks: tuple[str, ...]


def read_regular(path: Path) -> bytes:
    """The bytes of a file; a pipe, whose reader would wait for a writer, is an error."""
    if path.is_symlink() and not path.exists():
        raise OSError("a link to nothing")
    if path.exists() and not path.is_file():
        raise OSError("no regular file")
    return path.read_bytes()


def decode(path: Path, size: int, channels: int = 3) -> _Decoded:
    """One file as a training image: cropped to the centre, resized."""
    data = read_regular(path)
    picture = decoding.decode(data, size)
    image = picture.image.convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.uint8)
    pixels = pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0)
    return _Decoded(pixels, picture.size, sha256(data).hexdigest(), picture.remarks)


def decode_or_say(path: Path, work: Callable[[Path], T]) -> T | str:
    """What ``work`` makes of a file; or the file's name and why it cannot be decoded."""
    try:
        return work(path)
    except Exception as error:  # Pillow's decoders raise almost anything on bad bytes
        if ran_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["?"])[0]
        if isinstance(error, UnidentifiedImageError):
            reason = "its bytes are no picture of these kinds"
        return f"{printable(path)}: {type(error).__name__}: {reason}"[:300]


def by_remark(remarks: Mapping[str, list[str]]) -> tuple[str, ...]:
    """A line for each remark about files, with the names of some."""
    return tuple(
        f"{remark}: {in_words(IMAGES, len(names))} ({some(names)})"
        for remark, names in remarks.items()
    )


def _allocate(
    number: int, shape: tuple[int, ...], limit: int, scratch: Path, shared: Path | None
) -> NDArray[np.uint8]:
    """An array in memory, in the ``shared`` file, or above ``limit`` bytes in one without a name.

    The latter goes with the process, however that ends; the system pages it in and out.
    """
    if shared is not None:
        return np.memmap(shared, np.uint8, "w+", shape=(number, *shape))
    if number * int(np.prod(shape)) <= limit:
        return np.empty((number, *shape), np.uint8)
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=scratch) as file:  # the mapping outlives the handle
        return np.memmap(file, np.uint8, "w+", shape=(number, *shape))


def load_folder(
    folder: Path,
    size: int,
    channels: int = 3,
    memory_limit: int | None = None,
    scratch: Path | None = None,
    on_progress: OnProgress = no_progress,
    shared: Path | None = None,
    option: str = "--data",
) -> ImageSet:
    """Decode every image below a folder; unreadable ones are skipped and named.

    Args:
        memory_limit: bytes of pixels above which they live in a file, not in memory; half
            of what this process may take by default.
        scratch: where that file is made; the system's temporary folder by default.
        shared: a file that holds the pixels in any case, for other processes to map.
        option: what named the folder, for messages.
    """
    found = find_pictures(folder, option)
    limit = memory_bytes() // 2 if memory_limit is None else memory_limit
    shape, scratch = (channels, size, size), scratch or Path(tempfile.gettempdir())
    pixels = _allocate(len(found.files), shape, limit, scratch, shared)
    names: list[str] = []
    digests: list[str] = []
    skipped: list[str] = []
    small: list[str] = []
    remarks: defaultdict[str, list[str]] = defaultdict(list)

    def attempt(path: Path) -> _Decoded | str:
        return decode_or_say(path, lambda path: decode(path, size, channels))

    with decoding.warnings_as_remarks(), ThreadPoolExecutor(processors()) as pool:
        for start in range(0, len(found.files), 1024):  # bounded: decoded images wait in memory
            paths = found.files[start : start + 1024]
            for path, result in zip(paths, pool.map(attempt, paths), strict=True):
                if isinstance(result, str):
                    skipped.append(result)
                else:
                    pixels[len(names)] = result.pixels
                    names.append(str(path.relative_to(folder)))
                    name = printable(path.relative_to(folder))
                    digests.append(result.sha256)
                    for remark in result.remarks:
                        remarks[remark].append(name)
                    if min(result.size) < size:
                        small.append(f"{name} {result.size[0]}×{result.size[1]}")
                on_progress(len(names) + len(skipped), len(found.files))
    if not names:
        raise UsageError(
            f"{folder}: none of {len(found.files)} image files is readable; first: {skipped[0]}"
        )
    if small:
        remarks[f"enlarged to {size}×{size}"] = small
    lines = found.lines() + by_remark(remarks)
    return ImageSet(
        pixels[: len(names)], tuple(skipped), lines, tuple(names), tuple(digests), tuple(small)
    )


def draw_set(
    size: int,
    channels: int = 3,
    count: int = SYNTHETIC_IMAGES,
    seed: int = 0,
    on_progress: OnProgress = no_progress,
    shared: Path | None = None,
) -> ImageSet:
    """Drawn cat faces, uint8 [count, C, size, size]; image i depends on (seed, i) alone."""
    shape = (channels, size, size)
    images = _allocate(count, shape, sys.maxsize, Path(tempfile.gettempdir()), shared)
    for index in range(count):
        picture = draw_cat(_generator(seed, index), size)
        pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"), np.uint8)
        images[index] = pixels if channels == 1 else np.moveaxis(pixels, -1, 0)
        on_progress(index + 1, count)
    names = tuple(f"synthetic {seed} {index}" for index in range(count))
    return ImageSet(
        images, names=names, sha256=tuple(sha256(name.encode()).hexdigest() for name in names)
    )


def load_images(
    source: str,
    size: int,
    channels: int,
    scratch: Path | None = None,
    on_progress: OnProgress = no_progress,
    shared: Path | None = None,
    option: str = "--data",
) -> ImageSet:
    """The images that --data names: a folder's (:func:`load_folder`), or drawn for "synthetic"."""
    if source == SYNTHETIC:
        return draw_set(size, channels, on_progress=on_progress, shared=shared)
    return load_folder(
        Path(source),
        size,
        channels,
        scratch=scratch,
        on_progress=on_progress,
        shared=shared,
        option=option,
    )


def load_once(
    processes: Processes,
    source: str,
    size: int,
    channels: int,
    scratch: Path,
    on_progress: OnProgress = no_progress,
) -> ImageSet:
    """The images that --data names, decoded and held once on each machine.

    Of several processes the first on a machine decodes into a file, which all map; it has no name
    any more when this returns. The others get the pixels alone.
    """
    if processes.count == 1:
        return load_images(source, size, channels, scratch, on_progress)
    if processes.writes:
        files.clear_leftovers(scratch, SHARED)
    machine = processes.rank - processes.local_rank  # its first process
    token = processes.tell(secrets.token_hex(8))
    place = scratch / f".{SHARED}.{token}.{machine}"
    growing = place.with_name(f"{place.name}.part")
    if processes.local_rank == 0:
        found = load_images(source, size, channels, None, on_progress, growing)
        growing.rename(place)
    while not place.exists():  # however long it takes: a collective call would time out
        time.sleep(POLL_SECONDS)
    number = processes.tell(len(found.images) if processes.writes else 0)
    if processes.local_rank:
        shape = (number, channels, size, size)  # "c": torch wants arrays that can be written
        found = ImageSet(np.memmap(place, np.uint8, "c", shape=shape))
    processes.wait()
    if processes.local_rank == 0:
        place.unlink()
    return found


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
