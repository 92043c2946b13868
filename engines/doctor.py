"""What is installed, what works on this machine, what is missing: `lutdeploy doctor`."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
import time
from dataclasses import dataclass

from lutdeploy.artefacts.run import MODEL, RUNS, Run
from lutdeploy.engines import require_tensorrt, tensorrt_machine
from lutdeploy.engines.tensorrt import plan
from lutdeploy.errors import BackendError, LutDeployError
from lutdeploy.machine import import_problem

PACKAGES = ("torch", "numpy", "onnx", "onnxscript", "safetensors", "pillow", "click", "rich")
RUNTIMES = ("onnxruntime-gpu", "onnxruntime")
# What an extra makes possible: the extra, what must import for it, and what it is for.
OPTIONAL = {
    "evaluate": (
        "evaluate",
        ("torchmetrics.functional.image", "torchmetrics.image.fid", "jinja2"),
        "for `evaluate`",
    ),
    "lpips": (
        "train",
        ("torchvision", "torchmetrics.image.lpip"),
        "for `train --perceptual lpips`; its VGG16 weights come from the network",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it works, what it is or how to get it."""

    subject: str
    works: bool
    detail: str
    required: bool = True


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tiny_graph() -> bytes:
    """y = x·x for x [2, 2], to see a provider compute."""
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "x"], ["y"])], "probe", values[:1], values[1:]
    )
    opset = helper.make_opsetid("", 20)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def _providers() -> list[Finding]:
    import numpy as np
    import onnxruntime as ort

    from lutdeploy.engines.onnxruntime import open_session

    findings = []
    x = np.eye(2, dtype=np.float32) * 2
    for provider in ort.get_available_providers():
        required = provider == "CPUExecutionProvider"
        try:
            (y,) = open_session(_tiny_graph(), provider, 1).run(None, {"x": x})
            right = bool(np.array_equal(y, x @ x))
            detail = "computes" if right else f"computes wrongly: {y.tolist()}"
            findings.append(Finding(f"onnxruntime {provider}", right, detail, required))
        except LutDeployError as error:
            findings.append(Finding(f"onnxruntime {provider}", False, str(error), required))
    return findings


def _openvino() -> Finding:
    """OpenVINO and what this CPU computes in with it."""
    try:
        import openvino as ov
    except ImportError:
        missing = "pip install 'lutdeploy[openvino]' for --backend openvino"
        return Finding("openvino", False, missing, required=False)
    core = ov.Core()
    offered = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    kinds = " and ".join(kind.lower() for kind in ("FP32", "BF16") if kind in offered)
    version = ov.__version__.split("-")[0]
    return Finding("openvino", True, f"{version}, cpu computes in {kinds}", required=False)


def _tensorrt() -> list[Finding]:
    """TensorRT, and of every engine under runs/ whether it fits and in what it does not."""
    machine = tensorrt_machine()
    if machine is not None:
        detail = f"{machine.tensorrt} on {machine.gpu}, compute capability"
        findings = [
            Finding("tensorrt", True, f"{detail} {machine.compute_capability}", required=False)
        ]
    else:
        detail = "for `lutdeploy build`, on a machine with an NVIDIA GPU; see docs/tensorrt.md"
        try:
            require_tensorrt()
        except BackendError as error:
            detail = str(error)
        findings = [Finding("tensorrt", False, detail, required=False)]
    for path in sorted(RUNS.glob(f"*/{MODEL}")):
        for state in plan.survey(Run(path.parent), machine):
            verdict = state.outcome if state.record else "damaged"
            reasons = "; ".join(state.reasons) or f"fits, {verdict}"
            if machine is None and not state.reasons:
                reasons = f"fits its export ({verdict}); no TensorRT here to compare with"
            name = f"engine {path.parent.name}/{state.path.stem}"
            findings.append(Finding(name, not state.reasons, reasons, required=False))
    return findings


def bf16_speedup() -> float:
    """How many times as fast as in float32 the CPU multiplies bfloat16 matrices.

    Around one hundredth on processors that have no such instructions.
    """
    import torch

    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(256, 256, dtype=dtype)
        times = []
        for _ in range(10):  # the least disturbed one counts
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    return seconds[0] / seconds[1]


def examine() -> list[Finding]:
    """Look at everything; a provider counts as working only when it has computed."""
    python = sys.version_info[:2]
    findings = [
        Finding(
            "python", (3, 11) <= python <= (3, 13), f"{platform.python_version()} (3.11 to 3.13)"
        )
    ]
    for package in PACKAGES:
        version = _version(package)
        findings.append(Finding(package, version is not None, version or f"pip install {package}"))
    runtimes = {name: version for name in RUNTIMES if (version := _version(name))}
    if len(runtimes) == 2:
        detail = "both onnxruntime and onnxruntime-gpu: they cannot coexist; uninstall one"
        findings.append(Finding("onnxruntime", False, detail))
    elif runtimes:
        name, version = next(iter(runtimes.items()))
        findings.append(Finding("onnxruntime", True, f"{version} ({name})"))
        findings += _providers()
    else:
        detail = "pip install onnxruntime-gpu (or onnxruntime where there is no such wheel)"
        findings.append(Finding("onnxruntime", False, detail))
    findings.append(_openvino())
    findings += _tensorrt()
    import torch

    cuda = torch.cuda.is_available()
    detail = torch.cuda.get_device_name() if cuda else "no CUDA device; --device cpu is the default"
    findings.append(Finding("torch cpu", True, f"{torch.get_num_threads()} threads"))
    findings.append(Finding("torch cuda", cuda, detail, required=False))
    speedup = bf16_speedup()
    advice = "train --precision bf16" if speedup > 1 else "keep to train --precision fp32"
    detail = f"matrix products run at {speedup:.2g} × the speed of float32: {advice}"
    findings.append(Finding("torch cpu bf16", speedup > 1, detail, required=False))
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    detail = "for `train --compile on`" if compiler else "install g++ for `train --compile on`"
    findings.append(Finding("C++ compiler", compiler is not None, detail, required=False))
    for name, (extra, modules, detail) in OPTIONAL.items():
        problem = import_problem(extra, *modules)
        findings.append(Finding(name, problem is None, problem or detail, required=False))
    return findings
