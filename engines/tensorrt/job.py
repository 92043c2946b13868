"""From an export to TensorRT engines that were checked: what `lutdeploy build` does."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from lutdeploy.artefacts.checkpoint import load_model
from lutdeploy.artefacts.manifest import Manifest, read_manifest
from lutdeploy.artefacts.run import Run, locate
from lutdeploy.artefacts.verdicts import read_verdicts
from lutdeploy.engines import (
    Engine,
    EngineRequest,
    choose_export,
    open_engine,
    require_same_model,
    tensorrt_machine,
)
from lutdeploy.engines.cuda.device import CudaDevice
from lutdeploy.engines.export.graphs import ExportPlan, export_model
from lutdeploy.engines.tensorrt import plan
from lutdeploy.engines.tensorrt.support import GraphReport, check_graph
from lutdeploy.errors import LutDeployError, ParityError, UsageError
from lutdeploy.model import LutTransformer
from lutdeploy.parity import Report

Note = Callable[[str], None]


def export_to_build(
    target: Run, path: Path, export: str | None, graph: str | None, note: Note
) -> Manifest:
    """The manifest of the export that was asked for, by path, name or kind; else the newest."""
    located = locate(path if path.is_dir() else target.path)
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


def check_graphs(manifest: Manifest, note: Note) -> list[GraphReport]:
    """Hold the graphs against what TensorRT takes; a problem ends here, a warning is said."""
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


def planned_engines(
    target: Run, manifest: Manifest, options: plan.BuildOptions, device: str, force: bool
) -> Iterator[str]:
    """A line for each engine: whether it would be built or used again."""
    machine = tensorrt_machine(device)
    if machine is None:
        size = f"{len(manifest.graphs)} engine(s), batch {options.batch}"
        yield f"would build {size}; TensorRT or the GPU is missing here, so no key is known"
        return
    for name in manifest.graphs:
        fields = plan.key_fields(manifest, name, options, machine)
        there = not force and plan.find_plan(target, fields) is not None
        yield f"{'would reuse' if there else 'would build'} {target.plan(plan.key_of(fields))}"


def build_checked(
    target: Run,
    manifest: Manifest,
    graphs: list[GraphReport],
    options: plan.BuildOptions,
    gpu: CudaDevice,
    timing_cache: Path | None,
    force: bool,
    on_phase: Callable[[int, str], None],
    note: Note,
    show: Callable[[Report], None],
) -> list[Path]:
    """Build the engines of an export, judge those that are new or were never judged.

    Args:
        graphs: from :func:`check_graphs`.
        timing_cache, force, on_phase: as for
            :func:`lutdeploy.engines.tensorrt.builder.build_export`.
        show: gets the parity report.

    Returns:
        The plans.
    """
    from lutdeploy.engines.tensorrt.builder import build_export, judge

    built = build_export(target, manifest, options, gpu, timing_cache, force, on_phase, note)
    records = [record for record, _ in built]
    reused = sum(again for _, again in built)
    if reused:
        note(f"{reused} engine(s) were there already and fit: reused")
    verdicts = read_verdicts(target)
    known = [plan.verdict_on(record, verdicts) for record in records]
    if reused == len(built) and all(verdict and verdict.passed for verdict in known):
        note("their checks passed when they were built")
        return [record.plan for record in records]
    note("checking layers and parity")
    model = load_model(target.model)
    with _float32_reference(target, manifest, model) as reference:
        layers, report = judge(target, records, graphs, manifest, gpu, model, reference)
    for warning in layers.warnings:
        note(f"warning: {warning}")
    note(
        f"layers: {layers.float16_products} matrix products in float16, "
        f"{layers.float32_products} in float32, {layers.fused_attention} fused attentions"
    )
    if report is not None:
        show(report)
    if layers.failures or report is None:
        raise ParityError(f"the engine is not what its export says: {layers.failures[0]}")
    if not report.passed:
        raise ParityError(f"the engine failed parity: {'; '.join(report.failures()[:2])}")
    return [record.plan for record in records]


@contextlib.contextmanager
def _float32_reference(target: Run, manifest: Manifest, model: LutTransformer) -> Iterator[Engine]:
    """ONNX Runtime on the CPU in float32: the run's step export, or one made for this."""
    source = manifest.source_sha256
    with tempfile.TemporaryDirectory() as scratch:
        folder = target.float32_step(source) or export_model(
            model, ExportPlan(), Run(Path(scratch)), source
        )
        with open_engine(EngineRequest(folder, "onnxruntime", "cpu")) as reference:
            yield reference
