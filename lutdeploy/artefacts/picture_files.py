"""How sampled pictures lie on disk: a PNG for each, one npz, or tar shards for WebDataset.

A picture of a finished file has its facts in a manifest before the file takes its name. Files
with many pictures grow beside their place, at their end alone: what a kill leaves is whole but for
its last picture, and goes on from there. The same pictures give the same bytes, however often
their making was stopped.

The manifest is manifest.jsonl. Where several tasks fill a folder at once, each has one of its own
beside it, manifest-FIRST.jsonl, until a command that has the folder to itself joins them.
"""

from __future__ import annotations

import abc
import contextlib
import io
import json
import math
import os
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol

import numpy as np
from numpy.lib import format as npy

from lutdeploy import images
from lutdeploy.artefacts import files
from lutdeploy.artefacts.picture_text import picture_chunks
from lutdeploy.errors import ArtefactError, ran_out_of_memory
from lutdeploy.images import Pixels
from lutdeploy.sampling import in_batches

MANIFEST = "manifest.jsonl"
DIGITS = 6  # at least, in the name of a picture or a shard
NPZ = "pictures.npz"
SHARD_IMAGES = 10_000
BLOCK = 512  # bytes, of a tar file
COPIED = 2**16  # bytes, or indices, at a time
PART = ".part-"  # before the name of a file that is growing

Settings = dict[str, Any]
Line = dict[str, Any]


def task_manifest(first: int) -> str:
    """The name of the manifest of the task whose first picture this is."""
    return f"manifest-{first:0{DIGITS}d}.jsonl"


def manifests(folder: Path) -> list[Path]:
    """Those that are there: the folder's own, then those of tasks."""
    found = [
        path for path in sorted(folder.glob("manifest-*.jsonl")) if is_task_manifest(path.name)
    ]
    return [path for path in (folder / MANIFEST,) if path.is_file()] + found


def is_task_manifest(name: str) -> bool:
    first = name.removeprefix("manifest-").removesuffix(".jsonl")
    return first.isdecimal() and name == task_manifest(int(first))


@dataclass(frozen=True)
class Prepared:
    """Pictures as they will be stored: bytes for each index, which differ by format."""

    indices: Sequence[int]
    data: Sequence[bytes]
    shape: tuple[int, ...]  # of a picture: S, S, C


class PictureWriter(Protocol):
    """What fills a locked folder with pictures of one format and the same settings."""

    def missing(self, n: int, first: int = 0) -> Sequence[int]:
        """Those of images first … first+n−1 that are not there yet, in order."""

    def tasks(self, n: int, size: int) -> Iterator[Task]:
        """Those that together make what is missing of images 0 … n−1.

        A task is of a file, or of ``size`` pictures at most that are a file each.
        """

    def prepare(self, indices: Sequence[int], pixels: Pixels) -> Prepared:
        """Encode uint8 [len(indices), S, S, C]; several threads may do so at once."""

    def store(self, prepared: Prepared) -> None:
        """Keep what was prepared: one thread at a time, in the order of :meth:`missing`."""

    def finish(self) -> None:
        """All that was missing is stored: finish the files that were growing."""

    def first(self, n: int) -> Pixels:
        """The first n stored pictures, uint8 [n, S, S, C]."""

    def close(self) -> None:
        """Close the files; what is stored stays."""


