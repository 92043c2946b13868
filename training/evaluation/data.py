"""What is compared: samples, training images, held-out images, all uint8 [n, C, S, S]."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from lutdeploy import images
from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.picture_files import FACTS, MANIFEST, NPZ, pictures_in
from lutdeploy.artefacts.run import MODEL, Run, locate
from lutdeploy.artefacts.sample_folder import EXTRAS
from lutdeploy.errors import ArtefactError, UsageError
from lutdeploy.sampling import Denoiser, ahead, finished_batches, noise_batches
from lutdeploy.schedule import Schedule
from lutdeploy.training.data import (
    ImageSet,
    OnProgress,
    find_images,
    load_images,
    no_progress,
)
from lutdeploy.training.evaluation.distances import Pixels
from lutdeploy.training.recipes import DataSplit
from lutdeploy.training.state import read_position

SPLIT = 0.05  # held out where nothing says what was
NAMED_FILES = 5  # unreadable files that a message names


@dataclass(frozen=True)
class RealImages:
    """Real images, by whether the model was trained on them."""

    training: Pixels
    held_out: Pixels
    split: str  # how they were told apart, for people
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Samples:
    """Pictures to judge, and what they were made with as far as is known."""

    pixels: Pixels
    origin: dict[str, Any]
    warnings: tuple[str, ...] = ()


def _skipped(paths: tuple[str, ...]) -> tuple[str, ...]:
    """A warning that names the files that could not be read, if there are any."""
    if not paths:
        return ()
    named = "; ".join(paths[:NAMED_FILES]) + ("; …" if len(paths) > NAMED_FILES else "")
    return (f"{len(paths)} unreadable files skipped: {named}",)


class Trained(DataSplit, frozen=True):
    """What a model's training says of its images."""

    @classmethod
    def of_model(cls, path: Path) -> Trained | None:
        """From the facts of a model of the package, or a run's settings; None without either."""
        if shipped.is_shipped(path):
            facts = shipped.facts(path.stem)["training"]
            teacher = msgspec.convert(facts, _Origin).distilled
            return teacher.images if teacher else msgspec.convert(facts, cls)
        run = locate(path).run
        return cls.of_run(run) if run else None

    @classmethod
    def of_run(cls, run: Run) -> Trained | None:
        """From a run's settings and state; None when it was not trained here.

        A distilled model's images are its teacher's.
        """
        if not run.settings.is_file():
            return None
        origin = files.read_record(run.settings, _Origin, f"evaluate {run.model} with --data")
        if origin.distilled is not None:
            return origin.distilled.images
        trained = files.read_record(run.settings, cls, f"evaluate {run.model} with --data")
        with contextlib.suppress(ArtefactError):  # without a state the split is unverified
            trained = msgspec.structs.replace(trained, images=read_position(run).images)
        return trained

    def is_from(self, data: str) -> bool | None:
        """Whether the images are those of ``data``; None where nothing says."""
        if self.data is None:
            return None
        if "synthetic" in (self.data, data):
            return self.data == data
        return Path(self.data).resolve() == Path(data).resolve()

    def fits(self, found: ImageSet) -> bool:
        """Whether a set has as many images for training as the model was trained on."""
        return self.images in (None, len(found.split(self.held_out, self.seed)[0]))


class _Teacher(msgspec.Struct, frozen=True):
    images: Trained | None


class _Origin(msgspec.Struct, frozen=True):
    """What of a run's settings tells whether it was distilled."""

    distilled: _Teacher | None = None


def load_real(
    data: str,
    held_out: Path | None,
    size: int,
    channels: int,
    trained: Trained | None = None,
    on_progress: OnProgress = no_progress,
) -> RealImages:
    """Training and held-out images of ``data``, a folder or "synthetic".

    Held out is what the folder ``held_out`` holds; else what the model's own training held out
    of the same ``data``; else 5 %, with a warning that the model may have seen them.
    """
    found = load_images(data, size, channels, on_progress=on_progress)
    if held_out is None:
        fraction, seed, split, warnings = _choose_split(data, found, trained)
        chosen, held = found.split(fraction, seed)
        skipped = _skipped(found.skipped)
        return RealImages(found.images[chosen], found.images[held], split, skipped + warnings)
    other = load_images(str(held_out), size, channels, on_progress=on_progress)
    training = found.images
    if trained is not None:
        same = trained.is_from(data)
        if trained.fits(found) if same is None else same:
            training = training[found.split(trained.held_out, trained.seed)[0]]
    warnings = _skipped(found.skipped) + _skipped(other.skipped)
    return RealImages(training, other.images, f"held out: {held_out}", warnings)


