"""`lutdeploy build`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from lutdeploy.artefacts import files
from lutdeploy.artefacts.target import find, find_run
from lutdeploy.cli.console import answer, note, show_report
from lutdeploy.cli.progress import phases
from lutdeploy.cli.requests import EXPORT, POSITIVE, RUN
from lutdeploy.engines.tensorrt import plan
from lutdeploy.engines.tensorrt.library import MODULES, RTX, TENSORRT
from lutdeploy.signature import GRAPHS


@click.command("build")
@RUN
@EXPORT
@click.option(
    "--backend",
    type=click.Choice(tuple(MODULES)),
    help="tensorrt: for the GPU here. tensorrt-rtx: for GeForce and RTX cards, on any machine. "
    "Default: tensorrt; with --dry-run tensorrt-rtx where tensorrt cannot work.",
)
@click.option(
    "--architecture",
    metavar="M.N,…",
    help="Compute capabilities for tensorrt-rtx, such as 8.9,12.0. Default: that of the GPU here, "
    "else 8.0, 8.6, 8.9 and 12.0.",
)
@click.option("--graph", type=click.Choice(GRAPHS), help="The newest export of this kind.")
@click.option(
    "--batch",
    "batches",
    multiple=True,
    default=("1:64:256",),
    show_default=True,
    metavar="N|MIN:OPT:MAX|N,N,…",
    help="A static batch, a range tuned for OPT, or one engine tuned for several sizes; again for "
    "an engine each.",
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
    help="For tensorrt. Default: engines/timing.cache in the run.",
)
@click.option("--hardware-compatible", is_flag=True, help="For every GPU from Ampere on; slower.")
@click.option("--version-compatible", is_flag=True, help="For later TensorRT versions; slower.")
@click.option("--refittable", is_flag=True, help="Weights can be changed afterwards; slower.")
@click.option("--device", help="cuda or cuda:N. Default: cuda.")
@click.option("--dry-run", is_flag=True, help="Parse the graphs, show types and what to build.")
@click.option("--force", is_flag=True, help="Build even what is there and fits.")
def command(
    run: Path | None,
    export: str | None,
    backend: str | None,
    architecture: str | None,
    graph: str | None,
    batches: tuple[str, ...],
    workspace: int | None,
    opt_level: int,
    timing_cache: Path | None,
    hardware_compatible: bool,
    version_compatible: bool,
    refittable: bool,
    device: str | None,
    dry_run: bool,
    force: bool,
) -> None:
    """Build TensorRT engines from an export, and check them before they may be used.

    Precision is the export's: `lutdeploy export --fp16` makes a float16 engine. An engine that
    is there and fits exactly is used again. Engines that no GPU here can run are judged by
    `sample` where one can. Exit code 1 when an engine fails its checks.
    """
    from lutdeploy.engines import tensorrt_machines
    from lutdeploy.engines.tensorrt.job import (
        build_checked,
        build_target,
        export_to_build,
        planned_engines,
        show_types,
    )

    options = [
        plan.BuildOptions(
            profiles=plan.parse_batches(text),
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
    architectures = [] if architecture is None else architecture.replace(" ", "").split(",")
    if backend is None:
        backend = RTX if dry_run and TENSORRT not in tensorrt_machines() else TENSORRT
    place = build_target(backend, device, architectures, note)
    if dry_run:
        for name, types in show_types(manifest, options[0], place):
            counts = ", ".join(f"{count} {kind}" for kind, count in types.items())
            answer(f"{name}: {counts}")
        for option in options:
            for line in planned_engines(target, manifest, option, place, force):
                answer(line)
        return
    if backend == RTX and (hardware_compatible or timing_cache is not None):
        note("--hardware-compatible and --timing-cache are for tensorrt; here they do nothing")
    if timing_cache is not None and opt_level == 0:
        note("TensorRT ignores the timing cache at --opt-level 0")
    with files.lock(target.engines, "`lutdeploy build`", on_wait=note):
        for option in options:
            with _progress(len(manifest.graphs)) as on_phase:
                plans = build_checked(
                    *(target, manifest, option, place, timing_cache, force),
                    on_phase=on_phase,
                    note=note,
                    show=show_report,
                )
            for file in plans:
                answer(file)


@contextlib.contextmanager
def _progress(graphs: int) -> Iterator[Callable[[int, str], None]]:
    """The builder's phase and the time it has taken; gives what is to be told each phase."""
    with phases() as bar:
        task = bar.add_task("build", total=None)

        def on_phase(k: int, phase: str) -> None:
            number = f" {k + 1} of {graphs}" if graphs > 1 else ""
            bar.update(task, description=f"build{number}: {phase[:60]}")

        yield on_phase
