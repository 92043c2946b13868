"""The folder that `lutdeploy sample` fills: pictures and manifest.jsonl.

A picture's line in manifest.jsonl is written before the picture takes its name, and a picture that
has a line is never written again. So the same command completes a run that was stopped at any
moment, and what is there stays as it is, byte for byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
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
from lutdeploy.errors import ArtefactError, UsageError
from lutdeploy.sampling import (
    Denoiser,
    batch_noise,
    check_schedule,
    finished_batches,
    noise_batches,
    trajectory,
)
from lutdeploy.schedule import FITTED, Schedule

MANIFEST = "manifest.jsonl"
FORMATS = ("png", "npz")
EXTRAS = ("grid.png", "trajectory.png", "trajectory.gif")
WAITING_BATCHES = 2  # that may wait for the encoder; the bound keeps memory flat in n
GRID_IMAGES = 256
DIGITS = 6  # at least, in a picture's name


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
        told = schedule.rows if schedule.solver == FITTED else schedule.times
        times = ",".join(map(repr, told)).encode()
        made |= {"grid": schedule.grid, "times_sha256": hashlib.sha256(times).hexdigest()}
    return made


def _encode(image: NDArray[Any], file_format: str) -> bytes:
    """Encode an image [C, S, S] as an 8-bit PNG, or as array ``image`` of an npz.

    For a PNG it may also be uint8 pixels [S, S, C].
    """
    if file_format == "png":
        return images.encode_png(image if image.dtype == np.uint8 else images.to_uint8(image))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, image=image)
    return buffer.getvalue()


def _numbered(stem: str) -> bool:
    """Whether a file name without its suffix is that of one of this command's pictures."""
    return len(stem) >= DIGITS and stem.isdigit()


class SampleFolder:
    """A locked folder with the pictures of one set of settings. Use :func:`open_folder`."""

    def __init__(self, path: Path, wanted: dict[str, Any]) -> None:
        self.path, self.settings = path, wanted
        self.lines: set[int] = set()
        manifest = path / MANIFEST
        if manifest.is_file():
            self._read(manifest)
        elif foreign := [p.name for p in path.glob(f"*.{wanted['format']}") if _numbered(p.stem)]:
            raise UsageError(
                f"{path} holds pictures such as {min(foreign)} but no {MANIFEST}: not made by "
                "this command; choose another --out or --overwrite"
            )

    def _read(self, manifest: Path) -> None:
        text = manifest.read_text(encoding="utf-8", errors="replace")
        whole: list[str] = []
        for line in text.splitlines():
            try:
                values = json.loads(line)
                index = int(values.pop("index"))
                values.pop("image")
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a line that was cut off; its picture is made again
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
            self.lines.add(index)
            whole.append(line + "\n")
        if "".join(whole) != text:
            files.write_atomic(manifest, "".join(whole).encode())

    def name(self, index: int) -> str:
        return f"{index:0{DIGITS}d}.{self.settings['format']}"

    def missing(self, n: int) -> list[int]:
        """Those of images 0 … n−1 that are not there yet."""
        return [
            index
            for index in range(n)
            if index not in self.lines or not (self.path / self.name(index)).is_file()
        ]

    def progress(self, n: int) -> str:
        """One line for a person whose run ended early."""
        there = n - len(self.missing(n))
        return f"{there} of {n} images are in {self.path}; the same command makes the others"

    def write(self, indices: Sequence[int], batch: NDArray[Any]) -> None:
        """Encode and store images [len(indices), C, S, S], or pixels [len(indices), S, S, C]."""
        for index, image in zip(indices, batch, strict=True):
            name = self.name(index)
            temporary = self.path / f".{name}"
            temporary.write_bytes(_encode(image, self.settings["format"]))
            if index not in self.lines:
                line = {"image": name, "index": index, **self.settings}
                with (self.path / MANIFEST).open("a", encoding="utf-8") as manifest:
                    manifest.write(json.dumps(line) + "\n")
                self.lines.add(index)
            os.replace(temporary, self.path / name)

    def read(self, index: int) -> images.Pixels:
        """A stored picture as uint8 [S, S, C]."""
        path = self.path / self.name(index)
        try:
            data = path.read_bytes()
            if self.settings["format"] == "npz":
                with np.load(io.BytesIO(data)) as arrays:
                    return images.to_uint8(arrays["image"])
            return images.decode_png(data)
        except Exception as error:  # decoders raise almost anything on bad bytes
            raise ArtefactError(
                f"{path} is damaged; delete it, and the same command makes it again"
            ) from error

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
        for name in (MANIFEST, *EXTRAS):
            files.clear_leftovers(path, name)
        for suffix in FORMATS:
            for left in path.glob(f".[0-9]*.{suffix}"):  # pictures whose writer was killed
                left.unlink()
        if overwrite:
            _clear(path)
        yield SampleFolder(path, wanted)


def _clear(path: Path) -> None:
    """Remove what `lutdeploy sample` makes, and nothing else."""
    for entry in path.iterdir():
        stem, _, suffix = entry.name.lstrip(".").partition(".")
        ours = entry.name in (MANIFEST, *EXTRAS) or (_numbered(stem) and suffix in FORMATS)
        if ours and entry.is_dir():
            shutil.rmtree(entry)
        elif ours:
            entry.unlink()


def fill(
    folder: SampleFolder, denoiser: Denoiser, schedule: Schedule, n: int, batch: int
) -> Iterator[int]:
    """Make the missing ones of images 0 … n−1; yields how many each batch finished.

    A thread encodes them while the next batch computes. What is written stays when an error
    ends this.
    """
    check_schedule(denoiser, schedule)
    missing, seed = folder.missing(n), folder.settings["seed"]
    batches = noise_batches(seed, missing, batch, denoiser.config.image_shape)
    pixels = folder.settings["format"] == "png"
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as encoder:
        for indices, ends in finished_batches(denoiser, batches, schedule, pixels):
            waiting.append(encoder.submit(folder.write, indices, ends))
            while len(waiting) > WAITING_BATCHES:
                waiting.popleft().result()
            yield len(indices)
        while waiting:
            waiting.popleft().result()


def write_grid(folder: SampleFolder, n: int) -> Path:
    """grid.png: the first pictures of the folder, at most 256."""
    shown = np.stack([folder.read(index) for index in range(min(n, GRID_IMAGES))])
    return folder.write_extra("grid.png", images.encode_png(images.grid(shown)))


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
        written.append(folder.write_extra("trajectory.png", images.encode_png(rows)))
    if gif:
        frames = [images.enlarge(images.grid(images.to_uint8(state)), 2) for state in states]
        written.append(folder.write_extra("trajectory.gif", images.encode_gif(frames)))
    return written
