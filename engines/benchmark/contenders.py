"""What `lutdeploy bench` measures: one model, and every way to compute its step here."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.manifest import Manifest, read_manifest
from lutdeploy.artefacts.run import MODEL, Run, locate
from lutdeploy.config import ModelConfig, model_config
from lutdeploy.engines import EngineRequest, newest_built_export, open_engine, require_same_model
from lutdeploy.engines.tensorrt.library import MODULES
from lutdeploy.errors import UsageError

ORIGINAL = "original"
SLOW_TO_START = "torch-compiled"  # compiling takes longer than all that --quick measures
# What runs an export of a precision, as (backend, precision of the arithmetic).
CPU_RUNTIMES = {
    "fp32": (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")),
    "fp16": (("onnxruntime", "fp16"),),
    "int8": (("onnxruntime", "int8"), ("openvino", "int8"), ("openvino", "int8-bf16")),
}


@dataclass(frozen=True)
class RandomModel:
    """A preset at a size with random weights: speed asks for no others."""

    preset: str
    size: str


@dataclass(frozen=True)
class Subject:
    """The model that is measured, by all its files."""

    name: str  # for people
    model: Path
    config: ModelConfig
    exports: tuple[Path, ...]  # newest first
    run: Run | None  # the user's own
    scratch: Path  # a folder that goes when the benchmark has ended


@contextlib.contextmanager
def open_subject(target: Path | RandomModel, note: Callable[[str], None]) -> Iterator[Subject]:
    """A run, a model.safetensors, one export with its run around it, or random weights.

    What is missing for a comparison is exported into the scratch folder.
    """
    with tempfile.TemporaryDirectory(prefix="lutdeploy-bench-") as folder:
        if isinstance(target, RandomModel):
            yield _random(target, Path(folder), note)
        else:
            yield _trained(target, Path(folder), note)


def _random(target: RandomModel, scratch: Path, note: Callable[[str], None]) -> Subject:
    import torch

    from lutdeploy.artefacts.checkpoint import save_model
    from lutdeploy.model import LutTransformer

    name = f"{target.preset} {target.size}, random weights"
    note(f"model: {name}")
    config, model = model_config(target.preset, target.size), Run(scratch / "run").model
    torch.manual_seed(0)
    save_model(LutTransformer(config), model)
    exports = (_export(model, scratch, "fp32"), _export(model, scratch, "int8"))
    return Subject(name, model, config, exports, None, scratch)


def _trained(path: Path, scratch: Path, note: Callable[[str], None]) -> Subject:
    from lutdeploy.artefacts.metadata import read_metadata

    located = locate(path)
    if located.model is None:
        raise UsageError(f"{path} has no {MODEL} beside it to compare with")
    config, _ = read_metadata(located.model)
    if located.export is not None:
        exports = [located.export]
    else:
        exports = located.exports()
        if ("step", "fp32") not in [(m.graph, m.precision) for m in map(read_manifest, exports)]:
            note("export: step-fp32, for this benchmark alone")
            exports.append(_export(located.model, scratch, "fp32"))
    for export in exports:
        require_same_model(read_manifest(export), located.model)
    name = path.stem if shipped.is_shipped(path) else str(path)
    return Subject(name, located.model, config, tuple(exports), located.run, scratch)


def _export(model: Path, scratch: Path, precision: str) -> Path:
    """A ``step`` export, all of whose products are in the precision."""
    from lutdeploy.artefacts.checkpoint import load_model
    from lutdeploy.engines.export.graphs import ExportPlan, export_model
    from lutdeploy.engines.export.int8 import quantize_graph

    weights, run = load_model(model), Run(scratch / "run")
    quantize = partial(quantize_graph, model=weights) if precision == "int8" else None
    plan = ExportPlan(precision=precision)
    return export_model(weights, plan, run, files.sha256(model), quantize=quantize)


@dataclass(frozen=True)
class Contender:
    """One way to compute the model's step; plain values, for it travels to its process."""

    name: str  # such as "openvino-bf16"
    backend: str
    precision: str
    path: Path  # of the model file or of the export folder
    kind: str = "engine"  # or "original", "compiled", "cuda-compiled"
    device: str = "cpu"
    export: str | None = None

    @property
    def arithmetic(self) -> str | None:
        """What :func:`engines.open_engine` takes as precision.

        OpenVINO alone chooses, float32 unless told otherwise, and PyTorch on a GPU. Elsewhere the
        export decides.
        """
        if self.backend == "torch" and self.device != "cpu":
            return self.precision
        chosen = self.backend == "openvino" and self.precision.endswith("bf16")
        return "bf16" if chosen else None

    @property
    def by_batch(self) -> bool:
        """Whether what is opened of it depends on the batch: TensorRT has engines for several."""
        return self.backend.startswith("tensorrt")

    def request(self, threads: int | None, batch: int) -> EngineRequest:
        """What :func:`engines.open_engine` opens of it, as `lutdeploy sample --batch` does."""
        return EngineRequest(
            *(self.path, self.backend, self.device),
            threads=threads,
            batch=batch,
            precision=self.arithmetic,
        )

    @property
    def sample_options(self) -> list[str] | None:
        """What makes `lutdeploy sample` run it; None: that has no such way."""
        if self.kind != "engine":
            return None
        options = ["--backend", self.backend, "--device", self.device]
        return options + (["--precision", self.arithmetic] if self.arithmetic else [])


