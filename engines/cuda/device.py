"""One CUDA device as the engines use it: streams, buffers, capture.

Everything that only a GPU can do is in this file, and nothing else: tests put a CPU in its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lutdeploy.device import Device, find_device
from lutdeploy.errors import BackendError, first_line


class CaptureError(BackendError):
    """A CUDA graph could not take this work; the device is usable as before."""


class CudaDevice:
    """A CUDA device with one stream each for upload, computation and download.

    None of the three is the default stream, which waits for all others.

    Args:
        name: "cuda" or "cuda:N".
    """

    # Errors of captures in this process, whatever their device: torch's allocator is one for all.
    failures: ClassVar[list[CaptureError]] = []

    def __init__(self, name: str = "cuda") -> None:
        device = find_device(name)
        if device.kind != "cuda":
            raise BackendError(f"no CUDA device {name!r} here")
        self.torch_device = torch.device("cuda", device.index)
        self.activate()
        self.upload = self._stream()
        self.compute = self._stream()
        self.download = self._stream()

    def activate(self) -> None:
        """Make it the calling thread's current device, which other libraries use."""
        torch.cuda.set_device(self.torch_device)

    def _stream(self) -> Any:
        return torch.cuda.Stream(self.torch_device)

    @property
    def gpu(self) -> str:
        """The GPU's name as the driver reports it."""
        return torch.cuda.get_device_name(self.torch_device)

    @property
    def compute_capability(self) -> str:
        """Such as "9.0"."""
        major, minor = torch.cuda.get_device_capability(self.torch_device)
        return f"{major}.{minor}"

    @property
    def cuda_version(self) -> str:
        """The version of the CUDA runtime in this process, which is torch's."""
        return str(torch.version.cuda)

    @property
    def index(self) -> int:
        """N of cuda:N."""
        return self.torch_device.index or 0

    @property
    def word(self) -> str:
        """The device as every command writes it, such as "cuda:0"."""
        return str(Device("cuda", self.index))

    @property
    def free_memory(self) -> int:
        """Bytes of its memory that nobody holds now."""
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    @property
    def stream_handle(self) -> int:
        """The compute stream as a cudaStream_t."""
        return int(self.compute.cuda_stream)

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Send the torch operations of the block to ``stream``."""
        return torch.cuda.stream(stream)

    def event(self) -> Any:
        """An event that one stream records and another, or the host, waits for."""
        return torch.cuda.Event()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous buffer; torch's allocator aligns it to 512 bytes."""
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros in page-locked host memory, so that copies overlap with computation."""
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def combine(self, out: Tensor, x: Tensor, ratio: float, y: Tensor) -> None:
        """out = x + ratio·y on the current stream; allocates nothing."""
        torch.add(x, y, alpha=ratio, out=out)

    def synchronize(self) -> None:
        """Wait for everything on every stream."""
        torch.cuda.synchronize(self.torch_device)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what ``work`` enqueues on the compute stream, without running it.

        The caller has run ``work`` once and synchronised. It keeps the buffers, because the
        recording holds their addresses.

        Returns:
            A function that enqueues the recording on the compute stream.

        Raises:
            CaptureError: something in ``work`` cannot be captured, or nothing can any more.
        """
        if self.failures and torch.__version__ < "2.13":
            # There torch's allocator still takes a failed capture for one under way, and the next
            # capture ends the process.
            raise CaptureError(
                f"torch {torch.__version__} cannot capture after a capture has failed, 2.13 can "
                f"(it failed with {self.failures[0]})"
            )
        try:
            return self._capture(work)
        except CaptureError as error:
            self.failures.append(error)
            raise

    def _capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self.torch_device)
        try:
            # Other threads (encoding, another engine) may call CUDA meanwhile.
            with torch.cuda.graph(graph, stream=self.compute, capture_error_mode="thread_local"):
                work()
        except Exception as error:
            torch.cuda.set_stream(before)  # torch leaves its own when ending the capture fails
            with contextlib.suppress(Exception):  # it reports the failed capture a second time
                torch.cuda.synchronize(self.torch_device)
            raise CaptureError(f"{type(error).__name__}: {first_line(error)[:200]}") from error

        def replay() -> None:
            with torch.cuda.stream(self.compute):
                graph.replay()

        return replay
