"""`lutdeploy evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lutdeploy import __version__
from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.manifest import MANIFEST
from lutdeploy.artefacts.run import EVALUATION, EVALUATION_PAGE, Run, locate
from lutdeploy.artefacts.target import find_run
from lutdeploy.artefacts.tuned_steps import resolve_schedule
from lutdeploy.artefacts.verdicts import require_passed
from lutdeploy.cli.console import note, progress_bar, show_evaluation
from lutdeploy.cli.requests import POSITIVE, SEED, engine_request, schedule_request
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import Progress

    from lutdeploy.engines import Engine
    from lutdeploy.schedule import Schedule, ScheduleRequest
    from lutdeploy.training.evaluation.data import RealImages, Told, Trained
    from lutdeploy.training.evaluation.distances import Pixels
    from lutdeploy.training.evaluation.features import Extractor

PATH = click.Path(path_type=Path)
FORMAT = 1  # of the JSON


@click.command("evaluate")
@engine_request("[RUN|DIR]")
@click.option(
    "--data",
    help="Folder of real images, or 'synthetic'. Default: what the run was trained on.",
)
@click.option("--held-out", type=PATH, help="Folder of images that the model never saw.")
@click.option(
    "-n", "count", type=POSITIVE, default=2048, show_default=True, help="Pictures to judge."
)
@click.option("--features", type=PATH, help="Inception weights; the distances are FID and KID.")
@click.option("--json", "json_file", type=PATH, help="Default: evaluation.json in --out.")
@click.option("--out", type=PATH, help="Folder of the results. Default: the RUN, or the DIR.")
@schedule_request
@SEED
def command(
    engine: EngineRequest,
    schedule: ScheduleRequest,
    data: str | None,
    held_out: Path | None,
    count: int,
    features: Path | None,
    json_file: Path | None,
    out: Path | None,
    seed: int,
) -> None:
    """Measure how good and how diverse pictures are, and whether they are copies.

    The pictures are sampled from a RUN, or read from a DIR that `lutdeploy sample` filled.
    Real images measured against real ones stand beside them as the floor.
    """
    from lutdeploy.training.evaluation.data import Trained
    from lutdeploy.training.evaluation.distances import require_torchmetrics
    from lutdeploy.training.evaluation.features import open_extractor
    from lutdeploy.training.evaluation.report import require_jinja2

    require_torchmetrics()
    require_jinja2()
    on_gpu = engine.device is not None and engine.device.startswith("cuda")
    extractor = open_extractor(features, engine.device if on_gpu and engine.device else "cpu")
    path = engine.path
    if _holds_pictures(path):
        if engine != EngineRequest(path, batch=engine.batch, device=engine.device) or (
            schedule != ScheduleRequest()
        ):
            raise UsageError(
                f"options of an engine or a schedule are for a RUN; {path} holds pictures that "
                "are made"
            )
        if data is None:
            raise UsageError("--data is needed: a folder of real images, or 'synthetic'")
        folder = _results(out or path, json_file)
        _finish(_read(path, data, held_out, count), extractor, seed, folder, json_file)
        return
    located = locate(path)
    trained = None
    if shipped.is_shipped(path):
        trained = Trained.of_shipped(path.stem)
    elif located.run is not None:
        trained = Trained.of_run(located.run)
    data = data or (trained.data if trained else None)
    if data is None:
        raise UsageError(f"--data is needed: {path} does not say what it was trained on")
    if out is None and located.run is None and not shipped.is_shipped(path):
        raise UsageError(f"{path} belongs to no run folder; --out names a folder for the results")
    folder = _results(out or find_run(path, note).path, json_file)
    with open_engine(engine, note) as opened:
        if not engine.unverified:
            require_passed(path, opened.identity, note)
        followed = resolve_schedule(schedule, path, opened, note)
        title = str(located.run.path) if located.run else path.stem
        subject = _draw(
            opened, title, trained, followed, data, held_out, count, seed, engine.batch or 64
        )
        _finish(subject, extractor, seed, folder, json_file)


@dataclass(frozen=True)
class Subject:
    """What is judged, what against, and what is known of it."""

    title: str
    pixels: Pixels
    real: RealImages
    engine: Engine | None
    facts: dict[str, Any]
    notes: tuple[str, ...]


def _holds_pictures(path: Path) -> bool:
    """Whether a path is a folder that is neither a run nor an export."""
    run = Run(path)
    known = (run.model, run.settings, path / MANIFEST)
    return path.is_dir() and not any(file.is_file() for file in known)


def _results(folder: Path, json_file: Path | None) -> Path:
    """The folder of the results, and the JSON's: known to be writable before the long work."""
    files.output_folder(folder)
    if json_file is not None:
        if json_file.is_dir():
            raise UsageError(f"--json names a file; {json_file} is a folder")
        files.output_folder(json_file.parent)
    return folder


