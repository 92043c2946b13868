"""`lutdeploy evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lutdeploy.artefacts import shipped
from lutdeploy.artefacts.run import locate
from lutdeploy.cli.console import note, progress_bar, show_evaluation
from lutdeploy.cli.options import (
    BACKEND,
    DEVICE,
    EXPORT,
    POSITIVE,
    PRECISION,
    PROVIDER,
    SEED,
    SHIFT,
    SOLVER,
    STEPS,
    THREADS,
    TIME_GRID,
    run_or_model,
)
from lutdeploy.cli.sample import require_verdict
from lutdeploy.cli.targets import find, find_run, open_reported, place, schedule_for
from lutdeploy.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import Progress

    from lutdeploy.training.evaluation.features import Extractor
    from lutdeploy.training.evaluation.subject import Subject

PATH = click.Path(path_type=Path)
OF_A_RUN = ("backend", "provider", "precision", "export", "steps", "solver", "shift", "time_grid")


@click.command("evaluate")
@run_or_model("[RUN|DIR]")
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
@click.option("--batch", type=POSITIVE, default=64, show_default=True)
@STEPS
@SOLVER
@SHIFT
@TIME_GRID
@SEED
@BACKEND
@DEVICE
@PROVIDER
@PRECISION
@EXPORT
@THREADS
@click.option("--unverified", is_flag=True, help="Use what failed or never had its checks.")
def command(
    run: Path | None,
    data: str | None,
    held_out: Path | None,
    count: int,
    features: Path | None,
    json_file: Path | None,
    out: Path | None,
    batch: int,
    seed: int,
    device: str | None,
    unverified: bool,
    **options: Any,
) -> None:
    """Measure how good and how diverse pictures are, and whether they are copies.

    The pictures are sampled from a RUN, or read from a DIR that `lutdeploy sample` filled.
    Real images measured against real ones stand beside them as the floor.
    """
    from lutdeploy.artefacts import sample_folder
    from lutdeploy.training.evaluation.data import Trained
    from lutdeploy.training.evaluation.distances import require_torchmetrics
    from lutdeploy.training.evaluation.features import open_extractor
    from lutdeploy.training.evaluation.report import require_jinja2
    from lutdeploy.training.evaluation.subject import (
        Request,
        holds_pictures,
        prepare_results,
        read_pictures,
        sample_pictures,
    )

    require_torchmetrics()
    require_jinja2()
    extractor = open_extractor(features, device if device and device.startswith("cuda") else "cpu")
    if run is not None and holds_pictures(run):
        for name in OF_A_RUN:
            if options[name] not in (None, "auto"):
                option = name.replace("_", "-")
                raise UsageError(f"--{option} is for a RUN; {run} holds pictures that are made")
        if data is None:
            raise UsageError("--data is needed: a folder of real images, or 'synthetic'")
        folder = prepare_results(out or run, json_file)
        request = Request(count=count, data=data, held_out=held_out, seed=seed, batch=batch)
        with progress_bar() as bar:
            subject = read_pictures(run, request, _lines(bar), note)
        _finish(subject, extractor, seed, folder, json_file)
        return
    backend, device = place(options["backend"], device, options["provider"])
    path = find(run)
    trained = Trained.of_model(path)
    data = data or (trained.data if trained else None)
    if data is None:
        raise UsageError(f"--data is needed: {path} does not say what it was trained on")
    run_of = locate(path).run
    if out is None and run_of is None and not shipped.is_shipped(path):
        raise UsageError(f"{path} belongs to no run folder; --out names a folder for the results")
    folder = prepare_results(out or find_run(path).path, json_file)
    request = Request(count=count, data=data, held_out=held_out, seed=seed, batch=batch)
    opened = open_reported(
        *(path, backend, device, options["export"], options["threads"]),
        batch=batch,
        unverified=unverified,
        precision=options["precision"],
    )
    with opened as engine:
        if not unverified:
            require_verdict(path, engine.identity)
        asked = (options[name] for name in ("solver", "steps", "shift", "time_grid"))
        schedule = schedule_for(engine, path, *asked)
        origin = sample_folder.settings(engine.identity, schedule, seed, "png")
        del origin["format"]  # of pictures in files
        with progress_bar() as bar:
            title = str(run_of.path) if run_of else path.stem
            subject = sample_pictures(
                engine, schedule, trained, title, origin, request, _lines(bar), note
            )
        _finish(subject, extractor, seed, folder, json_file)


def _lines(bar: Progress) -> Callable[[str, int, int], None]:
    """Progress by name; each name gets a line of the bar when it has something to show."""
    tasks: dict[str, Any] = {}

    def update(name: str, done: int, total: int) -> None:
        if name not in tasks:
            tasks[name] = bar.add_task(name, total=total)
        bar.update(tasks[name], completed=done, total=total)

    return update


def _finish(
    subject: Subject, extractor: Extractor, seed: int, folder: Path, json_file: Path | None
) -> None:
    """Measure, show, write."""
    from lutdeploy.training.evaluation.evaluate import evaluate
    from lutdeploy.training.evaluation.subject import write_results

    with progress_bar("what") as bar:
        task = bar.add_task("evaluate", total=None, what="")
        found = evaluate(
            subject.pixels,
            subject.real,
            extractor,
            subject.denoiser,
            seed,
            subject.notes,
            on_phase=lambda what: bar.update(task, what=what),
        )
    show_evaluation(found, extractor)
    click.echo(write_results(found, subject, extractor, seed, folder, json_file))
