"""The limits of a machine: matrix products at each precision, and memory.

A limit is the best of all tries in a run: what disturbs a machine only ever makes it slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

MEMORY = "memory"  # its limit is in bytes/s, those of the precisions in FLOP/s
COPIED_BYTES = 2**28  # per copy; well above any cache
TRIES = 3  # in a round
SPIN = 0.02  # seconds of untimed products before: a clock needs them to rise

GPU_SIDE = 8192  # of square matrices: smaller ones leave a large GPU idle between kernels

Try = Callable[[], float]  # computes once and returns the seconds that it took


def place(device: str) -> str:
    """Whose limits a device has: "cpu" or "cuda", also for a provider such as "tensorrt"."""
    return "cpu" if device == "cpu" else "cuda"


def side(device: str, size: int) -> int:
    """n of the n×n products that measure a device, of which a CPU needs ``size``."""
    return max(size, GPU_SIDE) if device.startswith("cuda") else size


def limit_of(precision: str) -> str:
    """The limit that a precision's products have: that of int8 for ``int8-bf16``."""
    return precision.partition("-")[0]


def open_limits(device: str, size: int, threads: int | None) -> dict[str, Try]:
    """What to try on "cpu" or "cuda", by name; the products are of size×size matrices."""
    import torch

    from lutdeploy.engines.doctor import bf16_speedup

    if threads is not None:
        torch.set_num_threads(threads)
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    tries = {
        "fp32": _product(device, "fp32", size),
        MEMORY: _timed(device, lambda: target.copy_(source)),
    }
    if device == "cuda":
        return {**tries, **{name: _product(device, name, size) for name in ("fp16", "bf16")}}
    if bf16_speedup() > 1:  # else the processor emulates them, at a hundredth of the speed
        tries["bf16"] = _product(device, "bf16", size)
    return {**tries, "int8": _int8_product(size, threads)}


def measure(tries: dict[str, Try]) -> dict[str, float]:
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
    """FLOP/s of PyTorch's n×n products in "fp32", "bf16" or "fp16", the best of some tries.

    Args:
        device: of torch, such as "cuda:1".
        precision: of the products.
        size: n on a CPU, see :func:`side`.
    """
    size = side(device, size)
    best = measure({precision: _product(device, precision, size)})
    return rate(precision, best[precision], size)


def _timed(device: str, call: Callable[[], Any]) -> Try:
    def on_cpu() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def on_cuda() -> float:
        import torch

        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    return on_cuda if device.startswith("cuda") else on_cpu


def _product(device: str, precision: str, size: int) -> Try:
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    left, right, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return _timed(device, lambda: torch.mm(left, right, out=out))


def _int8_product(size: int, threads: int | None) -> Try:
    """uint8·int8 to int32 in ONNX Runtime: PyTorch has no such product of its own to offer."""
    import numpy as np
    import onnx

    from lutdeploy.engines.onnxruntime import PROVIDERS, open_session

    weights = np.random.default_rng(0).integers(-127, 128, (size, size), np.int8)
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> product (uint8[{size}, {size}] x) '
        f"=> (int32[{size}, {size}] y) {{ y = MatMulInteger(x, weights) }}"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "weights"))
    session = open_session(model.SerializeToString(), PROVIDERS["cpu"], threads)
    x = np.random.default_rng(1).integers(0, 256, (size, size), np.uint8)
    return _timed("cpu", lambda: session.run(None, {"x": x}))