class ManifestLog:
    """A manifest, opened once, growing by whole lines."""

    def __init__(self, folder: Path, task: range | None = None) -> None:
        self._path = folder / (MANIFEST if task is None else task_manifest(task.start))
        self._file: io.FileIO | None = None

    def append(self, lines: bytes) -> None:
        if self._file is None:
            self._file = files.open_append(self._path)
        _write_all(self._file, lines)

    def replace(self, lines: bytes) -> None:
        """Write it anew."""
        self.close()
        files.write_atomic(self._path, lines)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _write_all(file: io.FileIO, data: bytes) -> None:
    """Write without a buffer, which would try again at close what the disk had no room for."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def json_line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


class PngFiles:
    """A PNG for each picture, and a line in the manifest."""

    SUFFIX = ".png"
    LINE: ClassVar = {"image": str, "index": int}

    def __init__(
        self, path: Path, settings: Settings, lines: Iterable[Line], task: range | None = None
    ) -> None:
        self._path, self._settings = path, settings
        self._shown = os.path.join(path, "")  # text, as a Path takes as long as a file
        self._hidden = self._shown + "."
        self._listed = {line["index"] for line in lines if line}
        self._log = ManifestLog(path, task)

    @staticmethod
    def name(index: int) -> str:
        return f"{index:0{DIGITS}d}.png"

    def missing(self, n: int, first: int = 0) -> Sequence[int]:
        wanted = range(first, first + n)
        if not self._listed:
            return wanted
        there = {entry.name for entry in os.scandir(self._path) if entry.is_file()}
        return [i for i in wanted if i not in self._listed or self.name(i) not in there]

    def tasks(self, n: int, size: int) -> Iterator[Task]:
        missing = self.missing(n)
        if isinstance(missing, range):
            groups: Iterable[Sequence[int]] = in_batches(missing, size)
        else:  # the difference of index and place is the same in a row without a gap
            rows = groupby(enumerate(missing), lambda row: row[1] - row[0])
            groups = chain.from_iterable(
                in_batches([index for _, index in row], size) for _, row in rows
            )
        return (Task(group[0], len(group)) for group in groups)

    def prepare(self, indices: Sequence[int], pixels: Pixels) -> Prepared:
        lines, texts = [], picture_chunks(self._settings, indices)
        for index, data in zip(indices, images.encode_pictures(pixels, texts), strict=True):
            name = self.name(index)
            with open(self._hidden + name, "wb", buffering=0) as file:
                _write_all(file, data)
            lines.append(json_line({"image": name, "index": index, **self._settings}))
        return Prepared(indices, lines, pixels.shape[1:])

    def store(self, prepared: Prepared) -> None:
        new = zip(prepared.indices, prepared.data, strict=True)
        self._log.append(b"".join(line for index, line in new if index not in self._listed))
        self._listed.update(prepared.indices)
        for index in prepared.indices:
            name = self.name(index)
            os.replace(self._hidden + name, self._shown + name)

    def finish(self) -> None:
        """Every picture is a whole file already."""

    def first(self, n: int) -> Pixels:
        return np.stack([self._read(self._path / self.name(index)) for index in range(n)])

    def _read(self, path: Path) -> Pixels:
        try:
            return images.decode_png(path)
        except Exception as error:  # decoders raise almost anything on bad bytes
            if ran_out_of_memory(error):
                raise
            raise _damaged(path) from error

    def close(self) -> None:
        self._log.close()


def _damaged(path: Path) -> ArtefactError:
    return ArtefactError(f"{path} is damaged; delete it, and the same command makes it again")


@dataclass(frozen=True)
class Task:
    """Images ``first`` … ``first + count − 1``, of a folder that several fill at once.

    ``known``: what the folder's manifest says of files that they are to be added to.
    """

    first: int
    count: int
    known: tuple[Line, ...] = ()

    @property
    def images(self) -> range:
        return range(self.first, self.first + self.count)


@dataclass
class _Growing:
    """The file that is being written: its number, and the pictures in it so far."""

    number: int
    count: int
    file: io.FileIO


class ManyPerFile(abc.ABC):
    """Files of ``per_file`` pictures in order; the last may have fewer, and grow later.

    The manifest's first line holds the settings alone, then each finished file has one with its
    first index, number of pictures, size and SHA-256.
    """

    LINE: ClassVar = {"file": str, "first": int, "images": int, "bytes": int, "sha256": str}
    per_file: int

    def __init__(
        self, path: Path, settings: Settings, found: Iterable[Line], task: range | None = None
    ) -> None:
        self._path, self._settings, self._task = path, settings, task
        self._log = ManifestLog(path, task)
        self._growing: _Growing | None = None
        lines = list(found)
        if not lines and task is None:  # nothing says of what settings the parts are
            for part in path.glob(f"{PART}*"):
                part.unlink()
            self._log.replace(json_line(settings))
        # A file may be lost, or have a second line if a kill came before its name: the size tells.
        self._lines = {
            line["file"]: line
            for line in lines
            if line
            and line["file"] == self.name(line["first"] // self.per_file)
            and _size(path / line["file"]) == line["bytes"]
        }
        if len(self._lines) < sum(map(bool, lines)):
            self._write_manifest()
        self._parts = dict(self._leftovers())

    @abc.abstractmethod
    def name(self, number: int) -> str:
        """The name of a file."""

    @abc.abstractmethod
    def number(self, name: str) -> int:
        """The number of a file."""

    @abc.abstractmethod
    def prepare(self, indices: Sequence[int], pixels: Pixels) -> Prepared: ...

    @abc.abstractmethod
    def begin(self, file: BinaryIO, shape: tuple[int, ...], finished: Path | None) -> None:
        """Begin a part, with the pictures of the ``finished`` file that it will replace."""

    @abc.abstractmethod
    def whole(self, file: BinaryIO, first: int) -> tuple[int, int]:
        """How many whole pictures a part begins with, and the bytes that they take."""

    @abc.abstractmethod
    def seal(self, part: Path, first: int, count: int) -> Path:
        """Make a whole file of a part; where it lies, beside its place."""

    def _leftovers(self) -> Iterator[tuple[str, int]]:
        """The parts that an earlier command left, and how many pictures each begins with."""
        for part in self._path.glob(f"{PART}*"):
            name = part.name.removeprefix(PART)
            first = self.number(name) * self.per_file
            if self._task is not None and first not in self._task:
                continue
            with part.open("r+b") as file:
                count, end = self.whole(file, first)
                file.truncate(end)
            if count > self._finished(name):
                yield name, count
            else:
                part.unlink()

    def _finished(self, name: str) -> int:
        return self._lines[name]["images"] if name in self._lines else 0

    def _there(self, number: int) -> int:
        name = self.name(number)
        return max(self._finished(name), self._parts.get(name, 0))

    def missing(self, n: int, first: int = 0) -> Sequence[int]:
        gaps = [gap for _, gap in self._gaps(n, first)]
        if gaps and sum(map(len, gaps)) == first + n - gaps[0].start:
            return range(gaps[0].start, first + n)  # the common case, in no memory
        return list(chain.from_iterable(gaps))

    def _gaps(self, n: int, first: int = 0) -> Iterator[tuple[int, range]]:
        """The numbers of files that lack some of images first … first+n−1, and which."""
        for number in range(first // self.per_file, -(-(first + n) // self.per_file)):
            start = number * self.per_file
            end = min(start + self.per_file, first + n)
            gap = range(max(first, start + self._there(number)), end)
            if gap:
                yield number, gap

    def tasks(self, n: int, size: int) -> Iterator[Task]:
        for number, gap in self._gaps(n):
            first, name = number * self.per_file, self.name(number)
            known = (self._lines[name],) if name in self._lines else ()
            yield Task(first, gap.stop - first, known)

    def store(self, prepared: Prepared) -> None:
        for index, data in zip(prepared.indices, prepared.data, strict=True):
            number, row = divmod(index, self.per_file)
            if self._growing is None or self._growing.number != number:
                self._finish_growing()
                self._growing = self._open(number, prepared.shape)
            growing = self._growing
            assert growing.count == row, "pictures are stored in order"
            _write_all(growing.file, data)
            growing.count = self._parts[self.name(number)] = row + 1

    def _open(self, number: int, shape: tuple[int, ...]) -> _Growing:
        name = self.name(number)
        part = self._path / f"{PART}{name}"
        if name not in self._parts:
            finished = self._path / name if self._finished(name) else None
            if finished and files.sha256(finished) != self._lines[name]["sha256"]:
                raise _damaged(finished)
            with part.open("wb") as begun:
                self.begin(begun, shape, finished)
            self._parts[name] = self._finished(name)
        return _Growing(number, self._parts[name], files.open_append(part))

    def _finish_growing(self) -> None:
        if self._growing is not None:
            self._growing.file.close()
            self._finish(self.name(self._growing.number))
            self._growing = None

    def finish(self) -> None:
        self._finish_growing()
        for name in list(self._parts):  # whole when a kill came
            self._finish(name)

    def _finish(self, name: str) -> None:
        part, count = self._path / f"{PART}{name}", self._parts[name]
        first = self.number(name) * self.per_file
        sealed = self.seal(part, first, count)
        line = {
            "file": name,
            "first": first,
            "images": count,
            "bytes": sealed.stat().st_size,
            "sha256": files.sha256(sealed),
        }
        self._log.append(json_line({**line, **self._settings}))
        os.replace(sealed, self._path / name)
        part.unlink(missing_ok=True)
        del self._parts[name]
        last = next(reversed(self._lines.values()), None)
        self._lines[name] = line
        if last is not None and first <= last["first"]:
            self._write_manifest()

    def _write_manifest(self) -> None:
        """One line for each file, in order."""
        lines = sorted(self._lines.values(), key=lambda line: line["first"])
        self._lines = {line["file"]: line for line in lines}
        told = [self._settings, *({**line, **self._settings} for line in lines)]
        self._log.replace(b"".join(map(json_line, told)))

    def first(self, n: int) -> Pixels:
        names = (self.name(number) for number in range(-(-n // self.per_file)))
        found = chain.from_iterable(pictures_in(self._path / name) for name in names)
        return np.stack(list(islice(found, n)))

    def close(self) -> None:
        self._log.close()
        if self._growing is not None:
            self._growing.file.close()


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


class TarShards(ManyPerFile):
    """Shards of 10,000 samples, 000000.tar and so on, as WebDataset reads them.

    A sample is NNNNNN.png and NNNNNN.json, the picture's index and settings.
    """

    SUFFIX = ".tar"
    per_file = SHARD_IMAGES

    def name(self, number: int) -> str:
        return f"{number:0{DIGITS}d}.tar"

    def number(self, name: str) -> int:
        return int(name.removesuffix(".tar"))

    def prepare(self, indices: Sequence[int], pixels: Pixels) -> Prepared:
        samples, texts = [], picture_chunks(self._settings, indices)
        for index, data in zip(indices, images.encode_pictures(pixels, texts), strict=True):
            told = json.dumps({"index": index, **self._settings}).encode()
            samples.append(_member(index, ".png", data) + _member(index, ".json", told))
        return Prepared(indices, samples, pixels.shape[1:])

    def begin(self, file: BinaryIO, shape: tuple[int, ...], finished: Path | None) -> None:
        if finished is not None:
            with finished.open("rb") as source:
                _copy(source, file, finished.stat().st_size - len(TAR_END))

    def whole(self, file: BinaryIO, first: int) -> tuple[int, int]:
        count = end = 0
        for number, (name, start, size) in enumerate(_members(file)):
            row, second = divmod(number, 2)
            if name != _sample(first + row) + (".png", ".json")[second]:
                break
            if second:
                count, end = row + 1, start + _padded(size)
        return count, end

    def seal(self, part: Path, first: int, count: int) -> Path:
        with part.open("ab") as file:
            file.write(TAR_END)
            file.flush()
            os.fsync(file.fileno())
        return part


TAR_END = bytes(2 * BLOCK)


def _sample(index: int) -> str:
    return f"{index:0{DIGITS}d}"


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _member(index: int, suffix: str, data: bytes) -> bytes:
    """A file in a tar: header and data, the same bytes whoever writes them, and when."""
    header = tarfile.TarInfo(_sample(index) + suffix)
    header.size = len(data)
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(_padded(len(data)) - len(data))


def _members(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """The whole files that a tar begins with: name, where the data lies, and its size."""
    whole, end = file.seek(0, os.SEEK_END), 0
    while True:
        file.seek(end)
        try:
            header = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "strict")
        except tarfile.HeaderError:
            return
        start = end + BLOCK
        end = start + _padded(header.size)
        if end > whole:
            return
        yield header.name, start, header.size


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        data = source.read(min(size, COPIED))
        if not data:
            raise EOFError("the file ends early")
        target.write(data)
        size -= len(data)


class OneNpz(ManyPerFile):
    """pictures.npz: ``images`` uint8 [n, S, S, C], ``indices`` int64 [n], ``settings`` JSON.

    Not compressed: that takes as long as PNGs and saves 8%. A part is an npy file of ``images``
    whose header does not know n yet.
    """

    SUFFIX = ".npz"
    per_file = 2**63

    def name(self, number: int) -> str:
        return NPZ

    def number(self, name: str) -> int:
        return 0

    def prepare(self, indices: Sequence[int], pixels: Pixels) -> Prepared:
        return Prepared(indices, [picture.tobytes() for picture in pixels], pixels.shape[1:])

    def begin(self, file: BinaryIO, shape: tuple[int, ...], finished: Path | None) -> None:
        _npy_header(file, np.dtype(np.uint8), (0, *shape))
        if finished is not None:
            with _npz_images(finished) as (source, (n, *_)):
                _copy(source, file, n * math.prod(shape))

    def whole(self, file: BinaryIO, first: int) -> tuple[int, int]:
        try:
            shape = _read_npy_header(file)
        except Exception:  # it is cut off within the header, whose decoder raises almost anything
            return 0, 0
        start, picture = file.tell(), math.prod(shape[1:])
        count = (os.fstat(file.fileno()).st_size - start) // picture
        return count, start + count * picture

    def seal(self, part: Path, first: int, count: int) -> Path:
        sealed = part.with_name(f".{NPZ}.new")
        try:
            with sealed.open("wb") as file, part.open("rb") as source:
                self._write(file, source, first, count)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            sealed.unlink(missing_ok=True)
            raise
        return sealed

    def _write(self, file: BinaryIO, part: BinaryIO, first: int, count: int) -> None:
        shape = (count, *_read_npy_header(part)[1:])
        with zipfile.ZipFile(file, "w") as archive:
            with _npz_array(archive, "images") as array:
                _npy_header(array, np.dtype(np.uint8), shape)
                _copy(part, array, math.prod(shape))
            with _npz_array(archive, "indices") as array:
                _npy_header(array, np.dtype("<i8"), (count,))
                for start in range(first, first + count, COPIED):
                    stop = min(start + COPIED, first + count)
                    array.write(np.arange(start, stop, dtype="<i8").tobytes())
            with _npz_array(archive, "settings") as array:
                npy.write_array(array, np.array(json.dumps(self._settings)))


@contextlib.contextmanager
def _npz_array(archive: zipfile.ZipFile, name: str) -> Iterator[Any]:
    """An array of an npz, to be written; without a date, so that bytes are reproducible."""
    entry = zipfile.ZipInfo(f"{name}.npy")
    entry.create_system = 3  # as on Unix everywhere
    with archive.open(entry, "w", force_zip64=True) as file:
        yield file


def _npy_header(file: Any, kind: np.dtype[Any], shape: tuple[int, ...]) -> None:
    told = {"descr": npy.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, told)


def _read_npy_header(file: Any) -> tuple[int, ...]:
    """The shape of a uint8 npy file; its pixels come next."""
    npy.read_magic(file)
    shape, fortran, kind = npy.read_array_header_1_0(file)
    if fortran or kind != np.uint8 or min(shape[1:], default=0) < 1:
        raise ValueError(f"holds {kind} {shape}, not uint8 pictures")
    return shape


@contextlib.contextmanager
def _npz_images(path: Path) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """``images`` of an npz, at its first pixel, and its shape [n, S, S, C]."""
    with zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
        if archive.getinfo("images.npy").compress_type != zipfile.ZIP_STORED:
            raise ValueError("is compressed")  # a few bytes could unpack to fill the memory
        yield file, _read_npy_header(file)


def pictures_of_shard(file: BinaryIO) -> Iterator[Pixels]:
    """The pictures of a tar shard, uint8 [S, S, C], one by one."""
    from lutdeploy.decoding import decode  # with what reads other kinds, which nobody writes here

    for name, start, size in _members(file):
        if name.endswith(".png"):
            file.seek(start)
            yield decode(file.read(size)).pixels
    file.seek(-len(TAR_END), os.SEEK_END)
    if file.read() != TAR_END:
        raise EOFError("the shard ends early")


def pictures_in(path: Path) -> Iterator[Pixels]:
    """The pictures of ``pictures.npz`` or a tar shard, uint8 [S, S, C], one by one.

    Raises:
        ArtefactError: the file is missing or damaged.
    """
    try:
        if path.suffix == ".npz":
            with _npz_images(path) as (file, (n, *shape)):
                for _ in range(n):
                    data = file.read(math.prod(shape))
                    yield np.frombuffer(data, np.uint8).reshape(shape)
        else:
            with path.open("rb") as file:
                yield from pictures_of_shard(file)
    except Exception as error:  # decoders raise almost anything on bad bytes
        if ran_out_of_memory(error):
            raise
        raise _damaged(path) from error


WRITERS: dict[str, type[PngFiles] | type[TarShards] | type[OneNpz]] = {
    "png": PngFiles,
    "npz": OneNpz,
    "webdataset": TarShards,
}

# What lines of the manifest say besides the settings.
FACTS = frozenset(chain.from_iterable(writer.LINE for writer in WRITERS.values()))
