"""Pictures on disk: what each format holds, and that it can be stopped anywhere."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lutdeploy import images, sampling
from lutdeploy.artefacts import picture_files, sample_folder
from lutdeploy.artefacts.picture_files import PART, OneNpz, PngFiles, TarShards
from lutdeploy.config import ModelConfig
from lutdeploy.errors import ArtefactError, UsageError
from lutdeploy.images import Pixels
from lutdeploy.sampling import Batch, Finished, Images, ahead
from lutdeploy.schedule import Schedule, Step, solver_schedule

N, SIDE = 25, 8
SCHEDULE = solver_schedule("euler", 1)
FORMATS = sample_folder.FORMATS
TOGETHER = ("npz", "webdataset")


class Noise:
    """A streaming denoiser whose pictures are their noise, in pieces of at most three."""

    config = ModelConfig(image_size=SIDE, width=64, depth=1)
    schedule: Schedule | None = None
    whole_trajectory = False

    def stream(
        self, batches: Iterable[Batch], schedule: Schedule, pixels: bool
    ) -> Iterator[Finished]:
        assert pixels
        for indices, noise in batches:
            for start in range(0, len(indices), 3):
                part = slice(start, start + 3)
                yield indices[part], images.to_uint8(noise[part])

    def predict_x0(self, x: Images, t: object) -> Images:
        raise NotImplementedError

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        raise NotImplementedError

    def run(self, noise: Images) -> Images:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TarShards, "per_file", 10)


def expected(n: int = N) -> Pixels:
    return images.to_uint8(sampling.batch_noise(3, range(n), Noise.config.image_shape))


def fill(
    out: Path, file_format: str, n: int = N, batch: int = 4, images: range | None = None
) -> int:
    """How many pictures were made."""
    settings = {"seed": 3, "backend": "none", "format": file_format}
    wanted = images or range(n)
    with sample_folder.open_folder(out, settings, images=images) as folder:
        made = sample_folder.fill(folder, Noise(), SCHEDULE, len(wanted), batch, wanted.start)
        return sum(made)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


def stored(out: Path, file_format: str, n: int = N) -> Pixels:
    settings = {"seed": 3, "backend": "none", "format": file_format}
    with sample_folder.open_folder(out, settings) as folder:
        assert not folder.writer.missing(n)
        return folder.writer.first(n)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What nobody stopped."""
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TarShards, "per_file", 10)
        for file_format in FORMATS:
            out = tmp_path_factory.mktemp(file_format)
            assert fill(out, file_format) == N
            found[file_format] = contents(out)
    return found


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_format_holds_the_pictures(file_format: str, tmp_path: Path) -> None:
    fill(tmp_path, file_format)
    np.testing.assert_array_equal(stored(tmp_path, file_format), expected())
    assert fill(tmp_path, file_format) == 0


def test_npz_as_numpy_reads_it(tmp_path: Path) -> None:
    fill(tmp_path, "npz")
    with np.load(tmp_path / "pictures.npz", allow_pickle=False) as arrays:
        assert arrays["images"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["images"], expected())
        assert arrays["indices"].tolist() == list(range(N))
        assert json.loads(str(arrays["settings"]))["seed"] == 3
    assert sorted(contents(tmp_path)) == ["manifest.jsonl", "pictures.npz"]


def test_shards_as_webdataset_reads_them(tmp_path: Path) -> None:
    """Samples are neighbours in the tar with one key; shards begin at multiples of their size."""
    fill(tmp_path, "webdataset")
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [line.get("images") for line in lines] == [None, 10, 10, 5]
    index = 0
    for line in lines[1:]:
        data = (tmp_path / line["file"]).read_bytes()
        assert line["bytes"] == len(data)
        assert line["sha256"] == hashlib.sha256(data).hexdigest()
        assert line["first"] == index
        with tarfile.open(tmp_path / line["file"]) as archive:
            members = archive.getmembers()
            for picture, told in zip(members[::2], members[1::2], strict=True):
                key = f"{index:06d}"
                assert (picture.name, told.name) == (f"{key}.png", f"{key}.json")
                png, facts = (archive.extractfile(member) for member in (picture, told))
                assert png is not None and facts is not None
                np.testing.assert_array_equal(images.decode_png(png.read()), expected()[index])
                assert json.load(facts) == {
                    "index": index,
                    "seed": 3,
                    "backend": "none",
                    "format": "webdataset",
                }
                index += 1
    assert index == N


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("first", [7, 10, 13])
def test_more_pictures_are_added(
    first: int, file_format: str, tmp_path: Path, unbroken: dict[str, dict[str, bytes]]
) -> None:
    """The bytes are those of one command, whatever the batches."""
    assert fill(tmp_path, file_format, first, batch=5) == first
    assert fill(tmp_path, file_format, N, batch=9) == N - first
    assert contents(tmp_path) == unbroken[file_format]


