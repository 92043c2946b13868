"""From an export to TensorRT plans: built once, keyed by what they are made of, then judged.

Networks are strongly typed: precision is what the ONNX graph says, so half precision is
asked for at export. Only names that TensorRT 10.13 and 11.1 both have are used.
"""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import tensorrt as trt

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import Manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.verdicts import store_verdict, verdict_of
from lutdeploy.engines.cuda.device import CudaDevice
from lutdeploy.engines.tensorrt import plan
from lutdeploy.engines.tensorrt.engine import (
    EngineLog,
    TensorRTDenoiser,
    check_engine,
    load_engine,
    open_runtime,
    this_machine,
)
from lutdeploy.engines.tensorrt.layers import LayerReport, merge_reports, read_layers
from lutdeploy.engines.tensorrt.support import GraphReport
from lutdeploy.errors import BackendError
from lutdeploy.model import LutTransformer
from lutdeploy.parity import Report, compare
from lutdeploy.sampling import Denoiser, batch_noise
from lutdeploy.schedule import solver_schedule
from lutdeploy.signature import Signature, graph_signature

Note = Callable[[str], None]
IMAGES = 4  # of the parity check after a build


class BuildProgress(trt.IProgressMonitor):  # type: ignore[misc]  # tensorrt has no types
    """Hands on the name of each phase; cancels the build when told to."""

    def __init__(self, on_phase: Note) -> None:
        trt.IProgressMonitor.__init__(self)
        self.cancelled = False
        self._on_phase = on_phase

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Called by TensorRT, from any of its threads."""
        self._on_phase(phase_name)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """False ends the build."""
        return not self.cancelled

    def phase_finish(self, phase_name: str) -> None:
        """Called by TensorRT; the next phase's start says enough."""


class TimingCache:
    """The builder's measurements on disk, so that the next build need not repeat them."""

    def __init__(self, path: Path, note: Note) -> None:
        self.path, self._note = path, note
        self._data = path.read_bytes() if path.is_file() else b""

    def attach(self, config: Any) -> None:
        """Give a build what is known; what is foreign is reported and left out."""
        if self._data and not self._offer(config):
            self._note(
                f"timing cache {self.path} was measured by another TensorRT, on another device, or "
                "is damaged: measuring anew"
            )
            self._data = b""
        if not self._data and not self._offer(config):
            raise BackendError("TensorRT made no timing cache; see its log")

    def _offer(self, config: Any) -> bool:
        self._cache = config.create_timing_cache(self._data)  # TensorRT borrows it
        return self._cache is not None and bool(config.set_timing_cache(self._cache, False))

    def save(self, config: Any) -> None:
        """Write what is known after a build, atomically."""
        cache = config.get_timing_cache()
        if cache is None:
            return
        data = bytes(cache.serialize())
        if data != self._data:
            files.write_atomic(self.path, data)
            self._data = data


def parse_graph(
    builder: Any, log: EngineLog, graph: Path, batch: plan.BatchProfile
) -> tuple[Any, Any]:
    """A strongly typed network, and the parser, which owns its weights until the build is done."""
    model = onnx.load(graph, load_external_data=False)
    if batch.static:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch.min
    # The flag's value differs between versions; 11 ignores it, 10 is weakly typed without.
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString(), str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = [
            f"node {error.node_name() or '?'} ({error.node_operator() or '?'}): {error.desc()}"
            for error in errors
        ]
        raise BackendError(f"TensorRT cannot parse {graph}: {'; '.join(said) or log.last_error()}")
    return network, parser


def configure(
    builder: Any, options: plan.BuildOptions, signature: Signature, progress: BuildProgress
) -> Any:
    """The builder's configuration: one optimization profile, TF32 off, details on."""
    config = builder.create_builder_config()
    # float32 here is either the reference or an island that was kept wide on purpose.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = options.optimization_level
    config.progress_monitor = progress
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    batch = options.batch
    if not batch.static:
        profile = builder.create_optimization_profile()
        for spec in signature.inputs:
            shapes = [(size, *spec.row) for size in (batch.min, batch.opt, batch.max)]
            try:
                profile.set_shape(spec.name, *shapes)
            except RuntimeError as error:
                raise BackendError(
                    f"TensorRT refuses batch {batch} of {spec.name}: {error}"
                ) from error
        if config.add_optimization_profile(profile) < 0:
            raise BackendError(f"TensorRT refuses the optimization profile of batch {batch}")
    return config


