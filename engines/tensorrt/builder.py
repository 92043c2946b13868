"""From an export to plans of either TensorRT: parsed, typed, built once, keyed by their contents.

Networks are strongly typed: precision is what the ONNX graph says, so half precision is
asked for at export. Polygraphy drives parser and builder.
"""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import Manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.engines.cuda.device import CudaDevice
from lutdeploy.engines.tensorrt import plan
from lutdeploy.engines.tensorrt.library import RTX, TITLES, load_tensorrt
from lutdeploy.engines.tensorrt.network import (
    Messages,
    NetworkTypes,
    network_types,
    parse,
    polygraphy,
    read_graph,
    require_types,
)
from lutdeploy.errors import BackendError, UsageError
from lutdeploy.signature import Signature, graph_signature

Note = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class BuildTarget:
    """Where plans are to run: a GPU that is here, or architectures for TensorRT for RTX."""

    machine: plan.Machine
    architectures: tuple[str, ...] = ()  # compute capabilities, as ("8.9", "12.0"); of RTX alone
    device: CudaDevice | None = None

    @property
    def backend(self) -> str:
        return self.machine.backend

    @property
    def runs_here(self) -> bool:
        """Whether the GPU that is here can run what is built."""
        if self.device is None:
            return False
        return self.backend != RTX or self.machine.compute_capability in self.architectures


def check_architectures(trt: Any, architectures: Sequence[str]) -> tuple[str, ...]:
    """Compute capabilities that TensorRT for RTX compiles for, in ascending order."""
    prefix = "SM"
    known = {
        f"{name.removeprefix(prefix)[:-1]}.{name[-1]}"
        for name in trt.ComputeCapability.__members__
        if name.startswith(prefix)
    }

    def number(capability: str) -> tuple[int, ...]:
        return tuple(map(int, capability.split(".")))

    for capability in architectures:
        if capability not in known:
            there = ", ".join(sorted(known, key=number))
            raise UsageError(
                f"architecture {capability}: TensorRT for RTX {trt.__version__} compiles for "
                f"{there}"
            )
    return tuple(sorted(set(architectures), key=number))


def open_progress(trt: Any, on_phase: Note) -> Any:
    """A ``trt.IProgressMonitor`` that hands on the name of each phase, and can cancel the build."""

    class BuildProgress(trt.IProgressMonitor):  # type: ignore[misc]  # tensorrt has no types
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Called by TensorRT, from any of its threads."""
            on_phase(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """False ends the build."""
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            """Called by TensorRT; the next phase's start says enough."""

    return BuildProgress()


def profile_of(loaders: Any, batch: plan.BatchProfile, signature: Signature) -> Any:
    """Polygraphy's optimization profile for batches between ``min`` and ``max``."""
    profile = loaders.Profile()
    for spec in signature.inputs:
        shapes = [(size, *spec.row) for size in (batch.min, batch.opt, batch.max)]
        profile.add(spec.name, *shapes)
    return profile


