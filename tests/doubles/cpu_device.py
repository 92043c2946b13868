"""A CPU in the place of a CUDA device: work waits on its streams until somebody waits for it.

Operations on tensors inside ``device.on(stream)`` are queued, and run when the host waits for
the stream, as late as their events allow. So a wait that is missing, and memory that is freed
or overwritten too early, show in the numbers or as an assertion. A captured recording is the
list of queued operations: it is replayed with the addresses that it captured, and runs none of
the program's Python.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lutdeploy.device import parse_device
from lutdeploy.engines.cuda.device import CaptureError, CudaDevice
from lutdeploy.reference import full_float32

GPU_NAME = "TensorRT double (ONNX Runtime on the CPU)"
ALIGNMENT = 512  # as torch's CUDA allocator
Work = Callable[[], Any]

_memory: weakref.WeakValueDictionary[int, NDArray[np.uint8]] = weakref.WeakValueDictionary()


def is_allocated(address: int, size: int) -> bool:
    """Whether these bytes lie in a buffer of :meth:`CpuDevice.empty` that still exists."""
    return any(
        start <= address and address + size <= start + block.nbytes
        for start, block in list(_memory.items())
    )


class CpuStream:
    """Work in order, run when somebody waits for it."""

    by_handle: ClassVar[weakref.WeakValueDictionary[int, CpuStream]] = weakref.WeakValueDictionary()
    running: ClassVar[int] = 0  # how many streams run their work now, one waiting for another
    _handles: ClassVar[Iterator[int]] = itertools.count(1)  # 0 is the default stream

    def __init__(self) -> None:
        self.cuda_stream = next(self._handles)
        self.by_handle[self.cuda_stream] = self
        self.recording: list[Work] | None = None  # of a capture
        self._queue: deque[Work] = deque()
        self._done = 0

    def put(self, work: Work) -> None:
        """Enqueue, or record where a capture is under way."""
        (self._queue if self.recording is None else self.recording).append(work)

    @property
    def end(self) -> int:
        """The place behind all that was enqueued so far."""
        return self._done + len(self._queue)

    def run(self, end: int | None = None) -> None:
        """Run what stands before a place."""
        if self.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        CpuStream.running += 1
        try:
            with torch.inference_mode():
                while self._queue and (end is None or self._done < end):
                    self._done += 1
                    self._queue.popleft()()
        finally:
            CpuStream.running -= 1

    def wait_event(self, event: CpuEvent) -> None:
        self.put(event.waiting())


class CpuEvent:
    """The place in a stream where it was recorded last."""

    _stream: CpuStream | None = None
    _place = 0

    def record(self, stream: CpuStream) -> None:
        self._stream, self._place = stream, stream.end

    def waiting(self) -> Work:
        assert self._stream is not None, "a wait for an event that was never recorded"
        return partial(self._stream.run, self._place)

    def synchronize(self) -> None:
        self.waiting()()


class _Queued(TorchDispatchMode):
    """Puts every operation on a device's current stream."""

    def __init__(self, device: CpuDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, stream = kwargs or {}, self._device.current
        if CpuStream.running or stream is None:
            return func(*args, **kwargs)
        arguments, func = func._schema.arguments, _as_now(func)
        given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
        written = [
            given[argument.name]
            for argument in arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if written:
            stream.put(partial(func, *args, **kwargs))
            (target,) = written
            return target
        # Run at once for shapes and views alone: what a result holds, it holds when its turn came.
        result = func(*args, **kwargs)
        storages = {_storage(value) for value in tree_leaves((args, kwargs)) if _is_tensor(value)}
        leaves = tree_leaves(result)
        if not all(map(_is_tensor, leaves)):  # a number for the host
            stream.run()
            return func(*args, **kwargs)
        if any(_storage(leaf) not in storages for leaf in leaves):

            def fill() -> None:
                for target, value in zip(leaves, tree_leaves(func(*args, **kwargs)), strict=True):
                    target.copy_(value)

            stream.put(fill)
        return result


def _as_now(func: Callable[..., Any]) -> Callable[..., Any]:
    """``func`` in the precision of this moment, which a GPU is told with the kernel."""
    backends: Any = torch.backends
    if {"tf32", "bf16"} & {
        place.fp32_precision for place in (backends.mkldnn.conv, backends.mkldnn.matmul)
    }:
        return func
    return full_float32()(func)


class _Host(TorchFunctionMode):
    """``Tensor.cpu`` waits for the stream and copies, as from a GPU."""

    def __init__(self, device: CpuDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cpu and self._device.current is not None:
            self._device.current.run()
            return torch.from_numpy(args[0].numpy().copy())
        return func(*args, **(kwargs or {}))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


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
        compute_capability: str = "8.9",
        capture_fails: bool = False,
        free_memory: int = 2**33,
        failures: list[CaptureError] | None = None,
    ) -> None:
        self.torch_device = torch.device("cpu")
        self.upload, self.compute, self.download = (CpuStream() for _ in range(3))
        self.name, self.capture_fails = gpu, capture_fails
        self._compute_capability = compute_capability
        self._index, self._free_memory = parse_device(name).index, free_memory
        self.failures = [] if failures is None else failures  # type: ignore[misc]
        self.current: CpuStream | None = None
        self.captures, self.replays = 0, 0

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
        outer, self.current = self.current, stream
        try:
            if outer is not None:
                yield
                return
            with _Host(self), _Queued(self), self._sessions_queued():
                yield
        finally:
            self.current = outer

    @contextlib.contextmanager
    def _sessions_queued(self) -> Iterator[None]:
        """ONNX Runtime's CPU provider enqueues, as the CUDA provider does on our stream."""
        run = ort.InferenceSession.run_with_iobinding

        def queued(session: Any, *arguments: Any) -> None:
            assert self.current is not None
            self.current.put(partial(run, session, *arguments))

        with mock.patch.object(ort.InferenceSession, "run_with_iobinding", queued):
            yield

    def event(self) -> CpuEvent:
        return CpuEvent()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Aligned as on a GPU, and filled with what would show if it were read."""
        size = int(np.prod(shape)) * dtype.itemsize
        raw = np.full(size + ALIGNMENT, 0xFF, np.uint8)  # NaN as float32
        start = -raw.ctypes.data % ALIGNMENT
        block = raw[start : start + size]
        _memory[block.ctypes.data] = block
        return torch.from_numpy(block).view(dtype).view(shape)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def synchronize(self) -> None:
        for stream in (self.download, self.compute, self.upload):  # each waits for what it needs
            stream.run()

    def _capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.capture_fails:
            raise CaptureError("RuntimeError: operation not permitted when stream is capturing")
        recorded = self.compute.recording = []
        try:
            work()
        except Exception as error:
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        finally:
            self.compute.recording = None
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            for item in recorded:
                self.compute.put(item)

        return replay


def on_cpu(patch: pytest.MonkeyPatch) -> list[CpuDevice]:
    """Put a CPU in place of every CUDA device; the list gets the devices as they are opened."""
    opened: list[CpuDevice] = []

    def make(name: str = "cuda") -> CpuDevice:
        opened.append(CpuDevice(name))
        return opened[-1]

    patch.setattr("lutdeploy.engines.cuda.device.CudaDevice", make)
    return opened
