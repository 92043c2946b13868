"""Everything that executes a denoiser, behind one door: :func:`open_engine`.

A backend's module is imported only when it is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import Manifest, read_manifest
from lutdeploy.artefacts.run import MODEL, Located, Run, locate
from lutdeploy.artefacts.target import resolve
from lutdeploy.device import parse_device
from lutdeploy.engines.tensorrt.library import MODULES, RTX, TENSORRT
from lutdeploy.errors import (
    ArtefactError,
    BackendError,
    LutDeployError,
    UsageError,
    needing,
)
from lutdeploy.sampling import Denoiser

if TYPE_CHECKING:
    from lutdeploy.engines.tensorrt.plan import Machine

BACKENDS = ("auto", "torch", "onnxruntime", "openvino", TENSORRT, RTX)


class Engine(Denoiser, Protocol):
    """A denoiser that knows what it is made of; a context manager."""

    @property
    def identity(self) -> dict[str, Any]:
        """backend, device, export, engine_sha256, model_sha256: plain JSON values."""

    def close(self) -> None:
        """Free what it holds."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, *exception: Any) -> None: ...


@dataclass(frozen=True)
class EngineRequest:
    """Which engine somebody asks for; None where nothing was said.

    ``path``: a run folder (its newest export, unless ``export`` names one), an export folder,
    a model.safetensors, or an address on the Hub.
    ``backend``: "torch" runs the model file, "onnxruntime" and "openvino" an export, "tensorrt"
    the engines that were built from an export, "auto" the fastest that passed parity on this
    machine (``engines.auto``); where nothing was measured, an export in ONNX Runtime if there
    is one, else the model file.
    ``device``: "cpu", "cuda" or "cuda:N"; for torch also "mps", for onnxruntime also the name of
    an execution provider. By default "cuda" for tensorrt, "cpu" for the others.
    ``threads``: of one operator; with torch, of every operator in the process.
    ``batch``: images per pass that tensorrt and auto choose for.
    ``unverified``: take TensorRT engines that have not passed the check after their build.
    ``precision``: of openvino's arithmetic: "fp32", the default, or "bf16"; of an int8 export
    that of all but its int8 matrix products. Of torch on a GPU: "fp16", the default, "bf16" or
    "fp32".
    """

    path: Path
    backend: str = "auto"
    device: str | None = None
    export: str | None = None
    threads: int | None = None
    batch: int | None = None
    unverified: bool = False
    precision: str | None = None


def open_engine(request: EngineRequest, note: Callable[[str], None] = lambda text: None) -> Engine:
    """Open the engine that is asked for.

    Args:
        request: which one.
        note: told what was opened, and what "auto" takes and why.

    Raises:
        UsageError: nothing there, or nothing that this backend can run.
        ArtefactError: a damaged file, or an export of another model.
        BackendError: a backend, device or provider that is not there.
        ParityError: TensorRT engines that have not passed their checks.
    """
    if request.backend not in BACKENDS:
        raise BackendError(
            f"no backend {request.backend!r} in this version; there are {', '.join(BACKENDS)}"
        )
    if request.precision is not None and request.backend not in ("openvino", "torch"):
        raise UsageError(
            f"precision {request.precision} is for backends torch and openvino; elsewhere the "
            "export's"
        )
    if request.backend == "auto" and request.device is not None:
        parse_device(request.device)
    request = replace(request, path=resolve(Path(request.path), note))
    located = locate(request.path)
    engine = _open_measured(request, located, note) if request.backend == "auto" else None
    if engine is None:
        why = ""
        if request.backend == "auto":
            folder = choose_export(located, request.export)
            backend = "onnxruntime" if folder else "torch"
            why = "" if folder else f", for {request.path} without an export,"
            if located.run is not None:
                note(f"auto: {backend}; `lutdeploy bench` has measured nothing else here that fits")
            request = replace(request, backend=backend)
        device = f" on {request.device}" if request.device else ""
        with needing(f"backend {request.backend}{device}{why}"):
            engine = _open(request, located, note)
    made = engine.identity
    name = f", export {made['export']}" if made["export"] else ""
    if request.backend == "torch" and request.precision != torch_precision(request) != "fp32":
        name = "; --precision fp32 computes in float32"
    note(f"backend: {made['backend']} on {made['device']}{name}")
    return engine


def _open_measured(
    request: EngineRequest, located: Located, note: Callable[[str], None]
) -> Engine | None:
    """The fastest measured engine that opens and is still what was measured."""
    if located.run is None:
        return None
    from lutdeploy.engines.auto import measured_choices

    named = replace(request, export=located.export.name if located.export else request.export)
    for choice in measured_choices(located.run, named):
        try:
            with needing(f"backend {choice.request.backend}"):
                engine = _open(choice.request, locate(located.run.path), note)
        except LutDeployError as error:
            note(f"auto: not {choice.name}: {error}")
            continue
        if engine.identity["engine_sha256"] == choice.engine_sha256:
            note(f"auto: {choice.why}")
            return engine
        engine.close()
        note(f"auto: not {choice.name}, which has changed since `lutdeploy bench` measured it")
    return None


def _open(request: EngineRequest, located: Located, note: Callable[[str], None]) -> Engine:
    """Open with the backend that the request names."""
    run, backend, device = located.run, request.backend, request.device
    if backend == "torch":
        return _open_torch(request, located)
    export = request.export
    if backend in MODULES and export is None and located.export is None and run:
        export = newest_built_export(run, backend)
    folder = choose_export(located, export)
    if folder is None:
        raise UsageError(
            f"{request.path} has no export; run `lutdeploy export {request.path}` first"
        )
    manifest = read_manifest(folder)
    require_same_model(manifest, located.model)
    if backend in MODULES:
        return _open_tensorrt(run, manifest, request, note)
    if backend == "openvino":
        return _open_openvino(manifest, device or "cpu", request)
    return _open_onnxruntime(manifest, device or "cpu", request)


