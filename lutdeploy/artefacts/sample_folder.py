"""The folder that `lutdeploy sample` fills: pictures and manifest.jsonl.

The same command completes a run that was stopped at any moment, and what is there stays as it is,
byte for byte; :mod:`lutdeploy.artefacts.picture_files` says how.

A command has a folder to itself, or several tasks share it: each locks its own range of images and
keeps a manifest of its own, and the next command that has the folder to itself joins those.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lutdeploy import images
from lutdeploy.artefacts import files
from lutdeploy.artefacts.picture_files import (
    DIGITS,
    MANIFEST,
    NPZ,
    PART,
    SHARD_IMAGES,
    WRITERS,
    Line,
    ManifestLog,
    PictureWriter,
    Prepared,
    Settings,
    Task,
    is_task_manifest,
    json_line,
    manifests,
    task_manifest,
)
from lutdeploy.artefacts.picture_text import sheet_texts
from lutdeploy.errors import ArtefactError, UsageError
from lutdeploy.images import Pixels
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
SAMPLE = "`lutdeploy sample`"
# Seconds: a task waits for the others to begin, and a command for the tasks of one that was killed.
PATIENCE = 30.0


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


def is_ours(name: str) -> bool:
    """Whether a file is one of this command's pictures, or holds them."""
    if name == NPZ:
        return True
    stem, _, suffix = name.partition(".")  # 000000.npz is of an earlier version
    return len(stem) >= DIGITS and stem.isdigit() and suffix in ("png", "npz", "tar")


def read_line(text: str, wanted: Settings, place: object) -> Line | None:
    """What a line of a manifest says besides the settings; None where it was cut off.

    Raises:
        UsageError: its settings are not the ``wanted`` ones.
    """
    fields = WRITERS[wanted["format"]].LINE
    try:
        values = dict(json.loads(text))
        own = {key: values.pop(key) for key in fields if key in values}
    except (*files.BAD_JSON, TypeError):
        return None
    different = [
        f"{key} {values.get(key)!r} → {wanted.get(key)!r}"
        for key in {**values, **wanted}
        if values.get(key) != wanted.get(key)
    ]
    if different:
        raise UsageError(
            f"{place} holds pictures made with other settings "
            f"({', '.join(different)}); choose another --out, or --overwrite to replace"
        )
    if own and any(type(own.get(key)) is not kind for key, kind in fields.items()):
        return None
    return own


def position(line: Line) -> int:
    """The first picture that a line is about; −1 where it has the settings alone."""
    return int(line["index"] if "index" in line else line.get("first", -1))


def joined(texts: Iterator[str], wanted: Settings, place: object) -> bytes:
    """One manifest of the lines of several, each line once, in the order of the pictures."""
    lines: dict[str, int] = {}
    for text in texts:
        line = read_line(text, wanted, place)
        if line or (line is not None and wanted["format"] != "png"):
            lines[text.rstrip("\n")] = position(line)
    return "".join(f"{text}\n" for text in sorted(lines, key=lambda text: lines[text])).encode()


def refuse_foreign(names: Iterable[str], wanted: Settings, place: object) -> None:
    """Refuse pictures that no manifest lists."""
    suffix = WRITERS[wanted["format"]].SUFFIX
    foreign = [name for name in names if name.endswith(suffix) and is_ours(name)]
    if foreign:
        raise UsageError(
            f"{place} holds pictures such as {min(foreign)} but no {MANIFEST}: not made by "
            "this command; choose another --out or --overwrite"
        )


