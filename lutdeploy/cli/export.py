"""`lutdeploy export`."""

from __future__ import annotations

from pathlib import Path

import click

from lutdeploy.artefacts import files
from lutdeploy.artefacts.target import find, find_run
from lutdeploy.cli.console import answer, note
from lutdeploy.cli.progress import phases
from lutdeploy.cli.requests import LICENSE, RUN, schedule_request
from lutdeploy.errors import UsageError
from lutdeploy.schedule import ScheduleRequest
from lutdeploy.signature import GRAPHS


@click.command("export")
@RUN
@click.option("--fp16", is_flag=True, help="float16 body with float32 islands.")
@click.option("--int8", is_flag=True, help="int8 matmuls in the blocks, the rest float32.")
@click.option("--graph", type=click.Choice(GRAPHS), default="step", show_default=True)
@schedule_request
@click.option(
    "--author-format",
    type=click.Path(path_type=Path),
    metavar="FILE.pth",
    help="Write the author's state dict instead of ONNX.",
)
@LICENSE
def command(
    run: Path | None,
    fp16: bool,
    int8: bool,
    graph: str,
    schedule: ScheduleRequest,
    author_format: Path | None,
    license: str | None,
) -> None:
    """Export a run to ONNX and check it against PyTorch before it takes its place.

    step: one step of any solver. per-step: a graph for each step, constants inside.
    loop: the whole trajectory in one graph.
    """
    if fp16 and int8:
        raise UsageError("--fp16 or --int8, not both")
    if graph == "step" and schedule != ScheduleRequest():
        raise UsageError(
            "--solver, --steps and --shift belong to --graph per-step and loop; a step graph "
            "follows any"
        )
    from lutdeploy.artefacts.checkpoint import load_model, save_author_file
    from lutdeploy.artefacts.tuned_steps import (
        distilled_schedule,
        fitted_schedules,
        usable_schedules,
    )
    from lutdeploy.engines.export.check import export_checked
    from lutdeploy.engines.export.graphs import ExportPlan

    target = find_run(find(run, note), note)
    model = load_model(target.model)
    if author_format is not None:
        save_author_file(model, author_format)
        if (own := distilled_schedule(target.path)) is not None:
            note(f"that format has no place for {own.describe()}, which the model was distilled to")
        answer(author_format)
        return
    sha256 = files.sha256(target.model)
    held = None
    if graph != "step":
        own = distilled_schedule(target.path)
        held = schedule.resolve(own, lambda: fitted_schedules(target.path, sha256))
    plan = ExportPlan(graph, "int8" if int8 else "fp16" if fp16 else "fp32", held)
    with files.lock(target.exports_folder, "`lutdeploy export`"):
        tuned = usable_schedules(target.path, sha256, note)
        with phases() as bar:
            task = bar.add_task("export", total=None)
            folder = export_checked(
                *(model, plan, target, sha256, tuned, note),
                on_phase=lambda phase: bar.update(task, description=f"export: {phase}"),
                license=license,
            )
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    note(f"exported and checked against PyTorch, {size:.1f} MB")
    answer(folder)