def build_plan(
    graph: Path,
    signature: Signature,
    options: plan.BuildOptions,
    device: CudaDevice,
    cache: TimingCache,
    on_phase: Note,
) -> bytes:
    """Build one exported graph. Ctrl-C cancels the build at its next step."""
    log, progress = EngineLog(), BuildProgress(on_phase)
    builder = trt.Builder(log)
    network, parser = parse_graph(builder, log, graph, options.batch)
    config = configure(builder, options, signature, progress)
    cache.attach(config)
    # The build does not return to Python; in a thread of its own it leaves Ctrl-C to this one.
    with ThreadPoolExecutor(1, initializer=device.activate) as pool:
        building = pool.submit(builder.build_serialized_network, network, config)
        while True:
            try:
                serialized = building.result(timeout=0.1)
                break
            except NotYet:
                continue
            except KeyboardInterrupt:
                progress.cancelled = True
                raise  # leaving the pool waits for the build to stop
    if serialized is None:
        raise BackendError(f"TensorRT built no engine from {graph}: {log.last_error()}")
    cache.save(config)
    del parser
    return bytes(serialized)


def build_export(
    run: Run,
    manifest: Manifest,
    options: plan.BuildOptions,
    device: CudaDevice,
    timing_cache: Path | None,
    force: bool,
    on_phase: Callable[[int, str], None],
    note: Note,
) -> list[tuple[plan.PlanRecord, bool]]:
    """The engines of an export, one per graph, each built unless it is there already.

    The caller holds the lock of the run's engines. Each plan is written before its record,
    so that a record speaks of a whole plan whenever this is stopped.

    Args:
        timing_cache: another file than the run's.
        force: build even what is there.
        on_phase: told the graph's number and the builder's phase.

    Returns:
        A record for each graph, and whether it was there already.
    """
    manifest.verify()
    for names in ("*.plan", "*.json", run.timing_cache.name):
        files.clear_leftovers(run.engines, names)
    cache = TimingCache(timing_cache or run.timing_cache, note)
    machine = this_machine(device)
    results = []
    for k, graph in enumerate(manifest.graphs):
        fields = plan.key_fields(manifest, graph, options, machine)
        path = run.plan_record(plan.key_of(fields))
        if not force and path.is_file():
            if record := plan.find_plan(run, fields):
                results.append((record, True))
                continue
            note(f"{path.with_suffix('.plan')} or its record is damaged: building it again")
        on_phase(k, "parsing")
        signature = graph_signature(manifest.config, manifest.graph, manifest.schedule, k)
        start = time.perf_counter()
        on_build = partial(on_phase, k)
        data = build_plan(manifest.folder / graph, signature, options, device, cache, on_build)
        record = plan.PlanRecord(
            path=path,
            fields=fields,
            export=manifest.name,
            graph_file=graph,
            plan_bytes=len(data),
            plan_sha256=hashlib.sha256(data).hexdigest(),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
            build_seconds=round(time.perf_counter() - start, 3),
        )
        path.unlink(missing_ok=True)  # an old record must not speak of the new plan
        files.write_atomic(record.plan, data)
        record.write()
        results.append((record, False))
    return results


def inspect_engine(record: plan.PlanRecord, manifest: Manifest, graph: GraphReport) -> LayerReport:
    """Tensors, profile and layers of a built engine against its graph."""
    log = EngineLog()
    runtime = open_runtime(log, record)
    engine = load_engine(runtime, log, record)
    k = manifest.graphs.index(record.graph_file)
    signature = graph_signature(manifest.config, manifest.graph, manifest.schedule, k)
    check_engine(engine, signature, record.profile, str(record.plan))
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return read_layers(text, graph, manifest.precision)


def judge(
    run: Run,
    records: list[plan.PlanRecord],
    graphs: list[GraphReport],
    manifest: Manifest,
    device: CudaDevice,
    model: LutTransformer,
    reference: Denoiser,
) -> tuple[LayerReport, Report | None]:
    """Check the engines of one build and store a verdict on each in the run.

    Args:
        records, graphs: an engine and its graph's report, for each graph of the export.
        model: the float32 model, whose own half precision sets the limits of fp16.
        reference: what is right: float32 on the CPU.

    Returns:
        All layers together, and the parity report: None when the layers already show another
        precision than the export's.
    """
    layers = [
        inspect_engine(record, manifest, graph)
        for record, graph in zip(records, graphs, strict=True)
    ]
    together = merge_reports(layers)
    report, schedule = None, manifest.schedule or solver_schedule("euler", 64)
    if not together.failures:
        with TensorRTDenoiser(manifest, device, records) as engine:
            noise = batch_noise(0, range(IMAGES), manifest.config.image_shape)
            report = compare(model, engine, manifest.precision, noise=noise, reference=reference)
    found = report or Report.without_checks(manifest.precision, schedule)
    for record, layer in zip(records, layers, strict=True):
        identity = {
            "backend": "tensorrt",
            "device": device.gpu,
            "export": manifest.name,
            "engine_sha256": record.plan_sha256,
            "model_sha256": manifest.source_sha256,
        }
        verdict = verdict_of(found, identity, "build", together.failures, layer.to_dict())
        store_verdict(run, verdict)
    return together, report