def list_contenders(
    model: Path, exports: Sequence[Path], run: Run | None, gpu: bool
) -> list[Contender]:
    """Everything that could run the model here, the original first.

    A runtime that is missing says so when it is opened.

    Of the ``step`` exports the first of each precision counts, since graphs of other kinds
    compute the same step; where there is no ``step`` export, the first of each precision of all.
    """
    found = [
        Contender(ORIGINAL, "torch", "fp32", model, "original"),
        Contender("torch-eager", "torch", "fp32", model),
        Contender("torch-compiled", "torch", "fp32", model, "compiled"),
    ]
    if gpu:
        found += [
            *(
                Contender(f"torch-cuda-{name}", "torch", name, model, device="cuda")
                for name in ("fp16", "bf16", "fp32")
            ),
            Contender("torch-cuda-compiled-fp16", "torch", "fp16", model, "cuda-compiled", "cuda"),
        ]
    manifests = [read_manifest(folder) for folder in exports]
    first: dict[str, Manifest] = {}
    for m in [m for m in manifests if m.graph == "step"] or manifests:
        first.setdefault(m.precision, m)
    for m in first.values():
        for backend, precision in CPU_RUNTIMES.get(m.precision, ()):
            name = f"{backend}-{precision}"
            found.append(Contender(name, backend, precision, m.folder, export=m.name))
        if gpu and m.precision != "int8":
            name = f"onnxruntime-cuda-{m.precision}"
            found.append(
                Contender(name, "onnxruntime", m.precision, m.folder, "engine", "cuda", m.name)
            )
    for backend in MODULES:
        built = newest_built_export(run, backend) if gpu and run is not None else None
        for m in manifests:
            if m.name == built:
                name, kind = f"{backend}-{m.precision}", "engine"
                found.append(Contender(name, backend, m.precision, m.folder, kind, "cuda", m.name))
    return found


def choose(
    contenders: Sequence[Contender], names: Sequence[str], quick: bool = False
) -> list[Contender]:
    """Those of the given names and the original; without names all that are quick enough."""
    known = [contender.name for contender in contenders]
    for name in names:
        if name not in known:
            raise UsageError(f"no contender {name!r} here; there are {', '.join(known)}")
    if not names:
        return [c for c in contenders if not (quick and c.name == SLOW_TO_START)]
    return [c for c in contenders if c.name in names or c.name == ORIGINAL]


def open_contender(contender: Contender, threads: int | None, batch: int) -> Any:
    """Open it in this process, for a batch size: a denoiser, which may be a context manager."""
    if contender.kind == "engine":
        return open_engine(contender.request(threads, batch))
    import torch

    from lutdeploy.artefacts.checkpoint import load_model
    from lutdeploy.engines.benchmark.original import OriginalDenoiser

    if threads is not None:
        torch.set_num_threads(threads)
    model = load_model(contender.path)
    if contender.kind == "original":
        return OriginalDenoiser(model)
    if contender.kind == "compiled":
        from lutdeploy.reference import TorchDenoiser

        # Nearly all of the work is in the blocks. All run the same code, so it is compiled once:
        # 16 times less than the whole network, for every batch size but 1, which torch always
        # compiles apart.
        for block in model.blocks:
            block.compile(dynamic=True)
        return TorchDenoiser(model)
    from lutdeploy.engines.cuda.device import CudaDevice
    from lutdeploy.engines.cuda.torch import TorchDeviceDenoiser

    sha256 = files.sha256(contender.path)
    return TorchDeviceDenoiser(model, CudaDevice(), contender.precision, sha256, compile=True)
