"""`lutdeploy tune-steps`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.target import find_run
from lutdeploy.cli.console import note, progress_bar
from lutdeploy.cli.requests import POSITIVE, SEED, engine_request
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.errors import BackendError, UsageError
from lutdeploy.schedule import SOLVERS


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
    backend_help="auto: onnxruntime when the run has a float32 step export, else torch.",
    leave_out=("precision", "unverified"),
)
@click.option("--steps", type=StepList(), required=True, help="Numbers of steps to tune for.")
@click.option(
    "--solver",
    "solvers",
    type=click.Choice(tuple(SOLVERS)),
    multiple=True,
    help="To tune for; may be given again. Default: all.",
)
@click.option("--images", type=POSITIVE, default=8, show_default=True, help="To tune on.")
@click.option(
    "--held-out",
    type=POSITIVE,
    default=16,
    show_default=True,
    help="Images of the next seed, to measure errors on.",
)
@click.option(
    "--evaluations",
    type=POSITIVE,
    default=1000,
    show_default=True,
    help="Network evaluations of all images that one search may take.",
)
@click.option(
    "--table",
    type=StepList(),
    default="4,6,8,10,16,32,64",
    show_default=True,
    help="Numbers of steps in the table and plot.",
)
@click.option(
    "--data",
    metavar="DIR",
    help="Real images: the table then has distances of `lutdeploy evaluate` to them, too.",
)
@click.option(
    "--pictures",
    type=click.IntRange(min=16),
    default=512,
    show_default=True,
    help="With --data: images of each row, and as many real ones.",
)
@SEED
def command(
    engine: EngineRequest,
    steps: tuple[int, ...],
    solvers: tuple[str, ...],
    images: int,
    held_out: int,
    evaluations: int,
    table: tuple[int, ...],
    data: str | None,
    pictures: int,
    seed: int,
) -> None:
    """Search time grids with which few steps end where 256 Euler steps end.

    Once per model. What is found goes to steps.json in the run, for `sample` and for
    `--time-grid tuned` of the other commands; a table says how near each solver and grid comes,
    on noise that the search did not see.
    """
    from lutdeploy.training.few_steps.comparison import plot, show
    from lutdeploy.training.few_steps.tune import TuneSettings, tune_schedules

    if seed == 2**64 - 1:
        raise UsageError("--seed must leave a next one, for the noise to measure on")
    run = find_run(engine.path, note)
    engine = replace(engine, path=run.path)
    if engine.backend == "auto" and engine.export is None:
        engine = _float32(engine, run)
    if engine.backend == "torch":
        engine = replace(engine, precision="fp32")  # also on a GPU
    settings = TuneSettings(
        steps=steps,
        solvers=solvers or tuple(SOLVERS),
        images=images,
        held_out=held_out,
        evaluations=evaluations,
        compared=table,
        data=data,
        pictures=pictures,
        batch=engine.batch or 64,
        seed=seed,
    )
    with open_engine(engine, note) as denoiser, progress_bar("state") as bar:
        task = bar.add_task("tune", total=None, state="")

        def on_progress(done: int, total: int, state: str) -> None:
            bar.update(task, completed=done, total=total, state=state)

        found = tune_schedules(run, denoiser, settings, note, on_progress)
    for line in found.refusals:
        note(line)
    show(found.rows, f"{held_out} images, against {found.reference}")
    try:
        files.write_atomic(run.steps_plot, plot(found.rows, found.reference))
        note(f"plot: {run.steps_plot}")
    except BackendError as error:
        note(f"no plot: {error}")
    click.echo(run.tuned_steps)


def _float32(engine: EngineRequest, run: Run) -> EngineRequest:
    """For --backend auto: less precise engines would put noise in the search."""
    folder = run.float32_step(files.sha256(run.model))
    if folder is None:
        return replace(engine, backend="torch")
    return replace(engine, backend="onnxruntime", export=folder.name)
