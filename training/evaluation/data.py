"""What is compared: samples, training images, held-out images, all uint8 [n, C, S, S]."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lutdeploy import decoding, images
from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.picture_files import FACTS, NPZ, manifests, pictures_in
from lutdeploy.artefacts.run import MODEL, Run, locate
from lutdeploy.errors import ArtefactError, UsageError
from lutdeploy.sampling import Denoiser, ahead, finished_batches, noise_batches
from lutdeploy.schedule import Schedule
from lutdeploy.training.data import (
    SYNTHETIC,
    ImageSet,
    OnProgress,
    by_remark,
    decode_or_say,
    load_images,
    no_progress,
    read_list,
    read_regular,
    split,
    unreadable,
)
from lutdeploy.training.evaluation.distances import Pixels
from lutdeploy.training.picture_folder import find_pictures, printable, some
from lutdeploy.training.recipes import DataSplit
from lutdeploy.training.state import read_position

SPLIT = 0.05  # held out where nothing says what was


@dataclass(frozen=True)
class RealImages:
    """Real images, by whether the model was trained on them."""

    training: Pixels
    held_out: Pixels
    split: str  # how they were told apart, for people
    warnings: tuple[str, ...] = ()
    small: tuple[str, ...] = ()  # names and sizes of images that were enlarged


@dataclass(frozen=True)
class Samples:
    """Pictures to judge, and what they were made with as far as is known."""

    pixels: Pixels
    origin: dict[str, Any]
    warnings: tuple[str, ...] = ()


class Trained(DataSplit, frozen=True):
    """What a model's training says of its images."""

    sha256: tuple[str, ...] = ()  # of all image files, held-out ones included, if known

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
        """From a run's settings, images and state; None when it was not trained here.

        A distilled model's images are its teacher's.
        """
        if not run.settings.is_file():
            return None
        origin = files.read_record(run.settings, _Origin, f"evaluate {run.model} with --data")
        if origin.distilled is not None:
            trained = origin.distilled.images
        else:
            trained = files.read_record(run.settings, cls, f"evaluate {run.model} with --data")
            with contextlib.suppress(ArtefactError):  # without a state the split is unverified
                trained = msgspec.structs.replace(trained, images=read_position(run).images)
        if trained is not None and run.images.is_file():
            trained = msgspec.structs.replace(trained, sha256=read_list(run.images))
        return trained

    def is_from(self, data: str) -> bool | None:
        """Whether the images are those of ``data``; None where nothing says."""
        if self.data is None:
            return None
        if SYNTHETIC in (self.data, data):
            return self.data == data
        return Path(self.data).resolve() == Path(data).resolve()

    def fits(self, found: ImageSet) -> bool:
        """Whether a set has as many images for training as the model was trained on."""
        return self.images in (None, len(found.split(self.held_out, self.seed)[0]))

    def saw(self, found: ImageSet) -> NDArray[np.bool_] | None:
        """Which images of a set the model was trained on, by their files; None if unknown."""
        if not self.sha256 or not found.sha256:
            return None
        chosen, _ = split(len(self.sha256), self.held_out, self.seed)
        if found.sha256 == self.sha256:  # also where a file is there twice
            saw = np.zeros(len(found.sha256), bool)
            saw[chosen] = True
            return saw
        known = {self.sha256[index] for index in chosen}
        return np.array([digest in known for digest in found.sha256])


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

    Held out is what the folder ``held_out`` holds; else what the model was not trained on, by the
    files' hashes or, where those are not known, by the split of its training; else 5 %.

    Raises:
        UsageError: images that are to be held out were trained on, or may have been.
    """
    found = load_images(data, size, channels, on_progress=on_progress)
    saw = trained.saw(found) if trained else None
    if held_out is not None:
        other = load_images(
            str(held_out), size, channels, on_progress=on_progress, option="--held-out"
        )
        _require_unseen(held_out, other, trained)
        training = found.images
        if saw is not None:
            training = training[saw] if saw.any() else training
        elif trained is not None:
            same = trained.is_from(data)
            if trained.fits(found) if same is None else same:
                training = training[found.split(trained.held_out, trained.seed)[0]]
        told = found.all_remarks() + other.all_remarks()
        words, small = f"held out: {held_out}", found.small + other.small
        return RealImages(training, other.images, words, told, small)
    chosen, held, words, doubts = _divide(data, found, trained, saw)
    told = found.all_remarks() + doubts
    return RealImages(found.images[chosen], found.images[held], words, told, found.small)


def _require_unseen(folder: Path, held_out: ImageSet, trained: Trained | None) -> None:
    saw = trained.saw(held_out) if trained else None
    if saw is not None and saw.any():
        names = [printable(Path(held_out.names[index])) for index in np.flatnonzero(saw)]
        raise UsageError(
            f"--held-out {folder}: the model was trained on {len(names)} of its {len(saw)} images "
            f"({some(names)})"
        )


def _divide(
    data: str, found: ImageSet, trained: Trained | None, saw: NDArray[np.bool_] | None
) -> tuple[NDArray[np.intp], NDArray[np.intp], str, tuple[str, ...]]:
    """Indices of the training images and of the held-out ones, how, and warnings.

    ``saw``: which the model was trained on, where the files tell. Of a run of an earlier version
    the name of the folder, the number of images and the seed of their split have to.
    """
    here = found.split(SPLIT, 0)
    ours = f"held out: {SPLIT:.0%} of {data}, seed 0, split here"
    unknown = "the held-out images may have been trained on; --held-out names others"
    if trained is None:
        return *here, ours, (f"no training settings tell the split: {unknown}",)
    fraction, seed = trained.held_out, trained.seed
    told = f"held out: {fraction:.1%} of {data}, seed {seed}, as in the model's training"
    nothing = (
        *(np.arange(len(found.images)), np.empty(0, np.intp)),
        f"held out: none of {data}",
        (f"the model was trained on all of {data}; --held-out names images it never saw",),
    )
    same = trained.is_from(data) if saw is None else bool(saw.any())
    if same is False:
        return *here, f"{ours}; the model was trained on {trained.data}", ()
    if saw is not None:
        if found.sha256 != trained.sha256:
            told = f"held out: what the model was not trained on of {data}, by the files' hashes"
        return nothing if saw.all() else (np.flatnonzero(saw), np.flatnonzero(~saw), told, ())
    chosen, held = found.split(fraction, seed)
    if trained.fits(found):
        return (chosen, held, told, ()) if fraction else nothing
    differ = f"{data} gives {len(chosen)} images for training, the model saw {trained.images}"
    if same:
        raise UsageError(
            f"{differ}: which of them it saw cannot be told; --held-out names images it never saw"
        )
    return *here, ours, (f"{differ}: {unknown}",)  # a model of the package, another folder


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


def _read_picture(path: Path) -> decoding.Picture:
    """A picture, or an npz of lutdeploy 0.1; never resized."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            made: Pixels = images.to_uint8(arrays["image"])
        image = Image.fromarray(made[..., 0] if made.shape[-1] == 1 else made)
        return decoding.Picture(image, image.size, ())
    return decoding.decode(read_regular(path))


