"""`lutdeploy build`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from lutdeploy.artefacts import files
from lutdeploy.artefacts.target import find, find_run
from lutdeploy.cli.console import note, show_report
from lutdeploy.cli.requests import EXPORT, POSITIVE, RUN
from lutdeploy.engines import require_tensorrt
from lutdeploy.engines.tensorrt import plan
from lutdeploy.signature import GRAPHS


@click.command("build")
@RUN
@EXPORT
@click.option("--graph", type=click.Choice(GRAPHS), help="The newest export of this kind.")
@click.option(
    "--batch",
    "batches",
    multiple=True,
    default=("1:64:256",),
    show_default=True,
    metavar="N|MIN:OPT:MAX",
    help="A static batch, or a range tuned for OPT; again for an engine each.",
)
@click.option("--workspace", type=POSITIVE, metavar="MIB", help="Default: what TensorRT takes.")
@click.option(
    "--opt-level",
    type=click.IntRange(0, 5),
    default=3,
    show_default=True,
    help="How hard TensorRT searches.",
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Default: engines/timing.cache in the run.",
)
@click.option("--hardware-compatible", is_flag=True, help="For every GPU from Ampere on; slower.")
@click.option("--version-compatible", is_flag=True, help="For later TensorRT versions; slower.")
@click.option("--refittable", is_flag=True, help="Weights can be changed afterwards; slower.")
@click.option("--device", default="cuda", show_default=True, help="cuda or cuda:N.")
@click.option("--dry-run", is_flag=True, help="Check the graphs, say what would be built.")
@click.option("--force", is_flag=True, help="Build even what is there and fits.")
def command(
    run: Path | None,
    export: str | None,
    graph: str | None,
    batches: tuple[str, ...],
    workspace: int | None,
    opt_level: int,
    timing_cache: Path | None,
    hardware_compatible: bool,
    version_compatible: bool,
    refittable: bool,
    device: str,
    dry_run: bool,
    force: bool,
) -> None:
    """Build TensorRT engines from an export, and check them before they may be used.

    Precision is the export's: `lutdeploy export --fp16` makes a float16 engine. An engine that
    is there and fits exactly is used again. Exit code 1 when an engine fails its checks.
    """
    from lutdeploy.engines.tensorrt.job import (
        build_checked,
        check_graphs,
        export_to_build,
        planned_engines,
    )

    options = [
        plan.BuildOptions(
            batch=plan.BatchProfile.parse(text),
            workspace_mib=workspace,
            optimization_level=opt_level,
            hardware_compatible=hardware_compatible,
            version_compatible=version_compatible,
            refittable=refittable,
        )
        for text in batches
    ]
    path = find(run, note)
    target = find_run(path, note)
    manifest = export_to_build(target, path, export, graph, note)
    if manifest.precision == "fp32":
        note("this export is float32, and so will be the engine; --fp16 belongs to `export`")
    graphs = check_graphs(manifest, note)
    if dry_run:
        for option in options:
            for line in planned_engines(target, manifest, option, device, force):
                click.echo(line)
        return
    require_tensorrt()
    from lutdeploy.engines.cuda.device import CudaDevice

    gpu = CudaDevice(device)
    if timing_cache is not None and opt_level == 0:
        note("TensorRT ignores the timing cache at --opt-level 0")
    with files.lock(target.engines, "`lutdeploy build`", on_wait=note):
        for option in options:
            with _progress(len(manifest.graphs)) as on_phase:
                plans = build_checked(
                    *(target, manifest, graphs, option, gpu, timing_cache, force),
                    on_phase=on_phase,
                    note=note,
                    show=show_report,
                )
            for file in plans:
                click.echo(file)


@contextlib.contextmanager
def _progress(graphs: int) -> Iterator[Callable[[int, str], None]]:
    """The builder's phase and the time it has taken; gives what is to be told each phase."""
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("build")

        def on_phase(k: int, phase: str) -> None:
            number = f" {k + 1} of {graphs}" if graphs > 1 else ""
            bar.update(task, description=f"build{number}: {phase[:60]}")

        yield on_phase
