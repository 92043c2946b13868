"""The folder that `lutdeploy sample` fills: pictures and manifest.jsonl.

The same command completes a run that was stopped at any moment, and what is there stays as it is,
byte for byte; :mod:`lutdeploy.artefacts.picture_files` says how.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lutdeploy import images
from lutdeploy.artefacts import files
from lutdeploy.artefacts.picture_files import (
    DIGITS,
    MANIFEST,
    NPZ,
    PART,
    WRITERS,
    PictureWriter,
    Prepared,
)
from lutdeploy.artefacts.picture_text import sheet_texts
from lutdeploy.errors import UsageError
from lutdeploy.machine import processors
from lutdeploy.sampling import (
    Denoiser,
    ahead,
    batch_noise,
    check_schedule,
    finished_batches,
    noise_batches,
    trajectory,
)
from lutdeploy.schedule import DISTILLED, FITTED, Schedule

FORMATS = tuple(WRITERS)
EXTRAS = ("grid.png", "trajectory.png", "trajectory.gif")
# That may wait for the device, and for the encoders; the bounds keep memory flat in n.
NOISE_AHEAD = 2
WAITING_BATCHES = 2
MOST_ENCODERS = 8  # above, one thread that stores is the limit
ENCODED_TOGETHER = 16  # pictures
GRID_IMAGES = 256


def settings(
    identity: dict[str, Any], schedule: Schedule, seed: int, file_format: str
) -> dict[str, Any]:
    """What decides a picture besides its index; every line of the manifest holds it."""
    made = {
        **identity,
        "solver": schedule.solver,
        "steps": schedule.steps,
        "shift": schedule.shift,
        "seed": seed,
        "format": file_format,
    }
    if schedule.grid != "uniform":  # without the key, as in the folders of earlier versions
        told = schedule.rows if schedule.solver in (FITTED, DISTILLED) else schedule.times
        times = ",".join(map(repr, told)).encode()
        made |= {"grid": schedule.grid, "times_sha256": hashlib.sha256(times).hexdigest()}
    return made


def _ours(name: str) -> bool:
    """Whether a file is one of this command's pictures, or holds them."""
    if name == NPZ:
        return True
    stem, _, suffix = name.partition(".")  # 000000.npz is of an earlier version
    return len(stem) >= DIGITS and stem.isdigit() and suffix in ("png", "npz", "tar")


class SampleFolder:
    """A locked folder with the pictures of one set of settings. Use :func:`open_folder`."""

    def __init__(self, path: Path, wanted: dict[str, Any]) -> None:
        self.path, self.settings = path, wanted
        kind = WRITERS[wanted["format"]]
        if not (path / MANIFEST).is_file():
            foreign = [p.name for p in path.glob(f"[!.]*{kind.SUFFIX}") if _ours(p.name)]
            if foreign:
                raise UsageError(
                    f"{path} holds pictures such as {min(foreign)} but no {MANIFEST}: not made by "
                    "this command; choose another --out or --overwrite"
                )
        self.writer: PictureWriter = kind(path, wanted, self._lines(kind.LINE))

    def _lines(self, fields: dict[str, type]) -> list[dict[str, Any]]:
        """What each line of the manifest says besides the settings: ``fields``, or nothing.

        A line that was cut off is removed; its picture is made again.
        """
        manifest = self.path / MANIFEST
        if not manifest.is_file():
            return []
        text = manifest.read_text(encoding="utf-8", errors="replace")
        lines: list[dict[str, Any]] = []
        whole: list[str] = []
        for line in text.splitlines():
            try:
                values = dict(json.loads(line))
                own = {key: values.pop(key) for key in fields if key in values}
            except (*files.BAD_JSON, TypeError):
                continue
            different = [
                f"{key} {values.get(key)!r} → {self.settings.get(key)!r}"
                for key in {**values, **self.settings}
                if values.get(key) != self.settings.get(key)
            ]
            if different:
                raise UsageError(
                    f"{self.path} holds pictures made with other settings "
                    f"({', '.join(different)}); choose another --out, or --overwrite to replace"
                )
            if own and any(type(own.get(key)) is not kind for key, kind in fields.items()):
                continue
            lines.append(own)
            whole.append(line + "\n")
        if "".join(whole) != text:
            files.write_atomic(manifest, "".join(whole).encode())
        return lines

    def progress(self, n: int) -> str:
        """One line for a person whose run ended early."""
        there = n - len(self.writer.missing(n))
        return f"{there} of {n} images are in {self.path}; the same command makes the others"

    def write_extra(self, name: str, data: bytes) -> Path:
        """Write one of ``EXTRAS``, unless it is there with the same bytes."""
        path = self.path / name
        if not path.is_file() or path.read_bytes() != data:
            files.write_atomic(path, data)
        return path


