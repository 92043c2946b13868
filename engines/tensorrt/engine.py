"""Plans of either TensorRT behind the Denoiser protocol: whole trajectories as one CUDA graph.

Everything that TensorRT reports by a boolean, a None or an empty list is checked and raised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import Manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.engines.cuda.denoiser import COEFFICIENTS, DeviceDenoiser
from lutdeploy.engines.cuda.device import CudaDevice
from lutdeploy.engines.tensorrt import plan
from lutdeploy.engines.tensorrt.library import (
    RTX,
    TITLES,
    is_rtx,
    last_error,
    load_tensorrt,
    open_log,
)
from lutdeploy.errors import ArtefactError, BackendError, ParityError
from lutdeploy.signature import Signature, graph_signature

ALIGNED_FLOATS = 64  # 256 bytes, what TensorRT asks of every address
DTYPES = {"FLOAT": "float32", "HALF": "float16"}
HEADER_BYTES = 4096  # of a plan, at least what Runtime.get_engine_validity reads


def this_machine(backend: str, device: CudaDevice | None = None) -> plan.Machine:
    """One TensorRT and the GPU here, which plans that run here are tied to."""
    version = str(load_tensorrt(backend).__version__)
    if device is None:
        return plan.Machine(backend, version)
    return plan.Machine(
        backend, version, device.cuda_version, device.gpu, device.compute_capability
    )


def open_runtime(trt: Any, log: Any, record: plan.PlanRecord) -> Any:
    """A runtime for a recorded plan; the caller keeps it longer than the engine."""
    runtime = trt.Runtime(log)
    if record.fields["version_compatible"]:  # such a plan carries its own runtime
        runtime.engine_host_code_allowed = True
    return runtime


def load_engine(trt: Any, runtime: Any, log: Any, record: plan.PlanRecord) -> Any:
    """Deserialise a recorded plan; TensorRT for RTX is asked first whether it fits here."""
    data = record.read_plan()
    if is_rtx(trt):
        size = max(HEADER_BYTES, int(runtime.engine_header_size))
        validity, diagnostics = runtime.get_engine_validity(data[:size])
        if validity == trt.EngineValidity.INVALID:
            reasons = trt.EngineInvalidityDiagnostics.__members__.items()
            said = [name for name, bit in reasons if int(diagnostics) & int(bit)]
            raise ArtefactError(
                f"TensorRT for RTX refuses {record.plan}: {', '.join(said) or 'no reason'}; "
                "build again, for this GPU and version"
            )
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise ArtefactError(
            f"{TITLES[record.backend]} refuses {record.plan}: {last_error(log.errors)}; build again"
        )
    return engine


def check_engine(trt: Any, engine: Any, signature: Signature, record: plan.PlanRecord) -> None:
    """Hold an engine's tensors and optimization profiles against the signature."""
    what, profiles = str(record.plan), record.profiles
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    # The parser's order is not a promise.
    order = [spec.name for spec in (*signature.inputs, *signature.outputs)]
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    found: dict[Any, list[tuple[str, str, tuple[str | int | None, ...]]]] = {
        trt.TensorIOMode.INPUT: [],
        trt.TensorIOMode.OUTPUT: [],
    }
    for name in names:
        shape = tuple(engine.get_tensor_shape(name))
        expected = profiles[0].min if record.static else -1
        batch = "batch" if shape and shape[0] == expected else (shape[0] if shape else 0)
        dtype = engine.get_tensor_dtype(name).name
        entry = (name, DTYPES.get(dtype, dtype), (batch, *shape[1:]))
        found[engine.get_tensor_mode(name)].append(entry)
    signature.check_graph(found[trt.TensorIOMode.INPUT], found[trt.TensorIOMode.OUTPUT], what)
    if record.static:
        return
    for index, profile in enumerate(profiles):
        for spec in signature.inputs:
            shapes = [tuple(s) for s in engine.get_tensor_profile_shape(spec.name, index)]
            batches = (profile.min, profile.opt, profile.max)
            if shapes != [(batch, *spec.row) for batch in batches]:
                raise ArtefactError(
                    f"{what}: optimization profile {index} of {spec.name} is {shapes}, expected "
                    f"batches {profile}"
                )