class Folder(Protocol):
    """Where pictures of one set of settings go: a folder, or a place in an object store."""

    settings: Settings

    def lacking(self, n: int, first: int = 0) -> int:
        """How many of images first … first+n−1 are not there yet."""

    def tasks(self, n: int, size: int) -> Iterator[Task]:
        """Those that make what is missing of images 0 … n−1; a PNG's of ``size`` at most."""

    def opener(self) -> TaskOpener:
        """What opens a task, in any process and on any machine that sees the same files."""

    def adopt(self, task: Task) -> None:
        """Take over what a task that ended says of its pictures."""

    def fill(
        self, denoiser: Denoiser, schedule: Schedule, n: int, batch: int, first: int = 0
    ) -> Generator[int, None, None]:
        """Make what is missing of some images; yields how many were finished, now and then."""

    def finish(self) -> None:
        """All tasks have done their work: leave one manifest."""

    def reload(self) -> None:
        """Look again at what is there, when tasks were stopped."""

    def first(self, n: int) -> Pixels:
        """The first n stored pictures, uint8 [n, S, S, C]."""

    def write_extra(self, name: str, data: bytes) -> object:
        """Write one of ``EXTRAS``, unless it is there with the same bytes; where it is."""

    def progress(self, n: int, first: int = 0) -> str:
        """One line for a person whose run ended early."""


TaskOpener = Callable[[Task], contextlib.AbstractContextManager["SampleFolder"]]


class SampleFolder:
    """A locked folder, or a locked range of it, with pictures of one set of settings.

    Use :func:`open_folder` or :func:`open_task`.
    """

    def __init__(self, path: Path, wanted: Settings, task: Task | None = None) -> None:
        self.path, self.settings, self._task = path, wanted, task
        self._log = ManifestLog(path)
        self.writer: PictureWriter = self._open_writer()

    def _open_writer(self) -> PictureWriter:
        kind, task = WRITERS[self.settings["format"]], self._task
        if task is None:
            self._join()
            return kind(self.path, self.settings, self._mend(self.path / MANIFEST))
        own = self._mend(self.path / task_manifest(task.first))
        return kind(self.path, self.settings, chain(task.known, own), task.images)

    def _join(self) -> None:
        """Make one manifest of those of the tasks."""
        there = manifests(self.path)
        if not there:
            refuse_foreign(os.listdir(self.path), self.settings, self.path)
        of_tasks = [path for path in there if path.name != MANIFEST]
        if of_tasks:
            texts = chain.from_iterable(map(_texts, there))
            files.write_atomic(self.path / MANIFEST, joined(texts, self.settings, self.path))
        for path in of_tasks:
            path.unlink()

    def _mend(self, manifest: Path) -> Iterator[Line]:
        """What each line says besides the settings, perhaps nothing.

        A line that was cut off is removed; its picture is made again.
        """
        if not manifest.is_file():
            return
        whole = True
        for text in _texts(manifest):
            line = read_line(text, self.settings, self.path)
            whole = whole and line is not None and text.endswith("\n")
            if line is not None:
                yield line
        if not whole:
            kept = [text.rstrip("\n") + "\n" for text in _texts(manifest) if self._read(text)]
            files.write_atomic(manifest, "".join(kept).encode())

    def _read(self, text: str) -> bool:
        return read_line(text, self.settings, self.path) is not None

    def lacking(self, n: int, first: int = 0) -> int:
        return len(self.writer.missing(n, first))

    def tasks(self, n: int, size: int) -> Iterator[Task]:
        return self.writer.tasks(n, size)

    def opener(self) -> TaskOpener:
        return functools.partial(open_task, self.path.resolve(), self.settings)

    def adopt(self, task: Task) -> None:
        manifest = self.path / task_manifest(task.first)
        if not manifest.is_file():
            raise ArtefactError(
                f"images {task.first} to {task.images[-1]} were made, but not in {self.path} as "
                "this machine sees it; name a folder that all machines of the cluster share, or an "
                "address such as s3://bucket/prefix"
            )
        self._log.append(manifest.read_bytes())
        manifest.unlink()
        (self.path / _lock_name(task.images)).unlink(missing_ok=True)

    def fill(
        self, denoiser: Denoiser, schedule: Schedule, n: int, batch: int, first: int = 0
    ) -> Generator[int, None, None]:
        yield from fill(self, denoiser, schedule, n, batch, first)

    def finish(self) -> None:
        if self.settings["format"] != "png":  # the line of a file that was added to is still there
            self.reload()

    def reload(self) -> None:
        self.close()
        _wait_for_tasks(self.path)
        self.writer = self._open_writer()

    def first(self, n: int) -> Pixels:
        return self.writer.first(n)

    def progress(self, n: int, first: int = 0) -> str:
        there = n - self.lacking(n, first)
        return f"{there} of {n} images are in {self.path}; the same command makes the others"

    def write_extra(self, name: str, data: bytes) -> Path:
        path = self.path / name
        if not path.is_file() or path.read_bytes() != data:
            files.write_atomic(path, data)
        return path

    def close(self) -> None:
        self._log.close()
        self.writer.close()


