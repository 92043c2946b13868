"""One CUDA device as the engines use it: streams, buffers, capture.

The seam between the trajectory loop and torch.cuda. Tests put a CPU in its place, so
everything that only a GPU can do stands in this file and nothing else does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lutdeploy.errors import BackendError


class CaptureError(BackendError):
    """Work that a CUDA graph could not take; the device is usable as before."""


class CudaDevice:
    """A CUDA device with a stream each for upload, computation and download.

    None of the three is the default stream, which would order itself against all others.

    Args:
        name: "cuda" or "cuda:N".

    Raises:
        BackendError: torch sees no such device.
    """

    def __init__(self, name: str = "cuda") -> None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise BackendError(f"{name!r} is no device; write cuda or cuda:N") from error
        if device.type != "cuda" or (device.index or 0) >= count:
            there = ", ".join(f"cuda:{k}" for k in range(count)) or "none"
            raise BackendError(f"no CUDA device {name!r} here; torch sees {there}")
        self.torch_device = torch.device("cuda", device.index or 0)
        self.activate()
        self.upload = self._stream()
        self.compute = self._stream()
        self.download = self._stream()

    def activate(self) -> None:
        """Make it the current device of the calling thread, where other libraries look for it."""
        torch.cuda.set_device(self.torch_device)

    def _stream(self) -> Any:
        return torch.cuda.Stream(self.torch_device)

    @property
    def gpu(self) -> str:
        """The GPU's name as the driver says it."""
        return torch.cuda.get_device_name(self.torch_device)

    @property
    def compute_capability(self) -> str:
        """Such as "9.0"."""
        major, minor = torch.cuda.get_device_capability(self.torch_device)
        return f"{major}.{minor}"

    @property
    def cuda_version(self) -> str:
        """Of the CUDA runtime in this process, which is torch's."""
        return str(torch.version.cuda)

    @property
    def index(self) -> int:
        """N of cuda:N."""
        return self.torch_device.index or 0

    @property
    def stream_handle(self) -> int:
        """The compute stream as a cudaStream_t."""
        return int(self.compute.cuda_stream)

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Torch operations inside go to ``stream``."""
        return torch.cuda.stream(stream)

    def event(self) -> Any:
        """An event to record on one stream and to wait for on another, or on the host."""
        return torch.cuda.Event()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous buffer; torch's allocator aligns it to 512 bytes."""
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros in host memory that copies can read and write beside computation."""
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def combine(self, out: Tensor, x: Tensor, ratio: float, y: Tensor) -> None:
        """out = x + ratio·y on the current stream, without memory of its own."""
        torch.add(x, y, alpha=ratio, out=out)

    def synchronize(self) -> None:
        """Wait for everything on every stream."""
        torch.cuda.synchronize(self.torch_device)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what ``work`` enqueues on the compute stream; nothing runs yet.

        The caller has run ``work`` once and synchronised, and keeps its buffers: the
        recording holds their addresses.

        Returns:
            Enqueues the recording on the compute stream.

        Raises:
            CaptureError: something in ``work`` cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self.torch_device)
        try:
            # Other threads (encoding, another engine) may call CUDA meanwhile.
            with torch.cuda.graph(graph, stream=self.compute, capture_error_mode="thread_local"):
                work()
        except Exception as error:
            torch.cuda.set_stream(before)  # torch leaves its own when ending the capture fails
            with contextlib.suppress(Exception):  # reports the failed capture once more
                torch.cuda.synchronize(self.torch_device)
            raise CaptureError(f"{type(error).__name__}: {_first_line(error)}") from error

        def replay() -> None:
            with torch.cuda.stream(self.compute):
                graph.replay()

        return replay


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["?"])[0][:200]