def _told(bar: Progress, name: str) -> Told:
    """A line of the progress bar, made when there is something to tell."""
    tasks: dict[str, Any] = {}

    def tell(done: int, total: int) -> None:
        if not tasks:
            tasks["id"] = bar.add_task(name, total=total)
        bar.update(tasks["id"], completed=done, total=total)

    return tell


def _real(
    data: str, held_out: Path | None, side: int, channels: int, trained: Trained | None, told: Told
) -> RealImages:
    from lutdeploy.training.evaluation.data import load_real

    real = load_real(data, held_out, side, channels, trained, told)
    note(f"data: {len(real.training)} training images, {len(real.held_out)} {real.split}")
    return real


def _read(pictures: Path, data: str, held_out: Path | None, count: int) -> Subject:
    """The pictures of a folder."""
    from lutdeploy.training.evaluation.data import read_samples, require_resolution
    from lutdeploy.training.evaluation.distances import require_size

    with progress_bar() as bar:
        samples = read_samples(pictures, count, _told(bar, "read"))
        require_size(str(pictures), len(samples.pixels))
        for source in {data, str(held_out or data)}:
            require_resolution(source, samples.pixels)
        channels, side = samples.pixels.shape[1:3]
        real = _real(data, held_out, side, channels, None, _told(bar, "data"))
    return Subject(str(pictures), samples.pixels, real, None, samples.origin, samples.warnings)


def _draw(
    engine: Engine,
    title: str,
    trained: Trained | None,
    schedule: Schedule,
    data: str,
    held_out: Path | None,
    count: int,
    seed: int,
    batch: int,
) -> Subject:
    """Pictures sampled from a model."""
    from lutdeploy.artefacts import sample_folder
    from lutdeploy.training.evaluation.data import draw_samples
    from lutdeploy.training.evaluation.distances import require_size
    from lutdeploy.training.evaluation.evaluate import require_images

    require_size(f"-n {count}", count)
    config = engine.config
    with progress_bar() as bar:
        told = _told(bar, "data")
        real = _real(data, held_out, config.image_size, config.channels, trained, told)
        require_images(real)
        pixels = draw_samples(engine, count, schedule, seed, batch, _told(bar, "sample"))
    made = sample_folder.settings(engine.identity, schedule, seed, "png")
    del made["format"]  # of pictures in files
    return Subject(title, pixels, real, engine, made, ())


def _finish(
    subject: Subject, extractor: Extractor, seed: int, folder: Path, json_file: Path | None
) -> None:
    """Measure, show, write."""
    import torch

    from lutdeploy.training.evaluation import report
    from lutdeploy.training.evaluation.evaluate import evaluate as measure

    with progress_bar("what") as bar:
        task = bar.add_task("evaluate", total=None, what="")
        found = measure(
            subject.pixels,
            subject.real,
            extractor,
            subject.engine,
            seed,
            subject.notes,
            told=lambda what: bar.update(task, what=what),
        )
    show_evaluation(found, extractor)
    facts = {
        **subject.facts,
        "pictures": len(subject.pixels),
        "training_images": len(subject.real.training),
        "held_out_images": len(subject.real.held_out),
        "split": subject.real.split,
        "features": extractor.name,
        "features_sha256": extractor.sha256,
        "evaluation_seed": seed,
        "lutdeploy": __version__,
        "torch": torch.__version__,
    }
    names = {
        "frechet_distance": extractor.frechet_name,
        "kernel_distance": extractor.kernel_name,
    }
    values = {"format": FORMAT, "settings": facts, "names": names, **found.to_dict()}
    files.write_json(json_file or folder / EVALUATION, values)
    page = report.page(
        found,
        extractor,
        subject.pixels,
        subject.real.training,
        f"Evaluation of {subject.title}",
        {name: str(value) for name, value in facts.items() if value is not None},
    )
    files.write_atomic(folder / EVALUATION_PAGE, page.encode())
    click.echo(folder / EVALUATION_PAGE)