class KilledError(Exception):
    """In place of a kill: nothing is caught or cleaned on its account."""


Kill = Callable[[int, pytest.MonkeyPatch], None]  # plants one at the call with this number


def at_a_write(stop: int, patched: pytest.MonkeyPatch) -> None:
    """From the write with this number on there are none; that one is cut in half."""
    write, calls = picture_files._write_all, itertools.count()

    def cut(file: io.FileIO, data: bytes) -> None:
        now = next(calls)
        if now <= stop:
            write(file, data if now < stop else data[: len(data) // 2])
        if now >= stop:
            raise KilledError

    patched.setattr(picture_files, "_write_all", cut)


def before_a_call(*places: tuple[Any, str]) -> Kill:
    """From the call with a number on, of any of these functions of modules or classes."""

    def plant(stop: int, patched: pytest.MonkeyPatch) -> None:
        calls = itertools.count()

        def dying(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any) -> Any:
                if next(calls) >= stop:
                    raise KilledError
                return function(*given)

            return call

        for owner, name in places:
            patched.setattr(owner, name, dying(getattr(owner, name)))

    return plant


KILLS = {"write": at_a_write, "renaming": before_a_call((os, "replace"))}


def folders_of_the_killed(
    work: Callable[[Path], object],
    kill: Kill,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[Path], object] = lambda out: None,
) -> Iterator[Path]:
    """A folder for every moment at which ``work`` in it can be killed, after that has happened."""
    for stop in itertools.count():
        out = base / str(stop)
        before(out)
        with monkeypatch.context() as patched:
            kill(stop, patched)
            try:
                work(out)
                break
            except KilledError:
                pass
        yield out
    assert stop >= 2


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("what", KILLS)
def test_killed_at_any_moment(
    what: str,
    file_format: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unbroken: dict[str, dict[str, bytes]],
) -> None:
    def work(out: Path) -> None:
        fill(out, file_format)

    for out in folders_of_the_killed(work, KILLS[what], tmp_path, monkeypatch):
        fill(out, file_format)
        found, whole = contents(out), dict(unbroken[file_format])
        if file_format == "png":  # the order in which they were made
            lines, expected_lines = found.pop("manifest.jsonl"), whole.pop("manifest.jsonl")
            assert sorted(lines.splitlines()) == sorted(expected_lines.splitlines())
        assert found == whole


@pytest.mark.parametrize("file_format", TOGETHER)
def test_what_was_stored_is_not_made_again(
    file_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = stop_at(14, tmp_path, file_format, monkeypatch)
    assert kept >= 9, "only what waited is lost"
    assert fill(tmp_path, file_format) == N - kept


def stop_at(index: int, out: Path, file_format: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The disk is full when a picture is to be stored; how many are there."""
    kind = picture_files.WRITERS[file_format]
    store = kind.store

    def full(self: Any, prepared: picture_files.Prepared) -> None:
        if index in prepared.indices:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        store(self, prepared)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "store", full)
        with pytest.raises(OSError, match="No space left"):
            fill(out, file_format)
    settings = {"seed": 3, "backend": "none", "format": file_format}
    with sample_folder.open_folder(out, settings) as folder:
        return N - len(folder.writer.missing(N))


@pytest.mark.parametrize("file_format", TOGETHER)
def test_a_part_that_was_cut_off_anywhere(
    file_format: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unbroken: dict[str, dict[str, bytes]],
) -> None:
    stop_at(9, tmp_path / "stopped", file_format, monkeypatch)
    (part,) = (tmp_path / "stopped").glob(f"{PART}*")
    for size in (0, 50, 128, 300, 511, 512, 700, 1500, part.stat().st_size - 1):
        assert size < part.stat().st_size
        out = tmp_path / str(size)
        shutil.copytree(part.parent, out)
        os.truncate(out / part.name, size)
        fill(out, file_format)
        assert contents(out) == unbroken[file_format]


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_a_shard_that_was_lost(
    damage: str, tmp_path: Path, unbroken: dict[str, dict[str, bytes]]
) -> None:
    fill(tmp_path, "webdataset")
    shard = tmp_path / "000001.tar"
    if damage == "removed":
        shard.unlink()
    else:
        os.truncate(shard, 3000)
    assert fill(tmp_path, "webdataset", batch=7) == 10
    found, whole = contents(tmp_path), unbroken["webdataset"]
    assert {**found, "manifest.jsonl": b""} == {**whole, "manifest.jsonl": b""}
    assert sorted(found["manifest.jsonl"].splitlines()) == sorted(
        whole["manifest.jsonl"].splitlines()
    )


def test_no_room_for_the_finished_npz(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, dict[str, bytes]]
) -> None:
    """Its pictures wait in the part; what was begun of the npz takes no room."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(OneNpz, "_write", full)
        with pytest.raises(OSError, match="No space left"):
            fill(tmp_path, "npz")
    assert set(contents(tmp_path)) == {"manifest.jsonl", f"{PART}pictures.npz"}
    assert fill(tmp_path, "npz") == 0
    assert contents(tmp_path) == unbroken["npz"]


def test_damaged_pictures_are_named(tmp_path: Path) -> None:
    fill(tmp_path, "webdataset")
    shard = tmp_path / "000000.tar"
    data = bytearray(shard.read_bytes())
    data[600:640] = bytes(40)  # within the first PNG
    shard.write_bytes(data)
    with pytest.raises(ArtefactError, match=r"000000\.tar is damaged; delete it"):
        stored(tmp_path, "webdataset")


def test_other_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "000000.tar").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"such as 000000\.tar but no manifest\.jsonl"):
        fill(tmp_path, "webdataset")
    (tmp_path / "000000.tar").unlink()
    fill(tmp_path, "npz")
    with pytest.raises(UsageError, match="format 'npz' → 'webdataset'"):
        fill(tmp_path, "webdataset")


def test_folders_of_float32_npz_are_refused(tmp_path: Path) -> None:
    """0.1.0 wrote an npz for each picture."""
    line = {"image": "000000.npz", "index": 0, "seed": 3, "backend": "none", "format": "npz"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    np.savez(tmp_path / "000000.npz", image=np.zeros((3, SIDE, SIDE), np.float32))
    with pytest.raises(UsageError, match=r"image '000000\.npz' → None"):
        fill(tmp_path, "npz")
    assert (tmp_path / "000000.npz").is_file()


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_encoder_that_fails_ends_it_at_once(
    file_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is the encoder's, no later batch is waited for, no thread is left."""
    kind = picture_files.WRITERS[file_format]
    prepare = kind.prepare
    made = []

    def fail(self: Any, indices: Any, pixels: Pixels) -> picture_files.Prepared:
        made.extend(indices)
        if 5 in indices:
            raise MemoryError("no room to encode")
        return prepare(self, indices, pixels)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "prepare", fail)
        with pytest.raises(MemoryError, match="no room to encode"):
            fill(tmp_path, file_format, 10_000)
    assert len(made) < 100
    assert not [t for t in threading.enumerate() if t.name.startswith(("ahead", "encode", "store"))]
    fill(tmp_path, file_format)
    np.testing.assert_array_equal(stored(tmp_path, file_format), expected())


def test_noise_that_fails_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = sampling.image_noise

    def fail(seed: int, index: int, shape: tuple[int, int, int]) -> Images:
        if index == 9:
            raise MemoryError("no room for noise")
        return noise(seed, index, shape)

    with monkeypatch.context() as patched:
        patched.setattr(sampling, "image_noise", fail)
        with pytest.raises(MemoryError, match="no room for noise"):
            fill(tmp_path, "png")
    assert len(list(tmp_path.glob("0*.png"))) == 8, "the batches before it are kept"
    assert fill(tmp_path, "png") == N - 8


def test_an_interrupt_keeps_what_was_computed(tmp_path: Path) -> None:
    class Interrupted(Noise):
        def stream(self, *given: Any) -> Iterator[Finished]:
            for indices, pixels in super().stream(*given):
                if 15 in indices:
                    raise KeyboardInterrupt
                yield indices, pixels

    settings = {"seed": 3, "backend": "none", "format": "png"}
    with (
        sample_folder.open_folder(tmp_path, settings) as folder,
        pytest.raises(KeyboardInterrupt),
    ):
        list(sample_folder.fill(folder, Interrupted(), SCHEDULE, N, 4))
    assert folder.progress(N).startswith(f"15 of {N} images are in")


def test_ahead_is_ahead_by_what_it_may() -> None:
    taken: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for k in range(100):
            taken.append(k)
            if k == 2:
                third.set()
            yield k

    with closing(ahead(items(), 2)) as found:
        assert next(found) == 0
        assert third.wait(10), "it takes the next ones unasked"
        assert next(found) == 1
    assert len(taken) <= 4
    assert list(ahead(iter(range(5)), 3)) == list(range(5))


def test_a_picture_is_listed_before_it_is_there(tmp_path: Path) -> None:
    fill(tmp_path, "png", 4)
    (tmp_path / "000002.png").unlink()
    with sample_folder.open_folder(
        tmp_path, {"seed": 3, "backend": "none", "format": "png"}
    ) as folder:
        assert isinstance(folder.writer, PngFiles)
        assert folder.writer.missing(6) == [2, 4, 5]


# Several tasks in one folder.

SHARES = (range(20, 25), range(0, 10), range(10, 20))
SHARED = ("png", "webdataset")


def of_tasks(out: Path) -> list[str]:
    names = sorted(path.name for path in out.iterdir())
    return [name for name in names if name.startswith(("manifest-", ".lock-"))]


@pytest.mark.parametrize("file_format", SHARED)
def test_tasks_fill_one_folder(
    file_format: str, tmp_path: Path, unbroken: dict[str, dict[str, bytes]]
) -> None:
    """In any order; the next command that has the folder to itself leaves what one would."""
    for share in SHARES:
        assert fill(tmp_path, file_format, images=share) == len(share)
        assert fill(tmp_path, file_format, images=share) == 0
    assert len(of_tasks(tmp_path)) == 2 * len(SHARES)
    assert not (tmp_path / "manifest.jsonl").exists()
    assert fill(tmp_path, file_format) == 0
    assert contents(tmp_path) == unbroken[file_format]
    assert fill(tmp_path, file_format, images=range(0, 10)) == 0, "it is listed elsewhere"


@pytest.mark.parametrize("file_format", SHARED)
@pytest.mark.parametrize("what", KILLS)
def test_a_task_is_killed_at_any_moment(
    what: str,
    file_format: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unbroken: dict[str, dict[str, bytes]],
) -> None:
    def work(out: Path) -> None:
        fill(out, file_format, images=SHARES[2])

    def before(out: Path) -> None:
        fill(out, file_format, images=SHARES[1])

    for out in folders_of_the_killed(work, KILLS[what], tmp_path, monkeypatch, before):
        fill(out, file_format, images=SHARES[0])
        assert fill(out, file_format, images=SHARES[2]) <= 10
        fill(out, file_format)
        assert contents(out) == unbroken[file_format]


@pytest.mark.parametrize("file_format", SHARED)
def test_tasks_after_a_command_that_was_stopped(
    file_format: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unbroken: dict[str, dict[str, bytes]],
) -> None:
    kept = stop_at(14, tmp_path, file_format, monkeypatch)
    made = [fill(tmp_path, file_format, images=images) for images in SHARES]
    assert made == [5, 0, 20 - kept]
    assert fill(tmp_path, file_format) == 0
    assert contents(tmp_path) == unbroken[file_format]


def test_tasks_that_must_not_run_at_once(tmp_path: Path) -> None:
    settings = {"seed": 3, "backend": "none", "format": "png"}

    def opened(images: range | None, **other: Any) -> Any:
        return sample_folder.open_folder(tmp_path, {**settings, **other}, images=images)

    with opened(range(0, 10)), opened(range(10, 20)):
        for share in (range(5, 15), range(0, 10), range(19, 30)):
            with pytest.raises(UsageError, match=r"are being made in .* by another"), opened(share):
                pass
        with pytest.raises(UsageError, match="seed 3 → 4"), opened(range(20, 30), seed=4):
            pass
        assert len(of_tasks(tmp_path)) == 4
    with opened(range(5, 15)):
        pass


def test_who_waits_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command for tasks, and a task for a command, but not for ever."""
    settings = {"seed": 3, "backend": "none", "format": "png"}
    monkeypatch.setattr(sample_folder, "PATIENCE", 0.1)
    for first, second in ((range(0, 10), None), (None, range(0, 10))):
        with (
            sample_folder.open_folder(tmp_path, settings, images=first),
            pytest.raises(UsageError, match="in use by another"),
            sample_folder.open_folder(tmp_path, settings, images=second),
        ):
            pass


def test_what_tasks_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: Any) -> str:
        with pytest.raises(UsageError) as caught:
            sample_folder.require_shareable(*given)
        return str(caught.value)

    monkeypatch.setattr(sample_folder, "SHARD_IMAGES", 10_000)
    assert "npz is one file" in refused(Path(), "npz", range(5), False)
    assert "npz is one file" in refused(Path(), "npz", None, True)
    shards = (Path(), "webdataset", range(10_001, 20_000), False)
    assert "--first 10001 lies within a shard" in refused(*shards)
    assert "takes --format webdataset, not png" in refused("s3://cats/x", "png", None, False)
    for share in (range(10_000, 10_001), None):
        sample_folder.require_shareable("s3://cats/x", "webdataset", share, False)
    sample_folder.require_shareable(Path(), "png", range(7, 8), False)


def test_overwriting_takes_what_tasks_left(tmp_path: Path) -> None:
    fill(tmp_path, "png", images=SHARES[0])
    settings = {"seed": 4, "backend": "none", "format": "png"}
    with sample_folder.open_folder(tmp_path, settings, overwrite=True):
        assert contents(tmp_path) == {}
