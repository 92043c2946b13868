"""Everything that executes a denoiser, behind one door: :func:`open_engine`.

A backend's module is imported only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import Manifest, read_manifest
from lutdeploy.artefacts.run import MODEL, Located, Run, locate
from lutdeploy.engines.tensorrt import plan
from lutdeploy.errors import ArtefactError, BackendError, LutDeployError, UsageError
from lutdeploy.sampling import Denoiser

BACKENDS = ("auto", "torch", "onnxruntime", "openvino", "tensorrt")
AUTO_BATCH = 64  # what "auto" chooses for, where nobody says how many images a pass has


class Engine(Denoiser, Protocol):
    """A denoiser that knows what it is made of; a context manager."""

    @property
    def identity(self) -> dict[str, Any]:
        """backend, device, export, engine_sha256, model_sha256: plain JSON values."""

    def close(self) -> None:
        """Free what it holds."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, *exception: Any) -> None: ...


def open_engine(
    path: str | Path,
    backend: str = "auto",
    device: str | None = None,
    export: str | None = None,
    threads: int | None = None,
    batch: int | None = None,
    unverified: bool = False,
    precision: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Engine:
    """Open a run folder, an export folder or a model.safetensors with a backend.

    Args:
        path: what to open; of a run folder the newest export, unless ``export`` names one.
        backend: "torch" runs the model file, "onnxruntime" and "openvino" an export,
            "tensorrt" the engines that were built from an export, "auto" the fastest that
            passed parity on this machine (``engines.auto``); where nothing was measured, an
            export in ONNX Runtime if there is one, else the model file.
        device: "cpu", "cuda" or "cuda:N"; for onnxruntime also "tensorrt" or an execution
            provider's name. By default "cuda" for tensorrt, "cpu" for the others.
        export: the name of an export of the run, such as "step-fp16".
        threads: of one operator; with torch, of every operator in the process.
        batch: for tensorrt and auto, the batch size to choose for.
        unverified: for tensorrt, use engines that have not passed their checks.
        precision: for openvino, of the arithmetic: "fp32", the default, or "bf16"; of an int8
            export that of all but its int8 products.
        say: told what "auto" takes and why.

    Raises:
        UsageError: nothing there, or nothing that this backend can run.
        ArtefactError: a damaged file, or an export of another model.
        BackendError: a backend, device or provider that is not there.
        ParityError: TensorRT engines that have not passed their checks.
    """
    if backend not in BACKENDS:
        raise BackendError(
            f"no backend {backend!r} in this version; there are {', '.join(BACKENDS)}"
        )
    if precision is not None and backend != "openvino":
        raise UsageError(f"precision {precision} is for backend openvino; elsewhere the export's")
    located = locate(Path(path))
    if backend == "auto":
        options = {"threads": threads, "batch": batch, "unverified": unverified}
        return _open_fastest(located, path, device, export, say, options)
    if backend == "tensorrt" and export is None and located.export is None and located.run:
        export = newest_built_export(located.run)
    folder = choose_export(located, export)
    if backend in ("onnxruntime", "openvino", "tensorrt"):
        if folder is None:
            raise UsageError(f"{path} has no export; run `lutdeploy export {path}` first")
        manifest = read_manifest(folder)
        require_same_model(manifest, located.model)
        if backend == "tensorrt":
            return _open_tensorrt(located.run, manifest, device or "cuda", batch, unverified)
        if backend == "openvino":
            return _open_openvino(manifest, device or "cpu", precision or "fp32", threads)
        return _open_onnxruntime(located.run, manifest, device or "cpu", threads)
    if export is not None:
        raise UsageError(f"export {export}: backend torch runs the model and no export")
    if located.model is None:
        raise UsageError(f"{path} has no {MODEL} beside it, which backend torch runs")
    if located.export is not None:
        require_same_model(read_manifest(located.export), located.model)
    from lutdeploy.engines.torch import TorchEngine

    return TorchEngine(located.model, device or "cpu", threads)


def _open_fastest(
    located: Located,
    path: str | Path,
    device: str | None,
    export: str | None,
    say: Callable[[str], None],
    options: dict[str, Any],
) -> Engine:
    """The first of the measured choices that opens, else what needs no measurement."""
    from lutdeploy.engines.auto import measured_choices

    run, named = located.run, located.export.name if located.export else export
    batch = options["batch"] or AUTO_BATCH
    for choice in measured_choices(run, batch, device, named) if run else []:
        try:
            engine = open_engine(
                *(run.path if run else path, choice.backend, choice.device, choice.export),
                precision=choice.precision,
                **options,
            )
        except LutDeployError as error:
            say(f"auto: not {choice.name}: {error}")
            continue
        if engine.identity["engine_sha256"] == choice.engine_sha256:
            say(f"auto: {choice.why}")
            return engine
        engine.close()
        say(f"auto: not {choice.name}, which has changed since `lutdeploy bench` measured it")
    folder = choose_export(located, export)
    backend = "onnxruntime" if folder else "torch"
    if run is not None:
        say(f"auto: {backend}; `lutdeploy bench` has measured nothing else here that fits")
    return open_engine(path, backend, device, export, **options)


def _open_onnxruntime(
    run: Run | None, manifest: Manifest, device: str, threads: int | None
) -> Engine:
    from lutdeploy.engines.onnxruntime import PROVIDERS, OnnxRuntimeDenoiser, execution_provider

    provider = execution_provider(device)
    if manifest.precision == "int8" and provider != PROVIDERS["cpu"]:
        raise UsageError(f"{manifest.name} is an int8 export, which is for CPUs, not {provider}")
    if provider not in (PROVIDERS["cuda"], PROVIDERS["tensorrt"]):
        return OnnxRuntimeDenoiser(manifest, device, threads)
    from lutdeploy.engines.cuda.device import CudaDevice
    from lutdeploy.engines.cuda.onnxruntime import OnnxRuntimeDeviceDenoiser

    try:
        cuda = CudaDevice()
    except BackendError as error:
        raise BackendError(
            f"{provider} cannot run here, {PROVIDERS['cpu']} can: it computes on torch's CUDA "
            f"streams, and there is {error}"
        ) from error
    cache = run.provider_cache if run else None
    return OnnxRuntimeDeviceDenoiser(manifest, device, cuda, cache)


def _open_openvino(manifest: Manifest, device: str, precision: str, threads: int | None) -> Engine:
    try:
        from lutdeploy.engines.openvino import OpenVinoDenoiser
    except ImportError as error:
        raise BackendError(
            f"OpenVINO is not installed here ({error}); pip install 'lutdeploy[openvino]'"
        ) from error
    return OpenVinoDenoiser(manifest, device, precision, threads)


def _open_tensorrt(
    run: Run | None,
    manifest: Manifest,
    device: str,
    batch: int | None,
    unverified: bool,
) -> Engine:
    if run is None:
        raise UsageError(
            f"{manifest.folder} lies in no run folder, where `lutdeploy build` keeps its engines"
        )
    require_tensorrt()
    from lutdeploy.engines.cuda.device import CudaDevice
    from lutdeploy.engines.tensorrt.engine import TensorRTDenoiser, this_machine, usable_plans

    gpu = CudaDevice(device)
    records = usable_plans(run, manifest, this_machine(gpu), batch)
    return TensorRTDenoiser(manifest, gpu, records, unverified)


def require_tensorrt() -> None:
    """Import TensorRT.

    Raises:
        BackendError: it is not installed or does not load; says how to get it.
    """
    try:
        import tensorrt  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackendError(
            f"TensorRT does not load here ({reason}); docs/tensorrt.md says how to install it"
        ) from error


def tensorrt_machine(device: str = "cuda") -> plan.Machine | None:
    """What TensorRT engines are tied to here; None where TensorRT or the GPU is missing."""
    try:
        require_tensorrt()
        from lutdeploy.engines.cuda.device import CudaDevice
        from lutdeploy.engines.tensorrt.engine import this_machine

        return this_machine(CudaDevice(device))
    except BackendError:
        return None


def newest_built_export(run: Run) -> str | None:
    """The export that the newest TensorRT engine of a run was built from; None: none is there."""
    records = [state.record for state in plan.survey(run, None) if state.record is not None]
    newest = max(records, key=lambda record: record.created, default=None)
    return newest.export if newest else None


def choose_export(located: Located, name: str | None = None) -> Path | None:
    """The export that a path and an optional name mean; None when there is none.

    Raises:
        UsageError: no export of this name; lists those there are.
    """
    if located.export is not None or located.run is None:
        return located.export
    exports = located.run.exports()
    if name is None:
        return exports[0] if exports else None
    for export in exports:
        if export.name == name:
            return export
    there = ", ".join(export.name for export in exports) or "none"
    raise UsageError(f"{located.run.path} has no export {name!r}; it has {there}")


def require_same_model(manifest: Manifest, model: Path | None) -> None:
    """Refuse an export of another model than ``model``.

    Raises:
        ArtefactError: says what to do.
    """
    if model is not None and files.sha256(model) != manifest.source_sha256:
        raise ArtefactError(
            f"{manifest.folder} was exported from another {MODEL} than the one beside it "
            "(trained on since?); export again, or use --backend torch"
        )