class GraphBuild:
    """The build of one graph file, in a thread of its own.

    TensorRT does not return to Python while it parses or builds, and its callbacks let no
    exception out. So the thread leaves Ctrl-C to the caller, and a cancelled build ends at its
    next step.

    Args:
        on_phase: told the builder's phases.
        note: told of a timing cache that is of no use.
    """

    def __init__(
        self,
        path: Path,
        options: plan.BuildOptions,
        target: BuildTarget,
        on_phase: Note,
        note: Note,
    ) -> None:
        self.path, self.options, self.target, self.note = path, options, target, note
        self.trt = load_tensorrt(target.backend)
        self.progress = open_progress(self.trt, on_phase)

    def types(self, precision: str) -> NetworkTypes:
        """What the graph's layers compute in, from TensorRT's parser; see :func:`network_types`."""
        return self._apart(lambda: self._run(precision, None, None)[0])

    def build(
        self, precision: str, signature: Signature, timing_cache: Path | None
    ) -> tuple[NetworkTypes, bytes]:
        """The types of the network, and the plan.

        Raises:
            BackendError: TensorRT cannot parse or build the graph; gives its reason.
            ParityError: the network computes in other types than the export says.
        """
        types, data = self._apart(lambda: self._run(precision, signature, timing_cache))
        assert data is not None
        return types, data

    def _apart(self, work: Callable[[], T]) -> T:
        activate = self.target.device.activate if self.target.device else None
        with ThreadPoolExecutor(1, initializer=activate) as pool:
            working = pool.submit(work)
            while True:
                try:
                    return working.result(timeout=0.1)
                except NotYet:
                    if working.done():  # a timeout of TensorRT's own
                        raise
                except KeyboardInterrupt:
                    self.progress.cancelled = True
                    raise  # leaving the pool waits for the build to stop

    def _run(
        self, precision: str, signature: Signature | None, timing_cache: Path | None
    ) -> tuple[NetworkTypes, bytes | None]:
        profiles = self.options.profiles
        static = profiles[0].max if len(profiles) == 1 and profiles[0].static else None
        with polygraphy(self.target.backend) as (loaders, messages):
            model = read_graph(self.path, static)
            parsed = parse(loaders, messages, model, str(self.path))
            types = network_types(parsed[1], model, precision)
            if signature is None:
                return types, None
            require_types(types, self.path, precision)
            given = () if static else profiles
            config = self._config(
                loaders, [profile_of(loaders, p, signature) for p in given], timing_cache
            )
            return types, self._serialize(loaders, messages, parsed, config, timing_cache)

    def _config(self, loaders: Any, profiles: list[Any], timing_cache: Path | None) -> Any:
        """A loader of the builder's configuration: TF32 off, details for the inspector on."""
        trt, options = self.trt, self.options
        values: dict[str, Any] = {
            "profiles": profiles,
            "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
            "builder_optimization_level": options.optimization_level,
            "progress_monitor": self.progress,
            "refittable": options.refittable,
            "version_compatible": options.version_compatible,
        }
        if options.workspace_mib is not None:
            workspace = options.workspace_mib << 20
            values["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: workspace}
        if self.target.backend != RTX:
            if options.hardware_compatible:
                ampere = trt.HardwareCompatibilityLevel.AMPERE_PLUS
                values["hardware_compatibility_level"] = ampere
            return loaders.CreateConfig(tf32=False, **values)
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        capabilities = [tuple(map(int, c.split("."))) for c in self.target.architectures]
        create = CreateConfigRTX(compute_capabilities=capabilities, **values)

        def config(builder: Any, network: Any) -> Any:
            made = create(builder, network)
            made.clear_flag(trt.BuilderFlag.TF32)
            # Whole trajectories are captured in CUDA graphs, in which nothing may be allocated.
            made.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
            return made

        return config

    def _serialize(
        self,
        loaders: Any,
        messages: Messages,
        parsed: Any,
        config: Callable[[Any, Any], Any],
        timing_cache: Path | None,
    ) -> bytes:
        from polygraphy.exception import PolygraphyException

        kept: list[Any] = []  # the configuration and its timing cache, which TensorRT borrows

        def configure(builder: Any, network: Any) -> Any:
            made = config(builder, network)
            kept.append(made)
            if timing_cache is not None and timing_cache.is_file():
                kept.append(self._load_timing_cache(made, timing_cache))
            return made

        try:
            data = bytes(loaders.EngineBytesFromNetwork(parsed, config=configure)())
        except (PolygraphyException, RuntimeError) as error:
            reason = messages.reason() if messages.errors else str(error)
            raise BackendError(
                f"{TITLES[self.target.backend]} built no engine from {self.path}: {reason}"
            ) from error
        cache = None if timing_cache is None else kept[0].get_timing_cache()
        if timing_cache is not None and cache is not None:
            files.write_atomic(timing_cache, bytes(cache.serialize()))
        return data

    def _load_timing_cache(self, config: Any, path: Path) -> Any:
        """Give a build what earlier ones measured; what is foreign is reported and left out."""
        cache = config.create_timing_cache(path.read_bytes())
        if cache is None or not config.set_timing_cache(cache, False):
            self.note(
                f"timing cache {path} was measured by another TensorRT, on another device, or is "
                "damaged: measuring anew"
            )
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        return cache


def build_export(
    run: Run,
    manifest: Manifest,
    options: plan.BuildOptions,
    target: BuildTarget,
    timing_cache: Path | None,
    force: bool,
    on_phase: Callable[[int, str], None],
    note: Note,
) -> list[tuple[plan.PlanRecord, bool]]:
    """The engines of an export, one per graph, each built unless it is there already.

    The caller holds the lock of the run's engines. Each plan is written before its record,
    so that a record speaks of a whole plan whenever this is stopped.

    Args:
        timing_cache: another file than the run's; TensorRT for RTX has none.
        force: build even what is there.
        on_phase: told the graph's number and the builder's phase.

    Returns:
        A record for each graph, and whether it was there already.
    """
    for names in ("*.plan", "*.json", "*.cache"):
        files.clear_leftovers(run.engines, names)
    cache = None if target.backend == RTX else timing_cache or run.timing_cache
    results = []
    with manifest.verified() as folder:
        for k, graph in enumerate(manifest.graphs):
            fields = plan.key_fields(manifest, graph, options, target.machine, target.architectures)
            path = run.plan_record(plan.key_of(fields))
            if not force and path.is_file():
                if record := plan.find_plan(run, fields):
                    results.append((record, True))
                    continue
                note(f"{path.with_suffix('.plan')} or its record is damaged: building it again")
            on_phase(k, "parsing")
            signature = graph_signature(manifest.config, manifest.graph, manifest.schedule, k)
            start = time.perf_counter()
            build = GraphBuild(folder / graph, options, target, partial(on_phase, k), note)
            types, data = build.build(manifest.precision, signature, cache)
            record = plan.PlanRecord(
                path=path,
                fields=fields,
                export=manifest.name,
                graph_file=graph,
                plan_bytes=len(data),
                plan_sha256=hashlib.sha256(data).hexdigest(),
                types=types.counts(),
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
                build_seconds=round(time.perf_counter() - start, 3),
            )
            path.unlink(missing_ok=True)  # an old record must not speak of the new plan
            files.write_atomic(record.plan, data)
            record.write()
            results.append((record, False))
    return results


def export_types(
    manifest: Manifest, options: plan.BuildOptions, target: BuildTarget
) -> Iterator[tuple[str, NetworkTypes]]:
    """Each graph file of an export, and its types by TensorRT's parser; nothing is built."""
    with manifest.verified() as folder:
        for graph in manifest.graphs:
            build = GraphBuild(folder / graph, options, target, lambda _: None, lambda _: None)
            yield graph, build.types(manifest.precision)