def _read_origin(folder: Path) -> dict[str, Any]:
    """What the manifest of a folder of `lutdeploy sample` says of all its pictures."""
    try:
        for manifest in manifests(folder)[:1]:
            with manifest.open(encoding="utf-8") as lines:
                first = json.loads(next(lines))
            return {k: v for k, v in first.items() if k not in (*FACTS, "format")}
        return {}
    except (*files.BAD_JSON, StopIteration, AttributeError):
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
    paths = tuple(sorted(path for path in folder.glob("*.npz") if path.stem.isdigit()))
    left_out: tuple[str, ...] = ()
    if not paths:
        try:
            found_files = find_pictures(folder, "DIR")
        except UsageError as error:
            raise UsageError(
                f"{folder} holds neither a {MODEL} nor pictures to judge: {error}"
            ) from error
        paths, left_out = found_files.files, found_files.lines()
    kept: list[Image.Image] = []
    skipped: list[str] = []
    remarks: defaultdict[str, list[str]] = defaultdict(list)
    with decoding.warnings_as_remarks():
        for done, path in enumerate(paths[:n], start=1):
            on_progress(done, min(n, len(paths)))
            picture = decode_or_say(path, _read_picture)
            if isinstance(picture, str):
                skipped.append(picture)
                continue
            size, first = picture.image.size, (kept or [picture.image])[0].size
            if size != first:
                raise UsageError(
                    f"{path} is {_sides(size)}, the pictures before it {_sides(first)}: pictures "
                    "of one size are compared"
                )
            if size[0] != size[1]:
                raise UsageError(f"{path} is {_sides(size)}; square pictures are compared")
            kept.append(picture.image)
            for remark in picture.remarks:
                remarks[remark].append(printable(path.relative_to(folder)))
    if not kept:
        raise UsageError(f"{folder}: no picture is readable; first: {skipped[0]}")
    grey = all(image.mode == "L" for image in kept)
    pixels = np.stack([np.asarray(i if grey else i.convert("RGB"), np.uint8) for i in kept])
    pixels = pixels[:, None] if grey else np.moveaxis(pixels, -1, 1)
    origin = {"folder": str(folder), **_read_origin(folder)}
    told = left_out + by_remark(remarks) + unreadable(skipped)
    return Samples(pixels, origin, told)


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def require_resolution(real: RealImages, side: int) -> None:
    """Refuse real images most of which were enlarged to ``side`` pixels, and so are blurred."""
    count = len(real.training) + len(real.held_out)
    if 2 * len(real.small) > count:
        raise UsageError(
            f"{len(real.small)} of {count} real images are smaller than the pictures, which are "
            f"{side}×{side} ({some(real.small)}): enlarged, they would be blurred"
        )
