"""The limits of a machine: matrix products at each precision, and memory.

A limit is the best of all tries in a run: what disturbs a machine only ever makes it slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MEMORY = "memory"  # its limit is in bytes/s, those of the precisions in FLOP/s
COPIED_BYTES = 2**28  # per copy; well above any cache
TRIES = 3  # in a round
SPIN = 0.02  # seconds of untimed products before: a clock needs them to rise


def limit_of(precision: str) -> str:
    """The limit that a precision's products have: that of int8 for ``int8-bf16``."""
    return precision.partition("-")[0]


def open_limits(device: str, size: int, threads: int | None) -> dict[str, Callable[[], float]]:
    """What to try on a device: name to a function that returns seconds of one try.

    Args:
        device: "cpu" or "cuda".
        size: n of the n×n products.
        threads: of one product; each library's own choice by default.
    """
    return _cuda(size) if device == "cuda" else _cpu(size, threads)


def measure(tries: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The best of some tries of each, in seconds."""
    best = {}
    for name, attempt in tries.items():
        start = time.perf_counter()
        attempt()
        while time.perf_counter() - start < SPIN:
            attempt()
        best[name] = min(attempt() for _ in range(TRIES))
    return best


def rate(name: str, seconds: float, size: int) -> float:
    """FLOP/s of a product, or bytes/s of a copy, which reads and writes each byte."""
    return (2 * COPIED_BYTES if name == MEMORY else 2 * size**3) / seconds


def product_peak(device: str, precision: str, size: int = 1024) -> float:
    """FLOP/s of PyTorch's matrix products on a device, the best of some tries.

    Args:
        device: "cpu" or "cuda".
        precision: "fp32", "bf16" or "fp16".
        size: n of the n×n products.
    """
    product = (_cuda_product if device == "cuda" else _cpu_product)(precision, size)
    return rate(precision, measure({precision: product})[precision], size)


def _clocked(call: Callable[[], Any]) -> Callable[[], float]:
    def attempt() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return attempt


def _cpu(size: int, threads: int | None) -> dict[str, Callable[[], float]]:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)

    source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    tries = {"fp32": _cpu_product("fp32", size), MEMORY: _clocked(lambda: target.copy_(source))}
    if _computes_in_bf16():
        tries["bf16"] = _cpu_product("bf16", size)
    tries["int8"] = _int8_product(size, threads)
    return tries


def _dtype(precision: str) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _cpu_product(precision: str, size: int) -> Callable[[], float]:
    import torch

    left, right, out = (torch.randn(size, size).to(_dtype(precision)) for _ in range(3))
    return _clocked(lambda: torch.mm(left, right, out=out))


def _computes_in_bf16() -> bool:
    """A processor without such instructions emulates them, at a hundredth of the speed."""
    from lutdeploy.engines.doctor import bf16_speedup

    return bf16_speedup() > 1


def _int8_product(size: int, threads: int | None) -> Callable[[], float]:
    """uint8·int8 to int32 in ONNX Runtime: PyTorch has no such product of its own to offer."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    from lutdeploy.engines.onnxruntime import PROVIDERS, open_session

    weights = np.random.default_rng(0).integers(-127, 128, (size, size), np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weights"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [size, size])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [size, size])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    opset = helper.make_opsetid("", 20)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    session = open_session(model.SerializeToString(), PROVIDERS["cpu"], threads)
    x = np.random.default_rng(1).integers(0, 256, (size, size), np.uint8)
    return _clocked(lambda: session.run(None, {"x": x}))


def _cuda_clocked(call: Callable[[], Any]) -> Callable[[], float]:
    import torch

    def attempt() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    return attempt


def _cuda_product(precision: str, size: int) -> Callable[[], float]:
    import torch

    left, right, out = (
        torch.randn(size, size, device="cuda", dtype=_dtype(precision)) for _ in range(3)
    )
    return _cuda_clocked(lambda: torch.mm(left, right, out=out))


def _cuda(size: int) -> dict[str, Callable[[], float]]:
    import torch

    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    return {
        "fp32": _cuda_product("fp32", size),
        "fp16": _cuda_product("fp16", size),
        MEMORY: _cuda_clocked(lambda: target.copy_(source)),
    }
