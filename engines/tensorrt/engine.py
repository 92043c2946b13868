"""TensorRT engines behind the Denoiser protocol: whole trajectories as one CUDA graph.

Only names that TensorRT 10.13 and 11.1 both have are used. Everything that TensorRT reports
by a boolean, a None or an empty list is checked and raised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorrt as trt
import torch
from numpy.typing import NDArray
from torch import Tensor

from lutdeploy.artefacts.manifest import Manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.engines.cuda.denoiser import COEFFICIENTS, DeviceDenoiser
from lutdeploy.engines.cuda.device import CudaDevice
from lutdeploy.engines.tensorrt import plan
from lutdeploy.errors import ArtefactError, BackendError, ParityError
from lutdeploy.signature import Signature, graph_signature

ALIGNED_FLOATS = 64  # 256 bytes, what TensorRT asks of every address
DTYPES = {trt.float32: "float32", trt.float16: "float16"}


class EngineLog(trt.ILogger):  # type: ignore[misc]  # tensorrt has no types
    """Keeps the errors that TensorRT reports; exceptions quote them."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        """Called by TensorRT, from any of its threads."""
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(msg)

    def last_error(self) -> str:
        """The last error in one line; that there was none, if so."""
        return " ".join(self.errors[-1].split()) if self.errors else "TensorRT gave no reason"


def this_machine(device: CudaDevice) -> plan.Machine:
    """What plans that run here are tied to."""
    return plan.Machine(
        tensorrt=str(trt.__version__),
        cuda=device.cuda_version,
        gpu=device.gpu,
        compute_capability=device.compute_capability,
    )


def open_runtime(log: EngineLog, record: plan.PlanRecord) -> Any:
    """A runtime for a recorded plan; the caller keeps it longer than the engine."""
    runtime = trt.Runtime(log)
    if record.fields["version_compatible"]:  # such a plan carries its own runtime
        runtime.engine_host_code_allowed = True
    return runtime


def load_engine(runtime: Any, log: EngineLog, record: plan.PlanRecord) -> Any:
    """Deserialise a recorded plan."""
    engine = runtime.deserialize_cuda_engine(record.read_plan())
    if engine is None:
        raise ArtefactError(f"TensorRT refuses {record.plan}: {log.last_error()}; build again")
    return engine


def check_engine(engine: Any, signature: Signature, profile: plan.BatchProfile, what: str) -> None:
    """Hold an engine's tensors and optimization profile against the signature."""
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
        expected = profile.min if profile.static else -1
        batch = "batch" if shape and shape[0] == expected else (shape[0] if shape else 0)
        dtype = engine.get_tensor_dtype(name)
        entry = (name, DTYPES.get(dtype, str(dtype)), (batch, *shape[1:]))
        found[engine.get_tensor_mode(name)].append(entry)
    signature.check_graph(found[trt.TensorIOMode.INPUT], found[trt.TensorIOMode.OUTPUT], what)
    if profile.static:
        return
    for spec in signature.inputs:
        shapes = [tuple(shape) for shape in engine.get_tensor_profile_shape(spec.name, 0)]
        batches = (profile.min, profile.opt, profile.max)
        if shapes != [(batch, *spec.row) for batch in batches]:
            raise ArtefactError(
                f"{what}: the optimization profile of {spec.name} is {shapes}, expected batches "
                f"{profile}"
            )