def _texts(manifest: Path) -> Iterator[str]:
    with manifest.open(encoding="utf-8", errors="replace", newline="\n") as file:
        yield from file


def require_shareable(
    place: Path | str, file_format: str, images: range | None, in_tasks: bool
) -> None:
    """Refuse a format whose files cannot be shared among the tasks that are asked for.

    Args:
        place: a folder, or the address of one.
        file_format: one of ``FORMATS``.
        images: those of this one of several tasks.
        in_tasks: whether this command hands out tasks.
    """
    if isinstance(place, str) and file_format != "webdataset":
        raise UsageError(
            f"--out {place}: objects cannot grow; it takes --format webdataset, not {file_format}"
        )
    if file_format == "npz" and (images is not None or in_tasks):
        raise UsageError(
            "--format npz is one file, which one command writes; --first and --ray are for png and "
            "webdataset"
        )
    if file_format == "webdataset" and images is not None and images.start % SHARD_IMAGES:
        raise UsageError(
            f"--first {images.start} lies within a shard, which one task writes; with --format "
            f"webdataset it is a multiple of {SHARD_IMAGES:,}"
        )


def open_place(
    place: Path | str, wanted: Settings, overwrite: bool = False, images: range | None = None
) -> contextlib.AbstractContextManager[Folder]:
    """:func:`open_folder`, or its like in an object store."""
    if isinstance(place, Path):
        return open_folder(place, wanted, overwrite, images)
    from lutdeploy.artefacts.object_store import ObjectFolder

    return contextlib.nullcontext(ObjectFolder(place, wanted, overwrite, images))


@contextlib.contextmanager
def open_folder(
    path: Path, wanted: Settings, overwrite: bool = False, images: range | None = None
) -> Iterator[SampleFolder]:
    """Lock a folder and check that its pictures have the ``wanted`` settings.

    A folder that is in use or holds other pictures is a UsageError; ``overwrite`` clears it.
    With ``images`` this is one of several tasks that share the folder, and locks those alone.
    """
    files.output_folder(path)
    with contextlib.ExitStack() as held:
        if images is None:
            held.enter_context(files.lock(path, SAMPLE))
            _wait_for_tasks(path)
            for name in (MANIFEST, NPZ, *EXTRAS, "manifest-*.jsonl"):
                files.clear_leftovers(path, name)
            for left in path.glob(".[0-9]*.*"):  # pictures whose writer was killed
                if is_ours(left.name[1:]):
                    left.unlink()
            if overwrite:
                _clear(path)
            task = None
        else:
            held.enter_context(_share(path, wanted, images))
            task = Task(images.start, len(images), _known(path, wanted, images))
        folder = SampleFolder(path, wanted, task)
        held.callback(folder.close)
        yield folder


@contextlib.contextmanager
def open_task(path: Path, wanted: Settings, task: Task) -> Iterator[SampleFolder]:
    """Lock the images of a task, in a folder that another process holds for all its tasks."""
    with files.lock(path, SAMPLE, name=_lock_name(task.images), patience=PATIENCE):
        folder = SampleFolder(path, wanted, task)
        try:
            yield folder
        finally:
            folder.close()


def _lock_name(images: range) -> str:
    return f".lock-{images[0]:0{DIGITS}d}-{images[-1]:0{DIGITS}d}"


def _task_locks(path: Path) -> dict[str, range]:
    """The locks of tasks that work in a folder, or did, and the images of each."""
    found = (re.fullmatch(r"\.lock-(\d+)-(\d+)", name) for name in os.listdir(path))
    return {match[0]: range(int(match[1]), int(match[2]) + 1) for match in found if match}