class RuntimeCache:
    """Kernels that TensorRT for RTX compiled on this GPU, kept beside the plan.

    It checks by itself that a cache is of this GPU, version and CUDA; one that is not is left
    out and replaced.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self.path = path
        self._cache = config.create_runtime_cache()
        try:
            self._known = path.read_bytes()
        except OSError:  # none yet, or one that cannot be read
            self._known = b""
        if self._known and not self._cache.deserialize(self._known):
            self._known = b""
        if not config.set_runtime_cache(self._cache):
            raise BackendError("TensorRT for RTX takes no runtime cache; see its log")

    def save(self) -> None:
        """Write what was compiled since, atomically; a folder that cannot be written is let be."""
        data = bytes(self._cache.serialize())
        if data == self._known:
            return
        try:
            files.write_atomic(self.path, data)
        except OSError:  # pictures were made; the next process compiles once more
            return
        self._known = data


class TensorRTProgram:
    """An export's engines at one batch size, ready to be enqueued.

    The coefficients of all steps live in one schedule on the device; each row starts at an
    aligned address. The contexts share their activation memory, sized for this batch: they run
    one after another on one stream.

    Args:
        engines: the engines, in the order of the export's graphs.
        batch: B.
        steps: rows of the coefficient schedule of a "step" export.
    """

    def __init__(self, engines: TensorRTDenoiser, batch: int, steps: int) -> None:
        self.device, self.graph, self.batch = engines.device, engines.graph, batch
        self.signatures = engines.signatures
        self.evaluations = {"step": steps, "per-step": len(self.signatures), "loop": 1}[self.graph]
        padded = -(-batch // ALIGNED_FLOATS) * ALIGNED_FLOATS
        rows = steps if self.graph == "step" else 0
        self._table = self.device.empty((rows, len(COEFFICIENTS), padded))
        profiles = engines.records[0].profiles
        profile = next(k for k, p in enumerate(profiles) if batch <= p.max)
        self.contexts = [
            self._open_context(engine, signature, engines, profile)
            for engine, signature in zip(engines.engines, self.signatures, strict=True)
        ]
        sizes = [int(context.update_device_memory_size_for_shapes()) for context in self.contexts]
        self._memory = self.device.empty((max([1, *sizes]),), torch.uint8)
        for context, size in zip(self.contexts, sizes, strict=True):
            context.set_device_memory(self._memory.data_ptr(), size)
        self.capturable = all(
            not engines.rtx or context.is_stream_capturable(self.device.stream_handle)
            for context in self.contexts
        )

    def _open_context(
        self, engine: Any, signature: Signature, engines: TensorRTDenoiser, profile: int
    ) -> Any:
        context = engines.create_context(engine)
        if context is None:
            raise BackendError("TensorRT made no execution context; is the GPU's memory full?")
        stream = self.device.stream_handle
        if profile and not context.set_optimization_profile_async(profile, stream):
            raise BackendError(f"TensorRT refuses optimization profile {profile}; see its log")
        for spec in signature.inputs:
            shape = (self.batch, *spec.row)
            if not context.set_input_shape(spec.name, shape):
                raise BackendError(f"TensorRT refuses shape {shape} of input {spec.name}")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise BackendError(
                f"TensorRT cannot infer shapes at batch {self.batch}: {error}"
            ) from error
        if missing:
            raise BackendError(f"TensorRT lacks the shapes of {', '.join(missing)}")
        for spec in signature.outputs:
            found, wanted = tuple(context.get_tensor_shape(spec.name)), (self.batch, *spec.row)
            if found != wanted:
                raise BackendError(f"TensorRT makes {spec.name} {found}, expected {wanted}")
        return context

    def set_coefficients(self, values: NDArray[np.float32]) -> None:
        """Fill the schedule of a "step" export: t, a, b, c as float32 [steps, 4, B]."""
        with self.device.on(self.device.compute):
            self._table[:, :, : self.batch].copy_(torch.from_numpy(values))

    def enqueue(self, k: int, x: Tensor, x0_prev: Tensor, x_next: Tensor, x0: Tensor) -> None:
        """See :class:`lutdeploy.engines.cuda.loop.Program`."""
        tensors = {"x": x, "x0_prev": x0_prev, "x_next": x_next, "x0": x0}
        index = 0
        if self.graph == "loop":
            tensors = {"noise": x, "image": x_next}
        elif self.graph == "per-step":
            index = k
        else:
            tensors |= {name: self._table[k, row] for row, name in enumerate(COEFFICIENTS)}
        context, signature = self.contexts[index], self.signatures[index]
        for spec in (*signature.inputs, *signature.outputs):
            if not context.set_tensor_address(spec.name, tensors[spec.name].data_ptr()):
                raise BackendError(f"TensorRT refuses the address of {spec.name}")
        if not context.execute_async_v3(self.device.stream_handle):
            raise BackendError(f"TensorRT did not start evaluation {k}; see its log")


def choose_plans(
    run: Run, manifest: Manifest, machine: plan.Machine, batch: int | None
) -> list[plan.PlanState]:
    """The engines to use for an export here: one per graph, in order.

    Of several builds, those that passed come first, those that failed last; then the one that
    takes ``batch`` in the fewest parts and with the least padding, a static one before a dynamic
    one, the newest.

    Args:
        machine: this one, with the TensorRT that is asked for.
        batch: images per pass; None takes what an engine was tuned for.

    Raises:
        BackendError: there is none; says what each one that there is differs in.
    """
    builds: dict[str, dict[str, plan.PlanState]] = {}
    reasons: list[str] = []
    for state in plan.survey(run, {machine.backend: machine}):
        if state.record is None:
            reasons += state.reasons
        elif (state.record.export, state.record.backend) != (manifest.name, machine.backend):
            continue
        elif state.reasons:
            reasons.append(f"{state.record.plan.name}: {'; '.join(state.reasons)}")
        else:
            fields = {k: v for k, v in state.record.fields.items() if k != "graph_sha256"}
            builds.setdefault(plan.key_of(fields), {})[state.record.graph_file] = state
    whole = [
        [states[name] for name in manifest.graphs]
        for states in builds.values()
        if set(states) == set(manifest.graphs)
    ]
    if not whole:
        lead = f"export {manifest.name} has no engine of {TITLES[machine.backend]} that fits here"
        said = "; ".join(dict.fromkeys(reasons)) or "nothing was built"
        raise BackendError(
            f"{lead} ({said[:600]}); run `lutdeploy build --backend {machine.backend}`"
        )

    def rank(states: list[plan.PlanState]) -> tuple[Any, ...]:
        first = records_of(states)[0]
        profiles = first.profiles
        tuned = [profile.opt for profile in profiles]
        wanted = max(tuned) if batch is None else batch
        fitting = next((p for p in profiles if wanted <= p.max), profiles[-1])
        parts = -(-wanted // fitting.max)
        padded = max(wanted, parts * fitting.max if first.static else profiles[0].min) - wanted
        outcomes = ("FAILED", "compiled, not run", "passed")
        outcome = min(outcomes.index(state.outcome) for state in states)
        near = -abs(fitting.opt - wanted)
        return (outcome, -parts, -padded, first.static, near, first.created)

    return max(whole, key=rank)


def records_of(states: Sequence[plan.PlanState]) -> list[plan.PlanRecord]:
    """The records of engines that are whole."""
    return [state.record for state in states if state.record is not None]


def require_passed(states: Sequence[plan.PlanState]) -> None:
    """Refuse engines whose checks failed."""
    for state in states:
        if state.verdict is not None and not state.verdict.passed:
            raise ParityError(
                f"engine {state.path.with_suffix('.plan').name} FAILED its checks "
                f"({state.verdict.failures[0]}); --unverified uses it all the same"
            )


class TensorRTDenoiser(DeviceDenoiser):
    """An export's engines in one of the TensorRTs: a record for each graph, in order."""

    def __init__(
        self, manifest: Manifest, device: CudaDevice, records: Sequence[plan.PlanRecord]
    ) -> None:
        self.records = records
        profiles = records[0].profiles
        sizes = (profiles[0].min, profiles[-1].max)
        super().__init__(manifest.config, manifest.graph, manifest.schedule, device, sizes)
        self.manifest, self.backend = manifest, records[0].backend
        self._trt = load_tensorrt(self.backend)
        self.rtx = self.backend == RTX
        self._log = open_log(self._trt)
        # In this order they must live, and in the reverse order go.
        self._runtime = open_runtime(self._trt, self._log, records[0])
        self.engines: list[Any] = []
        self.signatures: list[Signature] = []
        self._runtime_configs: dict[int, Any] = {}
        self._caches: list[RuntimeCache] = []
        for k, record in enumerate(records):
            engine = load_engine(self._trt, self._runtime, self._log, record)
            signature = graph_signature(self.config, manifest.graph, self.schedule, k)
            check_engine(self._trt, engine, signature, record)
            self.engines.append(engine)
            self.signatures.append(signature)
            if self.rtx:
                self._configure(engine, record)

    def _configure(self, engine: Any, record: plan.PlanRecord) -> None:
        """How TensorRT for RTX runs an engine.

        Kernels for the batch are compiled before the first run and not beside it: a captured
        graph replays the kernels that were there. The library's own CUDA graph stays off, because
        the whole trajectory is captured in one.
        """
        trt, config = self._trt, engine.create_runtime_config()
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        path = record.runtime_cache(self.device.compute_capability)
        self._caches.append(RuntimeCache(config, path))
        self._runtime_configs[id(engine)] = config

    def create_context(self, engine: Any) -> Any:
        """A context without activation memory; None when TensorRT makes none."""
        if self.rtx:
            return engine.create_execution_context(self._runtime_configs[id(engine)])
        return engine.create_execution_context(
            self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )

    def make_program(self, batch: int, steps: int, alone: bool) -> TensorRTProgram:
        """See :class:`DeviceDenoiser`. A context of its own, since a captured one is tied up."""
        return TensorRTProgram(self, batch, steps)

    def layers(self) -> list[str]:
        """What the engine inspector says of each engine, in JSON."""
        form = self._trt.LayerInformationFormat.JSON
        inspectors = [engine.create_engine_inspector() for engine in self.engines]
        return [inspector.get_engine_information(form) for inspector in inspectors]

    def close(self) -> None:
        """Free contexts, engines and runtime, in this order, when the GPU has finished."""
        super().close()
        for cache in self._caches:
            cache.save()
        self._caches.clear()
        self._runtime_configs.clear()
        self.engines.clear()
        self._runtime = None

    @property
    def identity(self) -> dict[str, Any]:
        """What made a picture: backend, GPU, export and hashes."""
        plans = "".join(record.plan_sha256 for record in self.records)
        return {
            "backend": self.backend,
            "device": self.device.gpu,
            "export": self.manifest.name,
            "engine_sha256": hashlib.sha256(plans.encode()).hexdigest(),
            "model_sha256": self.manifest.source_sha256,
        }