def _choose_split(
    data: str, found: ImageSet, trained: Trained | None
) -> tuple[float, int, str, tuple[str, ...]]:
    """Fraction and seed of the split of a set, the same in words, and warnings."""
    ours = f"held out: {SPLIT:.0%} of {data}, seed 0, split here"
    unknown = "the held-out images may have been trained on; --held-out names others"
    if trained is None:
        return SPLIT, 0, ours, (f"no training settings tell the split: {unknown}",)
    if trained.is_from(data) is False:
        return SPLIT, 0, f"{ours}; the model was trained on {trained.data}", ()
    fraction, seed = trained.held_out, trained.seed
    if fraction == 0:
        return SPLIT, 0, ours, (f"the training held nothing out: {unknown}",)
    split = f"held out: {fraction:.1%} of {data}, seed {seed}, as in the model's training"
    if trained.fits(found):
        return fraction, seed, split, ()
    count = len(found.split(fraction, seed)[0])
    other = f"{data} gives {count} images for training, the model saw {trained.images}: {unknown}"
    if trained.data is None:  # nothing says that this is the folder it was trained on
        return SPLIT, 0, ours, (other,)
    return fraction, seed, split, (other,)


def draw_samples(
    denoiser: Denoiser,
    n: int,
    schedule: Schedule,
    seed: int = 0,
    batch: int = 64,
    on_progress: OnProgress = no_progress,
) -> Pixels:
    """The pictures that `lutdeploy sample` writes, in memory: uint8 [n, C, S, S]."""
    shape = denoiser.config.image_shape
    pixels = np.empty((n, *shape), np.uint8)
    with contextlib.closing(ahead(noise_batches(seed, range(n), batch, shape), 2)) as batches:
        for indices, ends in finished_batches(denoiser, batches, schedule, pixels=True):
            made = ends if ends.dtype == np.uint8 else images.to_uint8(ends)  # [B, S, S, C]
            pixels[indices[0] : indices[-1] + 1] = np.moveaxis(made, -1, 1)
            on_progress(indices[-1] + 1, n)
    return pixels


def _read_picture(path: Path) -> Pixels:
    """A PNG, JPEG, WebP or an npz of lutdeploy 0.1, as uint8 [C, H, W], never resized."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            made: Pixels = images.to_uint8(arrays["image"])
        return np.moveaxis(made, -1, 0)
    with Image.open(path) as file:
        pixels: Pixels = np.asarray(file if file.mode == "L" else file.convert("RGB"), np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def _read_origin(folder: Path) -> dict[str, Any]:
    """What the manifest of a folder of `lutdeploy sample` says of all its pictures."""
    try:
        with (folder / MANIFEST).open(encoding="utf-8") as lines:
            first = json.loads(next(lines))
        return {k: v for k, v in first.items() if k not in (*FACTS, "format")}
    except FileNotFoundError:
        return {}
    except (ValueError, StopIteration, AttributeError):
        return {"manifest": "unreadable"}


def read_samples(folder: Path, n: int, on_progress: OnProgress = no_progress) -> Samples:
    """The first n pictures of a folder, by name: of `lutdeploy sample`, or any others."""
    together = (
        sorted(path for path in folder.iterdir() if path.name == NPZ or path.suffix == ".tar")
        if folder.is_dir()
        else []
    )
    if together:
        found = chain.from_iterable(map(pictures_in, together))
        pixels = np.moveaxis(np.stack(list(islice(found, n))), -1, 1)
        on_progress(len(pixels), len(pixels))
        return Samples(pixels, {"folder": str(folder), **_read_origin(folder)})
    paths = sorted(path for path in folder.glob("*.npz") if path.stem.isdigit())
    if not paths:
        with contextlib.suppress(UsageError):
            paths = [path for path in find_images(folder) if path.name not in EXTRAS]
    if not paths:
        raise UsageError(f"{folder} holds neither a {MODEL} nor pictures to judge")
    kept: list[Pixels] = []
    skipped: list[str] = []
    for done, path in enumerate(paths[:n], start=1):
        try:
            picture = _read_picture(path)
        except Exception as error:  # the decoders raise almost anything on bad bytes
            skipped.append(f"{path}: {type(error).__name__}")
            continue
        if kept and picture.shape != kept[0].shape:
            raise UsageError(
                f"{path} is {_size(picture)}, the pictures before it {_size(kept[0])}: pictures "
                "of one size are compared"
            )
        if picture.shape[1] != picture.shape[2]:
            raise UsageError(f"{path} is {_size(picture)}; square pictures are compared")
        kept.append(picture)
        on_progress(done, min(n, len(paths)))
    if not kept:
        raise UsageError(f"{folder}: no picture is readable; first: {skipped[0]}")
    origin = {"folder": str(folder), **_read_origin(folder)}
    return Samples(np.stack(kept), origin, _skipped(tuple(skipped)))


def _size(picture: Pixels) -> str:
    channels, height, width = picture.shape
    return f"{width}×{height}" + (" in grey" if channels == 1 else "")


def require_resolution(source: str, side: int) -> None:
    """Refuse real images smaller than ``side`` pixels: enlarged, they would be blurred.

    Looks at the first image of the folder ``source``, if it is not "synthetic".
    """
    if source == "synthetic":
        return
    first = find_images(Path(source))[0]
    try:
        with Image.open(first) as file:
            width, height = file.size
    except OSError:  # it will be skipped and named
        return
    if min(width, height) < side:
        raise UsageError(
            f"{first} is {width}×{height}, the pictures are {side}×{side}: real images must not "
            "be smaller than the pictures"
        )
