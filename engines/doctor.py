"""What is installed, what works on this machine, what is missing: `lutdeploy doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
import time
from dataclasses import dataclass

from lutdeploy.artefacts import run
from lutdeploy.engines import tensorrt_machines
from lutdeploy.engines.tensorrt import plan
from lutdeploy.engines.tensorrt.library import TITLES, load_tensorrt
from lutdeploy.errors import BackendError, LutDeployError, first_line, needing
from lutdeploy.machine import compile_problem, import_problem

# Distributions that every installation needs, besides a runtime.
PACKAGES = (*("numpy", "safetensors", "pillow", "click", "rich", "filelock", "msgspec", "psutil"),)
TRAINING = ("onnx", "onnx-ir", "onnxscript")  # those of extra "train", besides torch
MODULES = {"onnx-ir": "onnx_ir", "pillow": "PIL"}  # of packages whose module has another name
RUNTIMES = ("onnxruntime-gpu", "onnxruntime")
# What an extra makes possible: the extra, what must import for it, and what it is for.
EXTRAS = {
    "evaluate": (
        "evaluate",
        ("torchmetrics.functional.image", "torchmetrics.image.fid", "jinja2"),
        "for `evaluate`",
    ),
    "lpips": (
        "lpips",
        ("torchvision", "torchmetrics.image.lpip"),
        "for `train --perceptual lpips`; its VGG16 weights come from the network",
    ),
    "huggingface_hub": ("hub", ("huggingface_hub",), "for `package hub` and hf://OWNER/NAME"),
}
# A graph, serialised, since ONNX is not everywhere; a test parses its text:
# <ir_version: 10, opset_import: ["": 20]>
# probe (float[2, 2] x) => (float[2, 2] y) { y = MatMul(x, x) }
PROBE = bytes.fromhex(
    "080a3a460a130a01780a01781201792206"  # y = MatMul(x, x)
    "4d61744d756c3a00120570726f6265"
    "5a130a0178120e0a0c080112080a0208020a020802"  # x
    "62130a0179120e0a0c080112080a0208020a020802"  # y
    "42040a001014"  # the opset
)


@dataclass(frozen=True)
class Finding:
    """One line: what was checked, whether it works, and what it is or how to get it."""

    subject: str
    works: bool
    detail: str
    required: bool = True


def examine() -> list[Finding]:
    """Check everything. What works has been imported; a provider that works has computed."""
    version = platform.python_version()
    supported = (3, 11) <= sys.version_info[:2] <= (3, 14)
    return [
        Finding("python", supported, f"{version} (3.11 to 3.14)"),
        *(_imports(name, f"pip install {name}") for name in PACKAGES),
        *(_for_training(name) for name in TRAINING),
        *_torch(),
        *_onnxruntime(),
        _openvino(),
        *_tensorrt(),
        *(_extra(name, *about) for name, about in EXTRAS.items()),
    ]


def _extra(subject: str, extra: str, modules: tuple[str, ...], detail: str) -> Finding:
    """Whether what an extra brings imports; if not, why, and what to do."""
    problem = import_problem(extra, *modules)
    return Finding(subject, problem is None, problem or detail, required=False)


def _for_training(package: str) -> Finding:
    """A package that sampling does without: nothing is wrong where it is not installed."""
    remedy = "pip install 'lutdeploy[train]'"
    if not _version(package):
        return Finding(package, False, f"for training, export and parity; {remedy}", required=False)
    return _imports(package, remedy)


def _imports(package: str, remedy: str) -> Finding:
    """Whether a required package imports: one that is installed may still fail to load."""
    try:
        importlib.import_module(MODULES.get(package, package))
    except Exception as error:  # compiled parts raise anything
        return Finding(package, False, f"{first_line(error)}; {remedy}")
    return Finding(package, True, _version(package))


def _version(package: str) -> str:
    """The version of an installed package; empty where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _onnxruntime() -> list[Finding]:
    """ONNX Runtime, and each of its providers, asked to compute a matrix product."""
    installed = [name for name in RUNTIMES if _version(name)]
    if len(installed) == 2:
        detail = "both onnxruntime and onnxruntime-gpu: they cannot coexist; uninstall one"
        return [Finding("onnxruntime", False, detail)]
    found = _imports("onnxruntime", "pip install onnxruntime")
    if not found.works:
        return [found]
    versions = ", ".join(f"{_version(name)} ({name})" for name in installed)
    return [Finding("onnxruntime", True, versions), *_providers()]


