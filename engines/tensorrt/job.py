"""From an export to engines of either TensorRT that were checked: what `lutdeploy build` does."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lutdeploy.artefacts.checkpoint import load_model
from lutdeploy.artefacts.manifest import Manifest, read_manifest
from lutdeploy.artefacts.run import Run, locate
from lutdeploy.artefacts.verdicts import keep_verdict, read_verdicts, verdict_of
from lutdeploy.engines import (
    Engine,
    EngineRequest,
    choose_export,
    open_engine,
    require_same_model,
)
from lutdeploy.engines.cuda.device import CudaDevice
from lutdeploy.engines.export.graphs import ExportPlan, export_model
from lutdeploy.engines.tensorrt import plan
from lutdeploy.engines.tensorrt.builder import (
    BuildTarget,
    build_export,
    check_architectures,
    export_types,
)
from lutdeploy.engines.tensorrt.engine import (
    TensorRTDenoiser,
    choose_plans,
    records_of,
    require_passed,
    this_machine,
)
from lutdeploy.engines.tensorrt.layers import merge_reports, read_layers
from lutdeploy.engines.tensorrt.library import RTX_ARCHITECTURES, TENSORRT, load_tensorrt
from lutdeploy.engines.tensorrt.network import require_types
from lutdeploy.errors import BackendError, ParityError, UsageError
from lutdeploy.model import LutTransformer
from lutdeploy.parity import Report, compare
from lutdeploy.sampling import batch_noise

IMAGES = 4  # of the parity check after a build
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


def build_target(
    backend: str, device: str | None, architectures: Sequence[str], note: Note
) -> BuildTarget:
    """Where to build for: the GPU that is here, or architectures of TensorRT for RTX.

    Args:
        device: "cuda" or "cuda:N".
        architectures: compute capabilities; empty means that of the GPU here, and where there is
            none all of ``RTX_ARCHITECTURES``.

    Raises:
        UsageError: architectures for TensorRT, which builds for its own GPU alone.
        BackendError: no such TensorRT here, or no GPU where it needs one.
    """
    trt = load_tensorrt(backend)
    if backend == TENSORRT:
        if architectures:
            raise UsageError(
                "--architecture is for --backend tensorrt-rtx; tensorrt builds for the GPU here"
            )
        gpu = CudaDevice(device or "cuda")
        return BuildTarget(this_machine(backend, gpu), device=gpu)
    gpu_here = None
    try:
        gpu_here = CudaDevice(device or "cuda")
    except BackendError:
        if device is not None:
            raise
    machine = this_machine(backend, gpu_here)
    if not architectures:
        here = machine.compute_capability
        architectures = (here,) if here else RTX_ARCHITECTURES
        why = "the GPU here" if here else "no GPU here"
        note(f"architectures: {', '.join(architectures)} ({why})")
    return BuildTarget(machine, check_architectures(trt, architectures), gpu_here)


def show_types(
    manifest: Manifest, options: plan.BuildOptions, target: BuildTarget
) -> Iterator[tuple[str, dict[str, int]]]:
    """Each graph file and how many layers there are of each kind and type.

    Raises:
        ParityError: TensorRT's parser gives a layer another type than the export says.
    """
    for graph, types in export_types(manifest, options, target):
        require_types(types, manifest.folder / graph, manifest.precision)
        yield graph, types.counts()


def planned_engines(
    run: Run, manifest: Manifest, options: plan.BuildOptions, target: BuildTarget, force: bool
) -> Iterator[str]:
    """A line for each engine: whether it would be built or used again."""
    for name in manifest.graphs:
        fields = plan.key_fields(manifest, name, options, target.machine, target.architectures)
        there = not force and plan.find_plan(run, fields) is not None
        yield f"{'would reuse' if there else 'would build'} {run.plan(plan.key_of(fields))}"


def build_checked(
    run: Run,
    manifest: Manifest,
    options: plan.BuildOptions,
    target: BuildTarget,
    timing_cache: Path | None,
    force: bool,
    on_phase: Callable[[int, str], None],
    note: Note,
    show: Callable[[Report], None],
) -> list[Path]:
    """Build the engines of an export; judge those that no check has passed, if they run here.

    Args:
        timing_cache, force, on_phase: as for
            :func:`lutdeploy.engines.tensorrt.builder.build_export`.
        show: gets the parity report.

    Returns:
        The plans.
    """
    built = build_export(run, manifest, options, target, timing_cache, force, on_phase, note)
    records = [record for record, _ in built]
    reused = sum(again for _, again in built)
    if reused:
        note(f"{reused} engine(s) were there already and fit: reused")
    types = Counter[str]()
    for record in records:
        types.update(record.types)
    note("types: " + ", ".join(f"{count} {kind}" for kind, count in sorted(types.items())))
    verdicts = read_verdicts(run)
    known = [plan.verdict_on(record, verdicts) for record in records]
    if reused == len(built) and all(verdict and verdict.passed for verdict in known):
        note("their checks passed before")
    elif target.device is None or not target.runs_here:
        note(
            "compiled, not run: no GPU here for it. `sample` on the machine with the GPU runs "
            "parity first, once"
        )
    else:
        note("checking parity")
        report = judge_plans(run, manifest, records, target.device, note)
        show(report)
        if not report.passed:
            raise ParityError(f"the engine failed parity: {'; '.join(report.failures()[:2])}")
    return [record.plan for record in records]


def judge_plans(
    run: Run,
    manifest: Manifest,
    records: Sequence[plan.PlanRecord],
    device: CudaDevice,
    note: Note,
) -> Report:
    """Run an export's engines against float32 on the CPU, and store a verdict on each plan.

    Raises:
        UsageError: the run has no model to compare with.
    """
    if not run.model.is_file():
        raise UsageError(
            f"{run.path} has no {run.model.name}, without which its engines cannot be judged; "
            "--unverified uses them all the same"
        )
    model = load_model(run.model)
    noise = batch_noise(0, range(IMAGES), manifest.config.image_shape)
    with (
        _float32_reference(run, manifest, model) as reference,
        TensorRTDenoiser(manifest, device, records) as engine,
    ):
        report = compare(model, engine, manifest.precision, noise=noise, reference=reference)
        layers = [read_layers(text) for text in engine.layers()]
        note(f"layers: {merge_reports(layers).describe()}")
        for record, layer in zip(records, layers, strict=True):
            identity = {**engine.identity, "engine_sha256": record.plan_sha256}
            verdict = verdict_of(report, identity, "build", layers=layer.to_dict())
            keep_verdict(run, verdict, note)
    return report


def open_plans(
    run: Run, manifest: Manifest, request: EngineRequest, note: Note
) -> TensorRTDenoiser:
    """The engine that a request means; one that was compiled and never run is judged first.

    Raises:
        BackendError: no TensorRT, no GPU, or no engine that fits here.
        ParityError: the best that fits failed its checks.
    """
    load_tensorrt(request.backend)
    gpu = CudaDevice(request.device or "cuda")
    machine = this_machine(request.backend, gpu)
    states = choose_plans(run, manifest, machine, request.batch)
    records = records_of(states)
    if not request.unverified:
        # One that fails gives way to the next best, which may never have run either.
        while any(state.verdict is None for state in states):
            note("this engine was compiled and has never run: parity first, once")
            judged = records
            report = judge_plans(run, manifest, judged, gpu, note)
            states = choose_plans(run, manifest, machine, request.batch)
            records = records_of(states)
            if records == judged and any(state.verdict is None for state in states):
                if not report.passed:  # and its verdict could not be kept
                    raise ParityError(f"the engine failed parity: {report.failures()[0]}")
                break
        require_passed(states)
    return TensorRTDenoiser(manifest, gpu, records)


@contextlib.contextmanager
def _float32_reference(run: Run, manifest: Manifest, model: LutTransformer) -> Iterator[Engine]:
    """ONNX Runtime on the CPU in float32: the run's step export, or one made for this."""
    source = manifest.source_sha256
    with tempfile.TemporaryDirectory() as scratch:
        folder = run.float32_step(source) or export_model(
            model, ExportPlan(), Run(Path(scratch)), source
        )
        with open_engine(EngineRequest(folder, "onnxruntime", "cpu")) as reference:
            yield reference