def _wait_for_tasks(path: Path) -> None:
    """Whoever holds the folder waits for its tasks to end, such as those of a killed command."""
    for name in _task_locks(path):
        with files.lock(path, SAMPLE, name=name, patience=PATIENCE):
            (path / name).unlink()


@contextlib.contextmanager
def _share(path: Path, wanted: Settings, images: range) -> Iterator[None]:
    """Lock some images; until then, the folder, so that tasks look at it one after another."""
    with contextlib.ExitStack() as held:
        with files.lock(path, SAMPLE, patience=PATIENCE):
            for name, others in _task_locks(path).items():
                if images.start < others.stop and others.start < images.stop:
                    held.enter_context(_unused(path, name, others))
            there = manifests(path)
            for manifest in there[:1] + there[-1:]:  # all tasks before this one did the same
                for text in islice(_texts(manifest), 1):
                    read_line(text, wanted, path)
            if not there:
                refuse_foreign(os.listdir(path), wanted, path)
                for part in path.glob(f"{PART}*"):
                    part.unlink()
            own = path / task_manifest(images.start)
            if not own.is_file():
                files.write_atomic(own, json_line(wanted))
            if _lock_name(images) not in _task_locks(path):
                held.enter_context(files.lock(path, SAMPLE, name=_lock_name(images)))
        yield


@contextlib.contextmanager
def _unused(path: Path, name: str, images: range) -> Iterator[None]:
    """Hold the lock of a task, which must have ended."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(files.lock(path, SAMPLE, name=name))
        except UsageError as error:
            raise UsageError(
                f"images {images[0]} to {images[-1]} are being made in {path} by another {SAMPLE}; "
                "tasks that share a folder need --first and -n that do not overlap"
            ) from error
        yield


def _known(path: Path, wanted: Settings, images: range) -> tuple[Line, ...]:
    """What the manifests of others say of some images."""
    others = [other for other in manifests(path) if other.name != task_manifest(images.start)]
    lines = (read_line(text, wanted, path) for text in chain.from_iterable(map(_texts, others)))
    return tuple(line for line in lines if line and position(line) in images)


def _clear(path: Path) -> None:
    """Remove what `lutdeploy sample` makes, and nothing else."""
    for entry in path.iterdir():
        name = entry.name.removeprefix(PART)
        if name not in (MANIFEST, *EXTRAS) and not is_task_manifest(name) and not is_ours(name):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def fill(
    folder: SampleFolder,
    denoiser: Denoiser,
    schedule: Schedule,
    n: int,
    batch: int,
    first: int = 0,
    encoders: int | None = None,
) -> Iterator[int]:
    """Make the missing ones of images first … first+n−1; yields how many each batch finished.

    While a batch computes, a thread makes the noise of the next ones, ``encoders`` threads encode
    the pictures before it, and one stores those. What is stored stays when an error ends this.
    """
    check_schedule(denoiser, schedule)
    seed, shape = folder.settings["seed"], denoiser.config.image_shape
    missing = folder.writer.missing(n, first)
    noise = ahead(noise_batches(seed, missing, batch, shape), NOISE_AHEAD)
    with contextlib.closing(noise), Storing(folder.writer, encoders) as storing:
        for indices, ends in finished_batches(denoiser, noise, schedule, pixels=True):
            storing.put(indices, ends)
            yield len(indices)
        storing.finish()


class Storing:
    """Encodes pictures in several threads, and stores them in order in another."""

    def __init__(self, writer: PictureWriter, encoders: int | None = None) -> None:
        self._writer = writer
        encoders = encoders or min(processors(), MOST_ENCODERS)
        self._encoders = ThreadPoolExecutor(encoders, "encode")
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


def write_grid(folder: Folder, n: int) -> object:
    """grid.png: the first pictures of the folder, at most 256."""
    shown = folder.first(min(n, GRID_IMAGES))
    texts = sheet_texts(folder.settings, len(shown) - 1)
    return folder.write_extra("grid.png", images.encode_png(images.grid(shown), texts))


def write_trajectory(
    folder: Folder, denoiser: Denoiser, schedule: Schedule, n: int, png: bool, gif: bool
) -> list[object]:
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
