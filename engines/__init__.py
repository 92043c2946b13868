"""Everything that executes a denoiser, behind one door: :func:`open_engine`.

A backend's module is imported only when it is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from lutdeploy import bundle
from lutdeploy.errors import ArtefactError, BackendError, UsageError
from lutdeploy.sampling import Denoiser

BACKENDS = ("auto", "torch", "onnxruntime")


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
    device: str = "cpu",
    export: str | None = None,
    threads: int | None = None,
) -> Engine:
    """Open a run folder, an export folder or a model.safetensors with a backend.

    Args:
        path: what to open; of a run folder the newest export, unless ``export`` names one.
        backend: "torch" runs the model file, "onnxruntime" an export, "auto" the latter
            where there is an export and the former elsewhere.
        device: "cpu", "cuda", or for onnxruntime an execution provider's name.
        export: the name of an export of the run, such as "step-fp16".
        threads: of one operator; with torch, of every operator in the process.

    Raises:
        UsageError: nothing there, or nothing that this backend can run.
        ArtefactError: a damaged file, or an export of another model.
        BackendError: a backend, device or provider that is not there.
    """
    if backend not in BACKENDS:
        raise BackendError(
            f"no backend {backend!r} in this version; there are {', '.join(BACKENDS)}"
        )
    located = bundle.locate(Path(path))
    folder = choose_export(located, export)
    if backend == "auto":
        backend = "onnxruntime" if folder else "torch"
    if backend == "onnxruntime":
        if folder is None:
            raise UsageError(f"{path} has no export; run `lutdeploy export {path}` first")
        manifest = bundle.read_manifest(folder)
        _require_same_model(manifest, located.model)
        from engines.onnxruntime_engine import OnnxRuntimeDenoiser

        return OnnxRuntimeDenoiser(manifest, device, threads)
    if located.model is None:
        raise UsageError(f"{path} has no {bundle.MODEL} beside it, which backend torch runs")
    if located.export is not None:
        _require_same_model(bundle.read_manifest(located.export), located.model)
    from engines.torch_engine import TorchEngine

    return TorchEngine(located.model, device, threads)


def choose_export(located: bundle.Located, name: str | None = None) -> Path | None:
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


def _require_same_model(manifest: bundle.Manifest, model: Path | None) -> None:
    if model is not None and bundle.sha256(model) != manifest.source_sha256:
        raise ArtefactError(
            f"{manifest.folder} was exported from another {bundle.MODEL} than the one beside it "
            "(trained on since?); export again, or use --backend torch"
        )
