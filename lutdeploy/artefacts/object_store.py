"""Pictures in an object store, such as s3://bucket/prefix, through fsspec.

An object appears whole or not at all, and cannot grow or be locked. So a place takes tar shards
alone: each is made in a temporary folder of this machine, as on any disk, uploaded, and then listed
in a manifest of its own, which the end of a command joins to manifest.jsonl.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Generator, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from lutdeploy.artefacts import sample_folder
from lutdeploy.artefacts.picture_files import (
    MANIFEST,
    Line,
    Settings,
    TarShards,
    Task,
    is_task_manifest,
    json_line,
    pictures_of_shard,
    task_manifest,
)
from lutdeploy.artefacts.sample_folder import (
    EXTRAS,
    SampleFolder,
    TaskOpener,
    is_ours,
    joined,
    open_folder,
    position,
    read_line,
    refuse_foreign,
)
from lutdeploy.errors import (
    ArtefactError,
    LutDeployError,
    UsageError,
    first_line,
    needing,
    ran_out_of_memory,
)
from lutdeploy.images import Pixels
from lutdeploy.sampling import Denoiser
from lutdeploy.schedule import Schedule

# What fsspec needs besides itself, where an extra of lutdeploy brings it.
FILESYSTEMS = {"s3": "s3fs", "s3a": "s3fs"}


class Store:
    """The objects below an address, by their names."""

    def __init__(self, url: str) -> None:
        scheme = url.partition("://")[0]
        with needing(f"--out {scheme}://…"):
            import fsspec

            if scheme in FILESYSTEMS:
                __import__(FILESYSTEMS[scheme])
        self.url = url.rstrip("/")
        try:
            with _asking(url):
                # A listing that it kept would not show what other processes have written since.
                self._files, self._root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        except ArtefactError as error:
            cause = error.__cause__
            if isinstance(cause, ImportError | ValueError):  # a package, or no such protocol
                raise UsageError(f"--out {url}: {first_line(cause)}") from error
            raise

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def sizes(self) -> dict[str, int]:
        """The bytes of every object."""
        with _asking(self.url):
            try:
                found = self._files.ls(self._root, detail=True, refresh=True)
            except FileNotFoundError:
                return {}
        return {entry["name"].rpartition("/")[2]: entry["size"] or 0 for entry in found}

    def read(self, names: Iterable[str]) -> list[bytes]:
        """Whole objects, several at a time."""
        paths = [self._path(name) for name in names]
        with _asking(self.url):
            found = self._files.cat(paths) if paths else {}
        return [found[path] for path in paths]

    def write(self, name: str, data: bytes) -> None:
        with _asking(self.url):
            self._files.pipe_file(self._path(name), data)

    def upload(self, path: Path, name: str) -> None:
        with _asking(self.url):
            self._files.put_file(str(path), self._path(name))

    def download(self, name: str, path: Path) -> None:
        with _asking(self.url):
            self._files.get_file(self._path(name), str(path))

    def remove(self, names: Iterable[str]) -> None:
        paths = [self._path(name) for name in names]
        with _asking(self.url):
            if paths:
                self._files.rm(paths)

    def first_pictures(self, name: str) -> Iterator[Pixels]:
        """The pictures of a shard, of which no more is read than is taken."""
        with _asking(f"{self.url}/{name}"), self._files.open(self._path(name), "rb") as file:
            yield from pictures_of_shard(file)


@contextlib.contextmanager
def _asking(url: str) -> Iterator[None]:
    """Make one line of what a store, or the network on the way, says."""
    try:
        yield
    except LutDeployError:
        raise
    except Exception as error:  # each store's client has errors of its own
        if ran_out_of_memory(error):
            raise
        said = first_line(error) or type(error).__name__
        raise ArtefactError(
            f"{url}: {said}; check the address, the rights and the network"
        ) from error


class ObjectFolder:
    """Tar shards below an address, with pictures of one set of settings."""

    def __init__(self, url: str, wanted: Settings, overwrite: bool, images: range | None) -> None:
        self.url, self.settings = url, wanted
        self._store, self._images = Store(url), images
        if overwrite:
            self._store.remove(filter(_written_here, self._store.sizes()))
        self.reload()

    def reload(self) -> None:
        sizes = self._store.sizes()
        manifests = [name for name in sizes if name == MANIFEST or is_task_manifest(name)]
        of_tasks = [name for name in manifests if name != MANIFEST]
        if not manifests:
            refuse_foreign(sizes, self.settings, self.url)
        texts = [
            text
            for data in self._store.read(manifests)
            for text in data.decode(errors="replace").splitlines(keepends=True)
        ]
        lines = (read_line(text, self.settings, self.url) for text in texts)
        self._lines: dict[int, Line] = {
            position(line) // TarShards.per_file: line
            for line in lines
            if line and sizes.get(line["file"]) == line["bytes"]
        }
        if self._images is not None:
            if not manifests:
                self._store.write(task_manifest(self._images.start), json_line(self.settings))
        elif of_tasks or not manifests:
            told = [json_line(self.settings).decode()]
            told += [json_line({**line, **self.settings}).decode() for line in self._lines.values()]
            self._store.write(MANIFEST, joined(iter(told), self.settings, self.url))
            self._store.remove(of_tasks)

    def lacking(self, n: int, first: int = 0) -> int:
        return sum(
            task.count - _pictures(task.known) for task in self._tasks(range(first, first + n))
        )

    def tasks(self, n: int, size: int) -> Iterator[Task]:
        return self._tasks(range(n))

    def _tasks(self, images: range) -> Iterator[Task]:
        for start in range(images.start, images.stop, TarShards.per_file):
            line = self._lines.get(start // TarShards.per_file)
            count = min(TarShards.per_file, images.stop - start)
            task = Task(start, count, (line,) if line else ())
            if _pictures(task.known) < count:
                yield task

    def fill(
        self, denoiser: Denoiser, schedule: Schedule, n: int, batch: int, first: int = 0
    ) -> Generator[int, None, None]:
        opener = self.opener()
        for task in list(self._tasks(range(first, first + n))):
            with opener(task) as part:
                yield from sample_folder.fill(
                    part, denoiser, schedule, task.count, batch, task.first
                )
        self.finish()

    def finish(self) -> None:
        self.reload()

    def opener(self) -> TaskOpener:
        return functools.partial(open_task, self.url, self.settings)

    def adopt(self, task: Task) -> None:
        """Nothing: the end of the command joins all manifests."""

    def first(self, n: int) -> Pixels:
        shards = sorted(line["file"] for line in self._lines.values())
        found = chain.from_iterable(map(self._store.first_pictures, shards))
        return np.stack(list(islice(found, n)))

    def write_extra(self, name: str, data: bytes) -> str:
        self._store.write(name, data)
        return f"{self.url}/{name}"

    def progress(self, n: int, first: int = 0) -> str:
        self.reload()
        there = n - self.lacking(n, first)
        return f"{there} of {n} images are in {self.url}; the same command makes the others"


def _pictures(lines: Iterable[Line]) -> int:
    return sum(line["images"] for line in lines)


def _written_here(name: str) -> bool:
    return name in (MANIFEST, *EXTRAS) or is_task_manifest(name) or is_ours(name)


@contextlib.contextmanager
def open_task(url: str, wanted: Settings, task: Task) -> Iterator[SampleFolder]:
    """A temporary folder for the one shard of a task, which is uploaded where nothing failed."""
    with tempfile.TemporaryDirectory(prefix="lutdeploy-") as name:
        place, store = Path(name), Store(url)
        (place / MANIFEST).write_bytes(
            b"".join(json_line({**line, **wanted}) for line in ({}, *task.known))
        )
        for line in task.known:
            store.download(line["file"], place / line["file"])
        with open_folder(place, wanted) as folder:
            yield folder
        (shard,) = place.glob("[0-9]*.tar")
        *_, told = (place / MANIFEST).read_bytes().splitlines(keepends=True)
        store.upload(shard, shard.name)
        store.write(task_manifest(task.first), told)
