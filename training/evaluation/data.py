"""What is compared: samples, training images, held-out images, all uint8 [n, C, S, S]."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open

from lutdeploy import images
from lutdeploy.artefacts import shipped
from lutdeploy.artefacts.run import MODEL, Run
from lutdeploy.artefacts.sample_folder import EXTRAS, MANIFEST
from lutdeploy.errors import UsageError
from lutdeploy.sampling import Denoiser, finished_batches, noise_batches
from lutdeploy.schedule import Schedule
from lutdeploy.training.data import ImageSet, draw_set, find_images, load_folder
from lutdeploy.training.evaluation.distances import Pixels
from lutdeploy.training.loop import resumable_settings

SPLIT = 0.05  # held out where nothing says what was
NAMED = 5  # unreadable files that a message names

Told = Callable[[int, int], None]  # how many are done, of how many


@dataclass(frozen=True)
class RealImages:
    """Real images by what the model could see of them."""

    training: Pixels
    held_out: Pixels
    split: str  # how they were told apart, for people
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Samples:
    """Pictures to judge, and what they were made with as far as is known."""

    pixels: Pixels
    origin: dict[str, Any]
    warnings: tuple[str, ...] = field(default=())


def _skipped(data: ImageSet) -> tuple[str, ...]:
    if not data.skipped:
        return ()
    named = "; ".join(data.skipped[:NAMED]) + ("; …" if len(data.skipped) > NAMED else "")
    return (f"{len(data.skipped)} unreadable files skipped: {named}",)


def load_images(source: str, size: int, channels: int, told: Told = lambda *_: None) -> ImageSet:
    """A folder's images as the training decodes them, or the drawn ones of "synthetic".

    Raises:
        UsageError: no folder, no image file, or none that is readable.
    """
    if source == "synthetic":
        return draw_set(size, channels)
    return load_folder(Path(source), size, channels, on_image=told)


def _same(source: str, other: str) -> bool:
    return source == other or (
        "synthetic" not in (source, other) and Path(source).resolve() == Path(other).resolve()
    )


@dataclass(frozen=True)
class Trained:
    """What a model's training says of its images.

    Attributes:
        data: their folder or "synthetic"; None where only the images can tell.
        held_out, seed: how they were split.
        images: how many were trained on; None where nothing says.
    """

    data: str | None
    held_out: float
    seed: int
    images: int | None

    @classmethod
    def of_run(cls, run: Run) -> Trained | None:
        """From a run's settings and state; None when it was not trained here.

        Raises:
            ArtefactError: the settings are damaged.
        """
        if not run.settings.is_file():
            return None
        settings = resumable_settings(run)
        seen = _images_trained_on(run)
        return cls(settings.data, settings.held_out, settings.seed, seen)

    @classmethod
    def of_shipped(cls, name: str) -> Trained:
        """From what a model of the package is shipped with."""
        training = shipped.facts(name)["training"]
        return cls(None, training["held_out"], training["seed"], training["training_images"])


def _images_trained_on(run: Run) -> int | None:
    """How many images a run's training saw, as its state says; None without one."""
    try:
        with safe_open(run.training_state, "pt") as file:
            return int((file.metadata() or {})["images"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None  # the weights alone are enough to evaluate; the split is then unverified


def load_real(
    data: str,
    held_out: Path | None,
    size: int,
    channels: int,
    trained: Trained | None = None,
    told: Told = lambda *_: None,
) -> RealImages:
    """Training and held-out images.

    Held out is what ``held_out`` holds; else what the model's own training held out of the
    same ``data``; else 5 %, with a warning that the model may have seen them.

    Args:
        data: a folder or "synthetic".
        held_out: a folder of images that the model never saw.
        size, channels: of the pictures.
        trained: what the model's training says.

    Raises:
        UsageError: as :func:`load_images`.
    """
    found = load_images(data, size, channels, told)
    warnings = _skipped(found)
    fraction, seed, split = SPLIT, 0, f"held out: {SPLIT:.0%} of {data}, seed 0, split here"
    ours, fits = False, True
    if trained is not None:
        count = len(found.split(trained.held_out, trained.seed)[0])
        fits = trained.images in (None, count)
        ours = fits if trained.data is None else _same(trained.data, data)
    if held_out is not None:
        other = load_images(str(held_out), size, channels, told)
        training = found.images
        if trained is not None and ours:
            training = found.images[found.split(trained.held_out, trained.seed)[0]]
        return RealImages(
            training, other.images, f"held out: {held_out}", warnings + _skipped(other)
        )
    unknown = "the held-out images may have been trained on; --held-out names others"
    if trained is None:
        warnings += (f"no training settings tell the split: {unknown}",)
    elif trained.data is not None and not ours:
        split += f"; the model was trained on {trained.data}"
    elif trained.held_out == 0:
        warnings += (f"the training held nothing out: {unknown}",)
    else:
        if not fits:
            warnings += (
                f"{data} gives {count} images for training, the model saw {trained.images}: "
                f"{unknown}",
            )
        if fits or trained.data is not None:
            fraction, seed = trained.held_out, trained.seed
            split = f"held out: {fraction:.1%} of {data}, seed {seed}, as in the model's training"
    chosen, held = found.split(fraction, seed)
    return RealImages(found.images[chosen], found.images[held], split, warnings)


def draw_samples(
    denoiser: Denoiser,
    n: int,
    schedule: Schedule,
    seed: int = 0,
    batch: int = 64,
    told: Told = lambda *_: None,
) -> Pixels:
    """The pictures that `lutdeploy sample` writes, in memory: uint8 [n, C, S, S].

    Raises:
        UsageError: the denoiser holds other steps.
        NonFiniteError: names step and image.
    """
    shape = denoiser.config.image_shape
    pixels = np.empty((n, *shape), np.uint8)
    batches = noise_batches(seed, range(n), batch, shape)
    done = 0
    for indices, ends in finished_batches(denoiser, batches, schedule, pixels=True):
        made = ends if ends.dtype == np.uint8 else images.to_uint8(ends)
        pixels[indices[0] : indices[-1] + 1] = np.moveaxis(made, -1, 1)
        done += len(indices)
        told(done, n)
    return pixels


def _read_picture(path: Path) -> Pixels:
    """A PNG, JPEG, WebP or npz of `lutdeploy sample`, as uint8 [C, S, S], never resized."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            made: Pixels = images.to_uint8(arrays["image"])
        return np.moveaxis(made, -1, 0)
    with Image.open(path) as file:
        pixels: Pixels = np.asarray(file if file.mode == "L" else file.convert("RGB"), np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def read_samples(folder: Path, n: int, told: Told = lambda *_: None) -> Samples:
    """The first n pictures of a folder, by name; what `lutdeploy sample` wrote, or any others.

    Raises:
        UsageError: no pictures, pictures of several sizes, or none that is readable.
    """
    origin: dict[str, Any] = {"folder": str(folder)}
    numbered = sorted(path for path in folder.glob("*.npz") if path.stem.isdigit())
    try:
        files = numbered or [path for path in find_images(folder) if path.name not in EXTRAS]
    except UsageError:
        files = []
    if not files:
        raise UsageError(f"{folder} holds neither a {MODEL} nor pictures to judge")
    manifest = folder / MANIFEST
    if manifest.is_file():
        try:
            with manifest.open(encoding="utf-8") as lines:
                first = json.loads(next(lines))
            origin |= {k: v for k, v in first.items() if k not in ("image", "index", "format")}
        except (ValueError, StopIteration, AttributeError):
            origin["manifest"] = "unreadable"
    kept: list[Pixels] = []
    skipped: list[str] = []
    for done, path in enumerate(files[:n], start=1):
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
        told(done, min(n, len(files)))
    if not kept:
        raise UsageError(f"{folder}: no picture is readable; first: {skipped[0]}")
    lost = _skipped(ImageSet(np.empty(0, np.uint8), tuple(skipped)))
    return Samples(np.stack(kept), origin, lost)


def _size(picture: Pixels) -> str:
    channels, height, width = picture.shape
    return f"{width}×{height}" + (" in grey" if channels == 1 else "")


def require_resolution(source: str, pictures: Pixels) -> None:
    """Refuse real images that are smaller than the pictures: blown up, they are no measure.

    Args:
        source: a folder or "synthetic".
        pictures: uint8 [n, C, S, S].

    Raises:
        UsageError: names the first real image and both sizes.
    """
    if source == "synthetic":
        return
    first, side = find_images(Path(source))[0], pictures.shape[-1]
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
