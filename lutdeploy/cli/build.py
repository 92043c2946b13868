"""`lutdeploy build`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import Manifest, read_manifest
from lutdeploy.artefacts.run import Run, locate
from lutdeploy.cli.console import note, show_report
from lutdeploy.cli.options import EXPORT, POSITIVE, RUN
from lutdeploy.cli.targets import find_run
from lutdeploy.errors import LutDeployError, ParityError, UsageError
from lutdeploy.signature import GRAPHS

if TYPE_CHECKING:
    from lutdeploy.engines import Engine
    from lutdeploy.engines.cuda.device import CudaDevice
    from lutdeploy.engines.tensorrt import plan
    from lutdeploy.engines.tensorrt.support import GraphReport
    from lutdeploy.model import LutTransformer


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
    from lutdeploy.engines.tensorrt import plan

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
    target = find_run(run)
    manifest = _export_to_build(target, run, export, graph)
    if manifest.precision == "fp32":
        note("this export is float32, and so will be the engine; --fp16 belongs to `export`")
    graphs = _check_graphs(manifest)
    if dry_run:
        for option in options:
            _say_what_would_be_built(target, manifest, option, device, force)
        return
    from lutdeploy.engines import require_tensorrt

    require_tensorrt()
    from lutdeploy.engines.cuda.device import CudaDevice

    gpu = CudaDevice(device)
    if timing_cache is not None and opt_level == 0:
        note("TensorRT ignores the timing cache at --opt-level 0")
    with files.lock(target.engines, "`lutdeploy build`", on_wait=note):
        for option in options:
            _build(target, manifest, graphs, option, gpu, timing_cache, force)


def _export_to_build(
    target: Run, given: Path | None, export: str | None, graph: str | None
) -> Manifest:
    """The manifest of the export that was asked for, by path, name or kind; else the newest."""
    from lutdeploy.engines import choose_export, require_same_model

    located = locate(given if given is not None and given.is_dir() else target.path)
    if export is None and located.export is None:
        known = ((e.name, read_manifest(e)) for e in target.exports())
        fitting = [name for name, m in known if m.precision != "int8" and graph in (None, m.graph)]
        if graph is not None and not fitting:
            raise UsageError(
                f"{target.path} has no {graph} export; run `lutdeploy export --graph {graph}` first"
            )
        export = fitting[0] if fitting else None
    folder = choose_export(located, export)
    if folder is None:
        raise UsageError(f"{target.path} has no export; run `lutdeploy export --fp16` first")
    manifest = read_manifest(folder)
    if graph is not None and manifest.graph != graph:
        raise UsageError(f"{folder} is a {manifest.graph} export, not {graph}")
    if manifest.precision == "int8":
        raise UsageError(
            f"{manifest.name} is an int8 export, which is for CPUs; `lutdeploy export --fp16` "
            "makes one for TensorRT"
        )
    require_same_model(manifest, target.model)
    note(f"export: {manifest.name}")
    return manifest


def _check_graphs(manifest: Manifest) -> list[GraphReport]:
    """Hold the graphs against what TensorRT takes; a problem ends here, a warning is said."""
    from lutdeploy.engines.tensorrt.support import check_graph

    manifest.verify()
    warnings: dict[str, None] = {}
    reports = []
    for name in manifest.graphs:
        report = check_graph(manifest.folder / name, manifest.precision, manifest.config)
        if report.problems:
            raise LutDeployError(
                f"{manifest.folder / name} does not suit TensorRT: {'; '.join(report.problems[:3])}"
            )
        warnings |= dict.fromkeys(report.warnings)
        reports.append(report)
    for warning in warnings:
        note(f"warning: {warning}")
    note(f"{len(manifest.graphs)} graph(s): operators, types, axes and islands suit TensorRT")
    return reports


def _say_what_would_be_built(
    target: Run,
    manifest: Manifest,
    option: plan.BuildOptions,
    device: str,
    force: bool,
) -> None:
    from lutdeploy.engines import tensorrt_machine
    from lutdeploy.engines.tensorrt import plan

    machine = tensorrt_machine(device)
    if machine is None:
        size = f"{len(manifest.graphs)} engine(s), batch {option.batch}"
        click.echo(f"would build {size}; TensorRT or the GPU is missing here, so no key is known")
        return
    for name in manifest.graphs:
        fields = plan.key_fields(manifest, name, option, machine)
        there = not force and plan.find_plan(target, fields) is not None
        click.echo(
            f"{'would reuse' if there else 'would build'} {target.plan(plan.key_of(fields))}"
        )


def _build(
    target: Run,
    manifest: Manifest,
    graphs: list[GraphReport],
    option: plan.BuildOptions,
    gpu: CudaDevice,
    timing_cache: Path | None,
    force: bool,
) -> None:
    """Build one set of engines, judge those that are new or were never judged, show it."""
    from lutdeploy.artefacts.checkpoint import load_model
    from lutdeploy.engines.tensorrt.builder import build_export, judge

    with _build_progress(len(manifest.graphs)) as on_phase:
        built = build_export(
            target, manifest, option, gpu, timing_cache, force, on_phase, note=note
        )
    records = [record for record, _ in built]
    reused = sum(again for _, again in built)
    if reused:
        note(f"{reused} engine(s) were there already and fit: reused")
    if reused == len(built) and all(record.verdict == "passed" for record in records):
        note("their checks passed when they were built")
    else:
        note("checking layers and parity")
        model = load_model(target.model)
        with _float32_reference(target, manifest, model) as reference:
            records, layers, report = judge(records, graphs, manifest, gpu, model, reference)
        for warning in layers.warnings:
            note(f"warning: {warning}")
        note(
            f"layers: {layers.float16_products} matrix products in float16, "
            f"{layers.float32_products} in float32, {layers.fused_attention} fused attentions"
        )
        if report is not None:
            show_report(report)
        if layers.failures or report is None:
            raise ParityError(f"the engine is not what its export says: {layers.failures[0]}")
        if not report.passed:
            raise ParityError(f"the engine failed parity: {'; '.join(report.failures()[:2])}")
    for record in records:
        click.echo(record.plan)


@contextlib.contextmanager
def _build_progress(graphs: int) -> Iterator[Callable[[int, str], None]]:
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


@contextlib.contextmanager
def _float32_reference(target: Run, manifest: Manifest, model: LutTransformer) -> Iterator[Engine]:
    """ONNX Runtime on the CPU in float32: the run's step export, or one made for this."""
    import tempfile

    from lutdeploy.engines import open_engine
    from lutdeploy.engines.export.graphs import ExportPlan, export_model

    source = manifest.source_sha256
    with tempfile.TemporaryDirectory() as scratch:
        folder = target.float32_step(source) or export_model(
            model, ExportPlan(), Run(Path(scratch)), source
        )
        with open_engine(folder, "onnxruntime", "cpu") as reference:
            yield reference
