"""Who takes part in `lutdeploy bench`, and what opens each."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lutdeploy.artefacts.manifest import Manifest, read_manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.engines import Engine, EngineRequest, newest_built_export, open_engine
from lutdeploy.errors import BackendError, UsageError

ORIGINAL = "original"
# What runs an export of a precision, as (backend, precision of the arithmetic).
CPU_RUNTIMES = {
    "fp32": (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")),
    "fp16": (("onnxruntime", "fp16"),),
    "int8": (("onnxruntime", "int8"), ("openvino", "int8"), ("openvino", "int8-bf16")),
}
GPU_PROVIDERS = ("cuda", "tensorrt")


@dataclass(frozen=True)
class Contender:
    """One way to compute the model's step; plain values, for it travels to its process."""

    name: str  # such as "openvino-bf16"
    backend: str
    precision: str
    path: Path  # of the model file or of the export folder
    kind: str = "engine"  # or "original", "compiled", "cuda", "cuda-compiled"
    device: str = "cpu"
    export: str | None = None

    @property
    def place(self) -> str:
        """Whose limits are its own: "cpu" or "cuda"."""
        return "cpu" if self.device == "cpu" else "cuda"

    @property
    def arithmetic(self) -> str | None:
        """What :func:`engines.open_engine` takes as precision.

        OpenVINO alone chooses: float32 unless told otherwise. Elsewhere the export decides.
        """
        chosen = self.backend == "openvino" and self.precision.endswith("bf16")
        return "bf16" if chosen else None

    @property
    def sample_options(self) -> list[str] | None:
        """What makes `lutdeploy sample` run it; None: that has no such way."""
        if self.kind != "engine":
            return None
        options = ["--backend", self.backend, "--device", self.device]
        if self.arithmetic is not None:
            options += ["--precision", self.arithmetic]
        return options


def list_contenders(
    model: Path, exports: Sequence[Path], run: Run | None, gpu: bool
) -> list[Contender]:
    """Everything that could run the model here; a runtime that is missing says so when opened.

    Args:
        model: a model.safetensors.
        exports: export folders; of the ``step`` exports the first of each precision counts,
            since graphs of other kinds compute the same step. Where no ``step`` export is
            among them, all count.
        run: where TensorRT's engines are.
        gpu: whether torch sees one.
    """
    found = [
        Contender(ORIGINAL, "torch", "fp32", model, "original"),
        Contender("torch-eager", "torch", "fp32", model),
        Contender("torch-compiled", "torch", "fp32", model, "compiled"),
    ]
    if gpu:
        found += [
            Contender("torch-cuda-fp16", "torch", "fp16", model, "cuda", "cuda"),
            Contender("torch-cuda-compiled-fp16", "torch", "fp16", model, "cuda-compiled", "cuda"),
        ]
    for folder, manifest in _chosen(exports):
        for backend, precision in CPU_RUNTIMES.get(manifest.precision, ()):
            name = f"{backend}-{precision}"
            found.append(Contender(name, backend, precision, folder, export=manifest.name))
        for provider in GPU_PROVIDERS if gpu and manifest.precision != "int8" else ():
            name = f"onnxruntime-{provider}-{manifest.precision}"
            place = {"device": provider, "export": manifest.name}
            found.append(Contender(name, "onnxruntime", manifest.precision, folder, **place))
    if gpu and run is not None and run.plan_records():
        found += list(_tensorrt(run, exports))
    return found


def _chosen(exports: Sequence[Path]) -> Iterator[tuple[Path, Manifest]]:
    read = [(folder, read_manifest(folder)) for folder in exports]
    read = [pair for pair in read if pair[1].graph == "step"] or read
    seen = set()
    for folder, manifest in read:
        if manifest.precision not in seen:
            seen.add(manifest.precision)
            yield folder, manifest


def _tensorrt(run: Run, exports: Sequence[Path]) -> Iterator[Contender]:
    built = newest_built_export(run)
    for folder in exports:
        if folder.name == built:
            precision = read_manifest(folder).precision
            name = f"tensorrt-{precision}"
            yield Contender(name, "tensorrt", precision, folder, device="cuda", export=built)


def choose(contenders: Sequence[Contender], names: Sequence[str]) -> list[Contender]:
    """Those of the given names, and the original.

    Raises:
        UsageError: no contender of this name; lists those there are.
    """
    known = [contender.name for contender in contenders]
    for name in names:
        if name not in known:
            raise UsageError(f"no contender {name!r} here; there are {', '.join(known)}")
    return [c for c in contenders if not names or c.name in names or c.name == ORIGINAL]


def open_contender(contender: Contender, threads: int | None) -> Any:
    """Open it in this process: a denoiser, which may be a context manager.

    Raises:
        LutDeployError: it cannot run here, with the reason.
    """
    if contender.kind == "engine":
        return _open_engine(contender, threads)
    import torch

    from lutdeploy.artefacts.checkpoint import load_model
    from lutdeploy.engines.benchmark.original import OriginalDenoiser

    if threads is not None:
        torch.set_num_threads(threads)
    model = load_model(contender.path)
    if contender.kind == "original":
        return OriginalDenoiser(model)
    if contender.kind == "compiled":
        return _compiled(model)
    from lutdeploy.engines.cuda.device import CudaDevice
    from lutdeploy.engines.cuda.torch import TorchDeviceDenoiser

    compiles = contender.kind == "cuda-compiled"
    return TorchDeviceDenoiser(model, CudaDevice(), contender.precision, compile=compiles)


def _open_engine(contender: Contender, threads: int | None) -> Engine:
    return open_engine(
        EngineRequest(
            contender.path,
            contender.backend,
            contender.device,
            threads=threads,
            precision=contender.arithmetic,
        )
    )


def _compiled(model: Any) -> Any:
    """The PyTorch model with its blocks compiled, where nearly all of the work is.

    All blocks run the same code, so it is compiled once: 16 times less than the whole network,
    for every batch size but 1, which torch always compiles apart.
    """
    from lutdeploy.reference import TorchDenoiser

    if not any(shutil.which(compiler) for compiler in ("g++", "c++", "clang++", "cl")):
        raise BackendError("torch.compile finds no C++ compiler here; install g++")
    for block in model.blocks:
        block.compile(dynamic=True)
    return TorchDenoiser(model)
