"""`lutdeploy evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lutdeploy.artefacts import sample_folder, shipped
from lutdeploy.artefacts.run import locate
from lutdeploy.artefacts.target import find_run
from lutdeploy.artefacts.tuned_steps import resolve_schedule
from lutdeploy.artefacts.verdicts import require_passed
from lutdeploy.cli.console import answer, note, show_evaluation
from lutdeploy.cli.progress import progress_bar
from lutdeploy.cli.requests import PATH, POSITIVE, SEED, engine_request, schedule_request
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.errors import UsageError
from lutdeploy.schedule import ScheduleRequest

if TYPE_CHECKING:
    from lutdeploy.cli.progress import Progress
    from lutdeploy.training.evaluation.features import Extractor
    from lutdeploy.training.evaluation.subject import Request, Subject


@click.command("evaluate")
@engine_request("[RUN|DIR]")
@click.option(
    "--data", help="Folder of real images, or 'synthetic'. Default: what the run was trained on."
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
    from lutdeploy.training.evaluation import subject as subjects
    from lutdeploy.training.evaluation.data import Trained
    from lutdeploy.training.evaluation.distances import require_torchmetrics
    from lutdeploy.training.evaluation.features import open_extractor
    from lutdeploy.training.evaluation.report import require_jinja2

    require_torchmetrics()
    require_jinja2()
    device = engine.device or "cpu"
    extractor = open_extractor(features, device if device.startswith("cuda") else "cpu")
    path, batch = engine.path, engine.batch or 64
    if subjects.holds_pictures(path):
        plain = asdict(EngineRequest(path, batch=batch, device=engine.device))
        asked = {**asdict(engine), **asdict(schedule)}  # where nothing was said: plain, or None
        for name, value in asked.items():
            if value != plain.get(name):
                raise UsageError(f"--{name} is for a RUN; {path} holds pictures that are made")
        if data is None:
            raise UsageError("--data is needed: a folder of real images, or 'synthetic'")
        request = subjects.Request(count, data, held_out, seed, batch, out or path, json_file)
        subjects.prepare_results(request)
        with progress_bar() as bar:
            subject = subjects.read_pictures(path, request, _lines(bar), note)
        _finish(subject, extractor, request)
        return
    trained = Trained.of_model(path)
    data = data or (trained.data if trained else None)
    if data is None:
        raise UsageError(f"--data is needed: {path} does not say what it was trained on")
    run = None if shipped.is_shipped(path) else locate(path).run
    if out is None and run is None and not shipped.is_shipped(path):
        raise UsageError(f"{path} belongs to no run folder; --out names a folder for the results")
    folder = out or find_run(path, note).path
    request = subjects.Request(count, data, held_out, seed, batch, folder, json_file)
    subjects.prepare_results(request)
    with open_engine(engine, note) as denoiser:
        if not engine.unverified:
            require_passed(path, denoiser.identity, note)
        followed = resolve_schedule(schedule, path, denoiser, note)
        origin = sample_folder.settings(denoiser.identity, followed, seed, "png")
        del origin["format"]  # of pictures in files
        title = str(run.path) if run else path.stem
        with progress_bar() as bar:
            subject = subjects.sample_pictures(
                denoiser, followed, trained, title, origin, request, _lines(bar), note
            )
        _finish(subject, extractor, request)


def _lines(bar: Progress) -> Callable[[str, int, int], None]:
    """Progress by name; each name gets a line of the bar when it has something to show."""
    tasks: dict[str, Any] = {}

    def update(name: str, done: int, total: int) -> None:
        if name not in tasks:
            tasks[name] = bar.add_task(name, total=total)
        bar.update(tasks[name], completed=done, total=total)

    return update


def _finish(subject: Subject, extractor: Extractor, request: Request) -> None:
    """Measure, show, write."""
    from lutdeploy.training.evaluation.evaluate import evaluate
    from lutdeploy.training.evaluation.subject import write_results

    with progress_bar("what") as bar:
        task = bar.add_task("evaluate", total=None, what="")
        compared = subject.pixels, subject.real, extractor, subject.denoiser
        found = evaluate(
            *compared, request.seed, subject.notes, lambda what: bar.update(task, what=what)
        )
    show_evaluation(found, extractor)
    answer(write_results(found, subject, extractor, request))