@contextlib.contextmanager
def open_folder(
    path: Path, wanted: dict[str, Any], overwrite: bool = False
) -> Iterator[SampleFolder]:
    """Lock a folder and check that its pictures have the ``wanted`` settings.

    A folder that is in use or holds other pictures is a UsageError; ``overwrite`` clears it.
    """
    files.output_folder(path)
    with files.lock(path, "`lutdeploy sample`"):
        for name in (MANIFEST, NPZ, *EXTRAS):
            files.clear_leftovers(path, name)
        for left in path.glob(".[0-9]*.*"):  # pictures whose writer was killed
            if _ours(left.name[1:]):
                left.unlink()
        if overwrite:
            _clear(path)
        folder = SampleFolder(path, wanted)
        try:
            yield folder
        finally:
            folder.writer.close()


def _clear(path: Path) -> None:
    """Remove what `lutdeploy sample` makes, and nothing else."""
    for entry in path.iterdir():
        name = entry.name.removeprefix(PART)
        if name not in (MANIFEST, *EXTRAS) and not _ours(name):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def fill(
    folder: SampleFolder, denoiser: Denoiser, schedule: Schedule, n: int, batch: int
) -> Iterator[int]:
    """Make the missing ones of images 0 … n−1; yields how many each batch finished.

    While a batch computes, a thread makes the noise of the next ones, several encode the pictures
    before it, and one stores those. What is stored stays when an error ends this.
    """
    check_schedule(denoiser, schedule)
    seed, shape = folder.settings["seed"], denoiser.config.image_shape
    noise = ahead(noise_batches(seed, folder.writer.missing(n), batch, shape), NOISE_AHEAD)
    with contextlib.closing(noise), Storing(folder.writer) as storing:
        for indices, ends in finished_batches(denoiser, noise, schedule, pixels=True):
            storing.put(indices, ends)
            yield len(indices)
        storing.finish()


class Storing:
    """Encodes pictures in several threads, and stores them in order in another."""

    def __init__(self, writer: PictureWriter) -> None:
        self._writer = writer
        self._encoders = ThreadPoolExecutor(min(processors(), MOST_ENCODERS), "encode")
        self._keeper = ThreadPoolExecutor(1, "store")
        self._waiting: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> Storing:
        return self

    def __exit__(self, *exception: object) -> None:
        self._keeper.shutdown()
        self._encoders.shutdown()

    def put(self, indices: Sequence[int], ends: NDArray[Any]) -> None:
        """Take the images float32 [n, C, S, S] or pixels uint8 [n, S, S, C] of ``indices``.

        Waits where more than two batches wait already. An error of an earlier one is raised.
        """
        parts = [
            self._encoders.submit(self._prepare, indices[part], ends[part])
            for start in range(0, len(indices), ENCODED_TOGETHER)
            for part in [slice(start, start + ENCODED_TOGETHER)]
        ]
        self._waiting.append(self._keeper.submit(self._store, parts))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > WAITING_BATCHES):
            self._waiting.popleft().result()

    def finish(self) -> None:
        """Wait for all to be stored, and finish the files."""
        while self._waiting:
            self._waiting.popleft().result()
        self._writer.finish()

    def _prepare(self, indices: Sequence[int], ends: NDArray[Any]) -> Prepared:
        pixels = ends if ends.dtype == np.uint8 else images.to_uint8(ends)
        return self._writer.prepare(indices, pixels)

    def _store(self, parts: Sequence[Future[Prepared]]) -> None:
        if self._failed:  # the pictures after a gap are not for files that keep an order
            return
        try:
            for part in parts:
                self._writer.store(part.result())
        except BaseException:
            self._failed = True
            raise


def write_grid(folder: SampleFolder, n: int) -> Path:
    """grid.png: the first pictures of the folder, at most 256."""
    shown = folder.writer.first(min(n, GRID_IMAGES))
    texts = sheet_texts(folder.settings, len(shown) - 1)
    return folder.write_extra("grid.png", images.encode_png(images.grid(shown), texts))


def write_trajectory(
    folder: SampleFolder, denoiser: Denoiser, schedule: Schedule, n: int, png: bool, gif: bool
) -> list[Path]:
    """trajectory.png (noise on top, every fourth step below) and trajectory.gif, of 8 images."""
    if denoiser.whole_trajectory:
        raise UsageError("a loop export shows no steps; use a step or per-step export for this")
    noise = batch_noise(folder.settings["seed"], range(min(n, 8)), denoiser.config.image_shape)
    states = [state.x for state in trajectory(denoiser, noise, schedule)]
    written = []
    if png:
        rows = images.trajectory_rows(states)
        texts = sheet_texts(folder.settings, len(states[0]) - 1, trajectory=True)
        written.append(folder.write_extra("trajectory.png", images.encode_png(rows, texts)))
    if gif:
        frames = [images.enlarge(images.grid(images.to_uint8(state)), 2) for state in states]
        written.append(folder.write_extra("trajectory.gif", images.encode_gif(frames)))
    return written