def _providers() -> list[Finding]:
    import numpy as np
    import onnxruntime as ort

    from lutdeploy.engines.onnxruntime import CPU, TENSORRT, open_session

    findings = []
    x = np.eye(2, dtype=np.float32) * 2
    for provider in ort.get_available_providers():
        if provider == TENSORRT:  # lutdeploy refuses it
            continue
        try:
            with needing("lutdeploy's use of it"):
                (y,) = open_session(PROBE, provider, 1).run(None, {"x": x})
            works = bool(np.array_equal(y, x @ x))
            detail = "computes" if works else f"computes wrongly: {y.tolist()}"
        except LutDeployError as error:
            works, detail = False, str(error)
        findings.append(Finding(f"onnxruntime {provider}", works, detail, provider == CPU))
    return findings


def _openvino() -> Finding:
    """OpenVINO and the precisions that this CPU computes in with it."""
    found = _extra("openvino", "openvino", ("openvino",), "for --backend openvino")
    if not found.works:
        return found
    import openvino as ov

    offered = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precisions = " and ".join(name.lower() for name in ("FP32", "BF16") if name in offered)
    detail = f"{ov.__version__.split('-')[0]}, cpu computes in {precisions}"
    return Finding("openvino", True, detail, required=False)


def _tensorrt() -> list[Finding]:
    """Both TensorRTs, and whether each engine under runs/ fits here, or in what it differs."""
    machines = tensorrt_machines()
    findings = []
    for backend, title in TITLES.items():
        machine = machines.get(backend)
        try:
            load_tensorrt(backend)
            detail = "needs an NVIDIA GPU; see docs/tensorrt.md"
        except BackendError as error:
            detail = str(error)
        if machine is not None and machine.gpu is None:
            detail = f"{machine.tensorrt} builds engines here; no GPU runs them"
        elif machine is not None:
            capability = f"compute capability {machine.compute_capability}"
            detail = f"{machine.tensorrt} on {machine.gpu}, {capability}"
        findings.append(Finding(title, machine is not None, detail, required=False))
    for path in sorted(run.RUNS.glob(f"*/{run.MODEL}")):
        for state in plan.survey(run.Run(path.parent), machines):
            verdict = state.outcome if state.record else "damaged"
            reasons = "; ".join(state.reasons) or f"fits, {verdict}"
            machine = machines.get(state.record.backend) if state.record else None
            if not state.reasons and (machine is None or machine.gpu is None):
                reasons = f"fits its export ({verdict}); no GPU and TensorRT here to compare with"
            name = f"engine {path.parent.name}/{state.path.stem}"
            findings.append(Finding(name, not state.reasons, reasons, required=False))
    return findings


def _torch() -> list[Finding]:
    """PyTorch, its devices, and whether bfloat16 is fast on the CPU."""
    found = _for_training("torch")
    if not found.works:
        return [found]
    import torch

    cuda = torch.cuda.is_available()
    gpu = torch.cuda.get_device_name() if cuda else "no CUDA device; --device cpu is the default"
    speedup = bf16_speedup()
    advice = "train --precision bf16" if speedup > 1 else "keep to train --precision fp32"
    problem = compile_problem()
    compiles = problem and f"{problem}; install g++ and the headers of Python"
    bf16 = f"matrix products run at {speedup:.2g} × the speed of float32: {advice}"
    return [
        found,
        Finding("torch cpu", True, f"{torch.get_num_threads()} threads"),
        Finding("torch cuda", cuda, gpu, required=False),
        Finding("torch cpu bf16", speedup > 1, bf16, required=False),
        Finding("torch.compile", not problem, compiles or "for `train --compile on`", False),
    ]


def bf16_speedup() -> float:
    """How many times as fast as in float32 the CPU multiplies bfloat16 matrices.

    It is around one hundredth on processors without bfloat16 instructions.
    """
    import torch

    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(256, 256, dtype=dtype)
        times = []
        for _ in range(10):  # the fastest is the least disturbed
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    return seconds[0] / seconds[1]
