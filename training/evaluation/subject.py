"""What `lutdeploy evaluate` judges, sampled or read, and the files that it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from lutdeploy import __version__
from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import MANIFEST
from lutdeploy.artefacts.run import EVALUATION, EVALUATION_PAGE, Run
from lutdeploy.errors import UsageError
from lutdeploy.sampling import Denoiser
from lutdeploy.schedule import DISTILLED, Schedule
from lutdeploy.training.evaluation import report
from lutdeploy.training.evaluation.data import (
    RealImages,
    Trained,
    draw_samples,
    load_real,
    read_samples,
    require_resolution,
)
from lutdeploy.training.evaluation.distances import Pixels, require_size
from lutdeploy.training.evaluation.evaluate import Evaluation, require_images
from lutdeploy.training.evaluation.features import Extractor

FORMAT = 1  # of evaluation.json

OnProgress = Callable[[str, int, int], None]  # what is done, how many, of how many
Note = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What the command line of `lutdeploy evaluate` asks for."""

    count: int  # of pictures
    data: str
    held_out: Path | None
    seed: int
    batch: int
    folder: Path  # of the results
    json_file: Path | None


@dataclass(frozen=True)
class Subject:
    """Pictures to judge, what they are compared with, and what is known of both."""

    title: str
    pixels: Pixels  # [n, C, S, S]
    real: RealImages
    origin: dict[str, Any]  # settings and hashes of what made them
    notes: tuple[str, ...] = ()
    denoiser: Denoiser | None = None  # the model that made them


def holds_pictures(path: Path) -> bool:
    """Whether a path is a folder that is neither a run nor an export."""
    run = Run(path)
    known = (run.model, run.settings, path / MANIFEST)
    return path.is_dir() and not any(file.is_file() for file in known)


def read_pictures(folder: Path, request: Request, on_progress: OnProgress, note: Note) -> Subject:
    """The first pictures of a folder."""
    samples = read_samples(folder, request.count, partial(on_progress, "read"))
    require_size(str(folder), len(samples.pixels))
    shape = samples.pixels.shape[1:]
    real = _real_images(request, shape, None, on_progress, note)
    require_resolution(real, shape[-1])
    return Subject(str(folder), samples.pixels, real, samples.origin, samples.warnings)


def sample_pictures(
    denoiser: Denoiser,
    schedule: Schedule,
    trained: Trained | None,
    title: str,
    origin: dict[str, Any],
    request: Request,
    on_progress: OnProgress,
    note: Note,
) -> Subject:
    """Pictures sampled from a model; ``trained``: what is known of its training."""
    require_size(f"-n {request.count}", request.count)
    real = _real_images(request, denoiser.config.image_shape, trained, on_progress, note)
    require_images(real)
    how = request.count, schedule, request.seed, request.batch
    pixels = draw_samples(denoiser, *how, partial(on_progress, "sample"))
    if schedule.solver == DISTILLED:
        notes = ("a distilled model has learnt its own timesteps alone: no x0 error curve",)
        return Subject(title, pixels, real, origin, notes)
    return Subject(title, pixels, real, origin, denoiser=denoiser)


def _real_images(
    request: Request,
    shape: tuple[int, ...],
    trained: Trained | None,
    on_progress: OnProgress,
    note: Note,
) -> RealImages:
    """The images that pictures of a shape (C, S, S) are compared with."""
    progress = partial(on_progress, "data")
    real = load_real(request.data, request.held_out, shape[-1], shape[0], trained, progress)
    note(f"data: {len(real.training)} training images, {len(real.held_out)} {real.split}")
    return real


def prepare_results(request: Request) -> None:
    """Make the folder of the results, known to be writable before the long work."""
    files.output_folder(request.folder)
    if request.json_file is not None:
        if request.json_file.is_dir():
            raise UsageError(f"--json names a file; {request.json_file} is a folder")
        files.output_folder(request.json_file.parent)


def write_results(
    found: Evaluation, subject: Subject, extractor: Extractor, request: Request
) -> Path:
    """Write the JSON and the page, whose path is returned."""
    facts = {
        **subject.origin,
        "pictures": len(subject.pixels),
        "training_images": len(subject.real.training),
        "held_out_images": len(subject.real.held_out),
        "split": subject.real.split,
        "features": extractor.name,
        "features_sha256": extractor.sha256,
        "evaluation_seed": request.seed,
        "lutdeploy": __version__,
        "torch": str(torch.__version__),
    }
    names = {"frechet_distance": extractor.frechet_name, "kernel_distance": extractor.kernel_name}
    values = {"format": FORMAT, "settings": facts, "names": names, **msgspec.to_builtins(found)}
    files.write_json(request.json_file or request.folder / EVALUATION, values)
    title = f"Evaluation of {subject.title}"
    page = report.page(found, extractor, subject.pixels, subject.real.training, title, facts)
    path = request.folder / EVALUATION_PAGE
    files.write_atomic(path, page.encode("utf-8", "backslashreplace"))  # names of files
    return path