def torch_precision(request: EngineRequest) -> str:
    """What backend torch computes a request in: float16 on a GPU unless told otherwise.

    Raises:
        UsageError: a narrow precision on another device.
    """
    if parse_device(request.device or "cpu").kind == "cuda":
        return request.precision or "fp16"
    if request.precision not in (None, "fp32"):
        raise UsageError(
            f"precision {request.precision}: backend torch has it on cuda alone, and is the "
            f"float32 reference on {request.device or 'cpu'}; backend openvino computes in bf16"
        )
    return "fp32"


def _open_torch(request: EngineRequest, located: Located) -> Engine:
    if request.export is not None:
        raise UsageError(f"export {request.export}: backend torch runs the model and no export")
    if located.model is None:
        raise UsageError(f"{request.path} has no {MODEL} beside it, which backend torch runs")
    if located.export is not None:
        require_same_model(read_manifest(located.export), located.model)
    precision, device = torch_precision(request), request.device or "cpu"
    if parse_device(device).kind != "cuda":
        from lutdeploy.engines.torch import TorchEngine

        return TorchEngine(located.model, device, request.threads)
    from lutdeploy.artefacts.checkpoint import load_model
    from lutdeploy.engines.cuda.device import CudaDevice
    from lutdeploy.engines.cuda.torch import TorchDeviceDenoiser

    gpu = CudaDevice(device)
    model = load_model(located.model)
    return TorchDeviceDenoiser(model, gpu, precision, files.sha256(located.model))


def _open_onnxruntime(manifest: Manifest, device: str, request: EngineRequest) -> Engine:
    from lutdeploy.engines.onnxruntime import PROVIDERS, OnnxRuntimeDenoiser, execution_provider

    provider = execution_provider(device)
    if manifest.precision == "int8" and provider != PROVIDERS["cpu"]:
        raise UsageError(f"{manifest.name} is an int8 export, which is for CPUs, not {provider}")
    if provider != PROVIDERS["cuda"]:
        return OnnxRuntimeDenoiser(manifest, device, request.threads)
    from lutdeploy.engines.cuda.device import CudaDevice
    from lutdeploy.engines.cuda.onnxruntime import OnnxRuntimeDeviceDenoiser

    try:
        cuda = CudaDevice("cuda" if device == provider else device)
    except BackendError as error:
        raise BackendError(
            f"{provider} cannot run here, {PROVIDERS['cpu']} can: it computes on torch's CUDA "
            f"streams, and there is {error}"
        ) from error
    return OnnxRuntimeDeviceDenoiser(manifest, device, cuda)


def _open_openvino(manifest: Manifest, device: str, request: EngineRequest) -> Engine:
    from lutdeploy.engines.openvino import OpenVinoDenoiser

    return OpenVinoDenoiser(manifest, device, request.precision or "fp32", request.threads)


def _open_tensorrt(
    run: Run | None, manifest: Manifest, request: EngineRequest, note: Callable[[str], None]
) -> Engine:
    from lutdeploy.engines.tensorrt.job import open_plans

    if run is None:
        raise UsageError(
            f"{manifest.folder} lies in no run folder, where `lutdeploy build` keeps its engines"
        )
    return open_plans(run, manifest, request, note)


def tensorrt_machines(device: str = "cuda") -> dict[str, Machine]:
    """The TensorRTs of this machine by backend, each with the GPU.

    Without a GPU, TensorRT for RTX alone: it compiles there, and runs nothing. None without
    PyTorch, in whose memory engines compute.
    """
    if find_spec("torch") is None:
        return {}
    from lutdeploy.engines.cuda.device import CudaDevice
    from lutdeploy.engines.tensorrt.engine import this_machine

    try:
        gpu = CudaDevice(device)
    except BackendError:
        gpu = None
    found = {}
    for backend in MODULES:
        if gpu is not None or backend == RTX:
            with contextlib.suppress(BackendError):
                found[backend] = this_machine(backend, gpu)
    return found


def newest_built_export(run: Run, backend: str) -> str | None:
    """The export that the newest engine of a TensorRT was built from; None: none is there."""
    from lutdeploy.engines.tensorrt.plan import survey

    states = survey(run, {})
    records = [s.record for s in states if s.record is not None and s.record.backend == backend]
    newest = max(records, key=lambda record: record.created, default=None)
    return newest.export if newest else None


def choose_export(located: Located, name: str | None = None) -> Path | None:
    """The export that a path and an optional name mean; None when there is none.

    Raises:
        UsageError: no export of this name; lists those there are.
    """
    exports = located.exports()
    if name is None or located.export is not None:
        return exports[0] if exports else None
    for export in exports:
        if export.name == name:
            return export
    there = ", ".join(export.name for export in exports) or "none"
    place = located.run.path if located.run else located.model
    raise UsageError(f"{place} has no export {name!r}; it has {there}")


def require_same_model(manifest: Manifest, model: Path | None) -> None:
    """Refuse an export of another model than ``model``.

    A model file that is one of the export's own is known by its hash in the manifest, to which
    :meth:`Manifest.verify` holds it.

    Raises:
        ArtefactError: says what to do.
    """
    if model is None:
        return
    own = manifest.files.get(model.name) if model.parent == manifest.folder else None
    if (own.sha256 if own else files.sha256(model)) != manifest.source_sha256:
        raise ArtefactError(
            f"{manifest.folder} was exported from another {MODEL} than the one beside it "
            "(trained on since?); export again, or use --backend torch"
        )
