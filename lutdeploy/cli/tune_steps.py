"""`lutdeploy tune-steps`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import click

from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.target import find_run
from lutdeploy.artefacts.tuned_steps import Measured, distilled_schedule
from lutdeploy.cli.console import answer, console, note
from lutdeploy.cli.progress import progress_bar
from lutdeploy.cli.requests import POSITIVE, engine_request
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.errors import UsageError


class StepList(click.ParamType[tuple[int, ...]]):
    """Numbers of steps such as 8,10,16."""

    name = "N,N,…"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = sorted({int(part) for part in str(value).split(",")})
        except ValueError:
            numbers = [0]
        if not 1 <= numbers[0] <= numbers[-1] <= 1000:
            self.fail(f"{value!r} is no list of steps from 1 to 1000 such as 8,10,16", param)
        return tuple(numbers)


@click.command("tune-steps")
@engine_request(
    backend_help="auto: openvino, else onnxruntime, where the run has a float32 step export; else "
    "torch.",
    leave_out=("precision", "unverified"),
)
@click.option(
    "--steps",
    type=StepList(),
    default="4,6,8,10,16",
    show_default=True,
    help="Numbers of steps to fit.",
)
@click.option(
    "--images", type=POSITIVE, default=16, show_default=True, help="To fit on, and to measure on."
)
@click.option(
    "--data", metavar="DIR", help="Real images: the distances to them decide, instead of the RMS."
)
@click.option(
    "--pictures",
    type=click.IntRange(min=16),
    default=512,
    show_default=True,
    help="With --data: pictures of each schedule, and as many real images.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 2),
    default=1,
    show_default=True,
    help="Of the noise to fit on; the next one is measured on.",
)
def command(
    engine: EngineRequest,
    steps: tuple[int, ...],
    images: int,
    data: str | None,
    pictures: int,
    seed: int,
) -> None:
    """Fit schedules of few steps to a model: their ends are those of 256 Euler steps.

    Once per model. What is better than every formula of as many steps, on noise that no fit has
    seen, goes to steps.json in the run, in the place of what was there: for `sample`, which
    follows the best unless told otherwise, and for `--solver fitted` of the other commands.
    """
    from lutdeploy.training.few_steps.tune import TuneSettings, tune_schedules

    run = find_run(engine.path, note)
    if distilled_schedule(run.path) is not None:
        raise UsageError(f"{run.path} is distilled: it has a schedule of its own and no other")
    files.require_writable(run.path)
    engine = replace(engine, path=run.path)
    if engine.backend == "auto" and engine.export is None:
        engine = float32_engine(engine, run)
    if engine.backend == "torch":
        engine = replace(engine, precision="fp32")  # also on a GPU
    settings = TuneSettings(steps, images, data, pictures, engine.batch or 64, seed)
    with open_engine(engine, note) as denoiser, progress_bar("state") as bar:
        task = bar.add_task("tune", total=1.0, state="")
        found = tune_schedules(
            run,
            denoiser,
            settings,
            lambda share, state: bar.update(task, completed=share, state=state),
        )
    _show(found.rows, f"{images} images" + (f", {pictures} pictures" if data else ""))
    for line in found.remarks:
        note(line)
    answer(run.tuned_steps)


def _show(rows: Sequence[Measured], title: str) -> None:
    """The rows as a table on stderr."""
    from rich.table import Table

    table = Table("steps", "schedule", "RMS", "Fréchet", "sliced", title=f"unseen noise: {title}")
    for row in rows:
        distances = (row.frechet, row.sliced_wasserstein)
        values = ["–" if value is None else f"{value:.1f}" for value in distances]
        table.add_row(str(row.schedule.steps), row.schedule.describe(), f"{row.rms:.4f}", *values)
    console().print(table)


def float32_engine(engine: EngineRequest, run: Run | None) -> EngineRequest:
    """For --backend auto: less precise engines would put noise in the fit."""
    folder = run.float32_step(files.sha256(run.model)) if run else None
    if folder is None:
        return replace(engine, backend="torch")
    backend = "openvino" if find_spec("openvino") else "onnxruntime"
    return replace(engine, backend=backend, export=folder.name)