class TensorRTProgram:
    """An export's engines at one batch size, ready to be enqueued.

    The coefficients of all steps live in one schedule on the device; each row starts at an
    aligned address. The contexts of a per-step export share their activation memory: they run
    one after another on one stream.

    Args:
        engines, signatures: in the order of the export's graphs.
        graph: the export's kind.
        batch: B.
        steps: rows of the coefficient schedule of a "step" export.
    """

    def __init__(
        self,
        device: CudaDevice,
        engines: Sequence[Any],
        signatures: Sequence[Signature],
        graph: str,
        batch: int,
        steps: int,
    ) -> None:
        self.device, self.graph, self.batch = device, graph, batch
        self.capturable = True
        self.signatures = signatures
        self.evaluations = {"step": steps, "per-step": len(engines), "loop": 1}[graph]
        padded = -(-batch // ALIGNED_FLOATS) * ALIGNED_FLOATS
        self._table = device.empty((steps if graph == "step" else 0, len(COEFFICIENTS), padded))
        shared = graph == "per-step"
        strategies = trt.ExecutionContextAllocationStrategy
        strategy = strategies.USER_MANAGED if shared else strategies.STATIC
        self.contexts = []
        sizes = []
        for engine, signature in zip(engines, signatures, strict=True):
            context = engine.create_execution_context(strategy)
            if context is None:
                raise BackendError("TensorRT made no execution context; is the GPU's memory full?")
            self._set_shapes(context, signature)
            if shared:
                sizes.append(int(context.update_device_memory_size_for_shapes()))
            self.contexts.append(context)
        self._memory = device.empty((max([1, *sizes]),), torch.uint8)
        for context, size in zip(self.contexts, sizes, strict=False):
            context.set_device_memory(self._memory.data_ptr(), size)

    def _set_shapes(self, context: Any, signature: Signature) -> None:
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


def usable_plans(
    run: Run, manifest: Manifest, machine: plan.Machine, batch: int | None, unverified: bool
) -> list[plan.PlanRecord]:
    """The engines to use for an export here: one per graph, in order.

    Of several builds, those that passed come first, then the one that takes ``batch`` in the
    fewest parts and with the least padding, a static one before a dynamic one, the newest.

    Args:
        batch: images per pass; None takes what an engine was tuned for.
        unverified: take engines that have not passed the check after their build.

    Raises:
        BackendError: there is none; says what each one that there is differs in.
        ParityError: the best that there are have not passed.
    """
    builds: dict[str, dict[str, plan.PlanState]] = {}
    reasons: list[str] = []
    for state in plan.survey(run, machine):
        if state.record is None:
            reasons += state.reasons
        elif state.record.export == manifest.name and state.reasons:
            reasons.append(f"{state.record.plan.name}: {'; '.join(state.reasons)}")
        elif state.record.export == manifest.name:
            fields = {k: v for k, v in state.record.fields.items() if k != "graph_sha256"}
            builds.setdefault(plan.key_of(fields), {})[state.record.graph_file] = state
    whole = [
        [states[name] for name in manifest.graphs]
        for states in builds.values()
        if set(states) == set(manifest.graphs)
    ]
    if not whole:
        lead = f"export {manifest.name} has no TensorRT engine that fits here"
        said = "; ".join(dict.fromkeys(reasons)) or "nothing was built"
        raise BackendError(f"{lead} ({said[:600]}); run `lutdeploy build`")

    def records(states: list[plan.PlanState]) -> list[plan.PlanRecord]:
        return [state.record for state in states if state.record is not None]

    def rank(states: list[plan.PlanState]) -> tuple[Any, ...]:
        first = records(states)[0]
        profile = first.profile
        wanted = profile.opt if batch is None else batch
        parts = -(-wanted // profile.max)
        padded = max(wanted, parts * profile.max if profile.static else profile.min) - wanted
        passed = all(state.outcome == "passed" for state in states)
        near = -abs(profile.opt - wanted)
        return (passed, -parts, -padded, profile.static, near, first.created)

    chosen = max(whole, key=rank)
    if not unverified:
        require_passed(chosen)
    return records(chosen)


def require_passed(states: Sequence[plan.PlanState]) -> None:
    """Refuse engines that have not passed their checks."""
    for state in states:
        name = f"engine {state.path.with_suffix('.plan').name}"
        if state.verdict is None:
            raise ParityError(
                f"{name} was not checked; `lutdeploy build` does it, --unverified does without"
            )
        if not state.verdict.passed:
            raise ParityError(
                f"{name} FAILED its checks ({state.verdict.failures[0]}); --unverified uses it all "
                "the same"
            )


class TensorRTDenoiser(DeviceDenoiser):
    """An export's TensorRT engines: one record for each graph, as from :func:`usable_plans`."""

    def __init__(
        self, manifest: Manifest, device: CudaDevice, records: Sequence[plan.PlanRecord]
    ) -> None:
        self.records = records
        self.profile = records[0].profile
        sizes = (self.profile.min, self.profile.max)
        super().__init__(manifest.config, manifest.graph, manifest.schedule, device, sizes)
        self.manifest = manifest
        self._log = EngineLog()
        # In this order they must live, and in the reverse order go.
        self._runtime = open_runtime(self._log, records[0])
        self._engines: list[Any] = []
        self._signatures: list[Signature] = []
        for k, record in enumerate(records):
            engine = load_engine(self._runtime, self._log, record)
            signature = graph_signature(self.config, manifest.graph, self.schedule, k)
            check_engine(engine, signature, self.profile, str(record.plan))
            self._engines.append(engine)
            self._signatures.append(signature)

    def make_program(self, batch: int, steps: int, alone: bool) -> TensorRTProgram:
        """See :class:`DeviceDenoiser`. A context of its own, since a captured one is tied up."""
        return TensorRTProgram(
            self.device, self._engines, self._signatures, self.manifest.graph, batch, steps
        )

    def close(self) -> None:
        """Free contexts, engines and runtime, in this order, when the GPU has finished."""
        super().close()
        self._engines.clear()
        self._runtime = None

    @property
    def identity(self) -> dict[str, Any]:
        """What made a picture: backend, GPU, export and hashes."""
        plans = "".join(record.plan_sha256 for record in self.records)
        return {
            "backend": "tensorrt",
            "device": self.device.gpu,
            "export": self.manifest.name,
            "engine_sha256": hashlib.sha256(plans.encode()).hexdigest(),
            "model_sha256": self.manifest.source_sha256,
        }
