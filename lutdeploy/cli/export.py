"""`lutdeploy export`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.target import find, find_run
from lutdeploy.cli.console import note
from lutdeploy.cli.requests import RUN, schedule_request
from lutdeploy.errors import ParityError, UsageError
from lutdeploy.schedule import Schedule, ScheduleRequest
from lutdeploy.signature import GRAPHS

if TYPE_CHECKING:
    from lutdeploy.engines.export.graphs import ExportPlan
    from lutdeploy.model import LutTransformer


@click.command("export")
@RUN
@click.option("--fp16", is_flag=True, help="float16 body with float32 islands.")
@click.option("--int8", is_flag=True, help="int8 products in the blocks, the rest float32.")
@click.option("--graph", type=click.Choice(GRAPHS), default="step", show_default=True)
@schedule_request
@click.option(
    "--author-format",
    type=click.Path(path_type=Path),
    metavar="FILE.pth",
    help="Write the author's state dict instead of ONNX.",
)
def command(
    run: Path | None,
    fp16: bool,
    int8: bool,
    graph: str,
    schedule: ScheduleRequest,
    author_format: Path | None,
) -> None:
    """Export a run to ONNX and check it against PyTorch before it takes its place.

    step: one step of any solver. per-step: a graph for each step, constants inside.
    loop: the whole trajectory in one graph.
    """
    if fp16 and int8:
        raise UsageError("--fp16 or --int8, not both")
    if graph == "step" and schedule != ScheduleRequest():
        raise UsageError(
            "--solver, --steps, --shift and --time-grid belong to --graph per-step and loop; "
            "a step graph follows any"
        )
    from lutdeploy.artefacts.checkpoint import load_model, save_author_file
    from lutdeploy.artefacts.tuned_steps import tuned_schedules
    from lutdeploy.engines.export.graphs import ExportPlan, export_model

    target = find_run(find(run, note), note)
    model = load_model(target.model)
    if author_format is not None:
        save_author_file(model, author_format)
        click.echo(author_format)
        return
    sha256 = files.sha256(target.model)
    held = None
    if graph != "step":
        held = schedule.resolve(None, lambda: tuned_schedules(target.path, sha256))
    plan = ExportPlan(graph, "int8" if int8 else "fp16" if fp16 else "fp32", held)
    with files.lock(target.exports_folder, "`lutdeploy export`"):
        tuned = _fresh(target, sha256)
        verify = partial(_verify, model, plan)
        keep = partial(export_model, model, plan, target, sha256, verify, tuned=tuned)
        folder = _export_int8(model, keep) if int8 else keep()
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    note(f"exported and checked against PyTorch, {size:.1f} MB")
    click.echo(folder)


def _fresh(target: Run, model: str) -> tuple[Schedule, ...]:
    """The run's tuned schedules for the manifest; none, and a note, where they are stale."""
    from lutdeploy.artefacts.tuned_steps import read_tuned_steps

    if not target.tuned_steps.is_file():
        return ()
    known = read_tuned_steps(target.tuned_steps)
    if known.model_sha256 == model:
        return known.schedules
    note(f"{target.tuned_steps} was tuned for other weights: left out of the export")
    return ()


def _verify(model: LutTransformer, plan: ExportPlan, folder: Path) -> None:
    """Hold a fresh export in ONNX Runtime against PyTorch."""
    from lutdeploy.engines import EngineRequest, open_engine
    from lutdeploy.parity import compare
    from lutdeploy.sampling import batch_noise

    levels: tuple[str, ...] = ("step",)
    if plan.graph == "loop":
        levels = ("trajectory", "picture")
    if plan.precision == "int8":
        levels = ("step", "trajectory", "picture")
    noise = batch_noise(0, range(1 if plan.graph == "loop" else 2), model.config.image_shape)
    with open_engine(EngineRequest(folder, "onnxruntime")) as engine:
        report = compare(model, engine, plan.precision, noise=noise, levels=levels)
    if not report.passed:
        raise ParityError(
            f"{plan.name} differs from PyTorch and was not kept: {report.failures()[0]}"
        )
    if plan.precision == "int8":
        note(f"pictures: PSNR {report.final.psnr:.1f} dB to float32")


def _export_int8(model: LutTransformer, export: Callable[..., Path]) -> Path:
    """Keep ever more of the sensitive products in float32 until the checks pass.

    Args:
        model: float32.
        export: :func:`lutdeploy.engines.export.graphs.export_model`, all but ``quantize`` given.
    """
    from lutdeploy.engines.export.int8 import quantize_graph
    from lutdeploy.quantization import float_ladder, measure_sensitivity
    from lutdeploy.sampling import batch_noise

    note("measuring what each product costs in int8")
    sensitivity = measure_sensitivity(model, batch_noise(0, range(2), model.config.image_shape))
    ranked = sensitivity.ranked()
    failure: ParityError | None = None
    for kept in float_ladder(ranked):
        if failure is not None:
            note(f"{failure}; again with {', '.join(kept)} in float32")
        try:
            folder = export(
                quantize=partial(quantize_graph, model=model, kept=kept, sensitivity=sensitivity)
            )
        except ParityError as error:
            failure = error
            continue
        note(f"{len(ranked) - len(kept)} of {len(ranked)} products are int8; most sensitive:")
        for name in ranked[:3]:
            errors = sensitivity.errors[name]
            worst = max(range(len(errors)), key=errors.__getitem__)
            at = sensitivity.schedule.rows[worst].t
            note(f"  {name}: rms error of x0 up to {errors[worst]:.2g}, at t = {at:.3g}")
        return folder
    raise ParityError(f"this model does not bear int8: {failure}")
