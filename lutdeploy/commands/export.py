"""`lutdeploy export`."""

from __future__ import annotations

from pathlib import Path

import click

from lutdeploy import bundle
from lutdeploy.commands.console import note
from lutdeploy.commands.options import RUN, SHIFT, SOLVER, STEPS
from lutdeploy.commands.targets import find_run
from lutdeploy.errors import ParityError, UsageError
from lutdeploy.signature import GRAPHS


@click.command()
@RUN
@click.option("--fp16", is_flag=True, help="float16 body with float32 islands.")
@click.option("--graph", type=click.Choice(GRAPHS), default="step", show_default=True)
@SOLVER
@STEPS
@SHIFT
@click.option(
    "--author-format",
    type=click.Path(path_type=Path),
    metavar="FILE.pth",
    help="Write the author's state dict instead of ONNX.",
)
def export(
    run: Path | None,
    fp16: bool,
    graph: str,
    solver: str | None,
    steps: int | None,
    shift: float | None,
    author_format: Path | None,
) -> None:
    """Export a run to ONNX and check it against PyTorch before it takes its place.

    step: one step of any solver. per-step: a graph for each step, constants inside.
    loop: the whole trajectory in one graph.
    """
    if graph == "step" and (solver, steps, shift) != (None, None, None):
        raise UsageError(
            "--solver, --steps and --shift belong to --graph per-step and loop; "
            "a step graph follows any"
        )
    from lutdeploy.checkpoint import load_model, save_author_file
    from lutdeploy.export import ExportPlan, export_model
    from lutdeploy.sampling import choose_table

    target = find_run(run)
    model = load_model(target.model)
    if author_format is not None:
        save_author_file(model, author_format)
        click.echo(author_format)
        return
    table = None if graph == "step" else choose_table(None, solver, steps, shift)
    plan = ExportPlan(graph, "fp16" if fp16 else "fp32", table)

    def verify(folder: Path) -> None:
        from engines import open_engine
        from lutdeploy.parity import compare
        from lutdeploy.sampling import batch_noise

        levels = ("trajectory", "picture") if graph == "loop" else ("step",)
        noise = batch_noise(0, range(1 if graph == "loop" else 2), model.config.image_shape)
        with open_engine(folder, "onnxruntime") as engine:
            report = compare(model, engine, plan.precision, noise=noise, levels=levels)
        if not report.passed:
            raise ParityError(
                f"{plan.name} differs from PyTorch and was not kept: {report.failures()[0]}"
            )

    with bundle.lock(target.path / "onnx", "`lutdeploy export`"):
        folder = export_model(model, plan, target, bundle.sha256(target.model), verify)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    note(f"exported and checked against PyTorch, {size:.1f} MB")
    click.echo(folder)
