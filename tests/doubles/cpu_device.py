"""A CPU in the place of a CUDA device: streams without concurrency, capture without a graph.

It checks what a GPU would punish: waiting for the device inside a capture, and buffers that a
captured recording would no longer find where they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lutdeploy.device import parse_device
from lutdeploy.engines.cuda.device import CaptureError, CudaDevice
from tests.doubles.tensorrt_double import GPU_NAME

ALIGNMENT = 512  # as torch's CUDA allocator


class CpuStream:
    """Everything on it has happened by the time it is asked."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle

    def wait_event(self, event: CpuEvent) -> None:
        assert event.recorded, "a stream waits for an event that was never recorded"


class CpuEvent:
    recorded = False

    def record(self, stream: CpuStream) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded, "the host waits for an event that was never recorded"


class CpuDevice(CudaDevice):
    """A device named ``gpu``.

    Args:
        gpu: its name, "TensorRT double …" by default.
        compute_capability: as a GPU would report it.
        capture_fails: every capture ends in an error.
        free_memory: in bytes.
        failures: of earlier captures on devices of one process; this device's own by default.
    """

    def __init__(
        self,
        name: str = "cuda",
        gpu: str = GPU_NAME,
        compute_capability: str = "9.0",
        capture_fails: bool = False,
        free_memory: int = 2**33,
        failures: list[CaptureError] | None = None,
    ) -> None:
        self.torch_device = torch.device("cpu")
        self.upload, self.compute, self.download = (CpuStream(k) for k in (1, 2, 3))
        self.name, self.capture_fails = gpu, capture_fails
        self._compute_capability = compute_capability
        self._index, self._free_memory = parse_device(name).index, free_memory
        self.failures = [] if failures is None else failures  # type: ignore[misc]
        self.capturing, self.captures, self.replays = False, 0, 0

    @property
    def gpu(self) -> str:
        return self.name

    @property
    def index(self) -> int:
        return self._index

    @property
    def free_memory(self) -> int:
        return self._free_memory

    @property
    def compute_capability(self) -> str:
        return self._compute_capability

    @property
    def cuda_version(self) -> str:
        return "none (double)"

    def activate(self) -> None:
        """There is but one."""

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        yield

    def event(self) -> CpuEvent:
        return CpuEvent()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Aligned as on a GPU, and filled with what would show if it were read."""
        count = 1
        for extent in shape:
            count *= extent
        size = count * dtype.itemsize
        raw = torch.full((size + ALIGNMENT,), 0xFF, dtype=torch.uint8)  # NaN as float32
        start = -raw.data_ptr() % ALIGNMENT
        return raw[start : start + size].view(dtype).view(shape)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def synchronize(self) -> None:
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    def _capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.capture_fails:
            raise CaptureError("RuntimeError: operation not permitted when stream is capturing")
        self.capturing = True
        try:
            work()  # a GPU would only record; here it may as well run, into the same buffers
        except Exception as error:
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        finally:
            self.capturing = False
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            work()

        return replay


def on_cpu(patch: pytest.MonkeyPatch) -> list[CpuDevice]:
    """Put a CPU in place of every CUDA device; the list gets the devices as they are opened."""
    opened: list[CpuDevice] = []

    def make(name: str = "cuda") -> CpuDevice:
        opened.append(CpuDevice(name))
        return opened[-1]

    patch.setattr("lutdeploy.engines.cuda.device.CudaDevice", make)
    return opened
