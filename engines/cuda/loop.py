"""Whole trajectories on a device, without a host round trip between their steps.

A :class:`Program` enqueues single evaluations. :class:`DeviceLoop` chains them over two
alternating buffers, captures the chain in one CUDA graph, and overlaps the copies of noise and
pictures with the computation. The TensorRT, ONNX Runtime and PyTorch engines differ only in
their program.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lutdeploy.engines.cuda.device import CaptureError, CudaDevice
from lutdeploy.sampling import Batch, Images

logger = logging.getLogger(__name__)

IN_FLIGHT = 2  # batches: one computes while the other is copied


class Program(Protocol):
    """The evaluations of one schedule at one batch size, ready to be enqueued."""

    evaluations: int  # 1 for a graph that holds the whole trajectory
    capturable: bool  # false for a runtime that allocates or synchronises while it runs

    def enqueue(self, k: int, x: Tensor, x0_prev: Tensor, x_next: Tensor, x0: Tensor) -> None:
        """Enqueue evaluation k on the device's compute stream; all float32 [B, C, S, S]."""


def to_pixels(images: Tensor) -> Tensor:
    """Convert float32 [B, C, S, S] in [−1, 1] (clipped) to uint8 [B, S, S, C].

    It repeats the operations of :func:`lutdeploy.images.to_uint8`, so it gives the same bits.
    """
    scaled = images.clamp(-1, 1).mul_(127.5).add_(127.5).round_()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1)


class _Slot:
    """The buffers of one batch in flight, on the host and on the device."""

    def __init__(self, device: CudaDevice, batch: int, shape: tuple[int, int, int]) -> None:
        channels, height, width = shape
        self.host_noise = device.pinned((batch, *shape))
        self.noise = device.empty((batch, *shape))
        floats, pixels = (batch, *shape), (batch, height, width, channels)
        self.images = {False: device.empty(floats), True: device.empty(pixels, torch.uint8)}
        self.host_images = {False: device.pinned(floats), True: device.pinned(pixels, torch.uint8)}
        self.finite = device.empty((batch,), torch.bool)
        self.host_finite = device.pinned((batch,), torch.bool)
        self.uploaded, self.computed, self.downloaded = (device.event() for _ in range(3))
        self.count, self.pixels = 0, False


class DeviceLoop:
    """One program at one batch size, warmed up and captured.

    Args:
        device: where the program runs.
        program: its evaluations.
        batch: B, images per pass; smaller batches are padded.
        shape: (C, S, S).
        ratios: d/c of each evaluation (:func:`lutdeploy.sampling.history`); empty means all 0.
    """

    def __init__(
        self,
        device: CudaDevice,
        program: Program,
        batch: int,
        shape: tuple[int, int, int],
        ratios: Sequence[float] = (),
    ) -> None:
        self.device, self.program, self.batch = device, program, batch
        full = (batch, *shape)
        self._ratios = tuple(ratios) or (0.0,) * program.evaluations
        self._history = device.empty(full) if any(self._ratios) else None
        self._x = [device.empty(full) for _ in range(2)]
        self._x0 = [device.empty(full) for _ in range(2)]
        self._pixels = device.empty((batch, *shape[1:], shape[0]), torch.uint8)
        self._finite = device.empty((batch,), torch.bool)
        self._slots = deque(_Slot(device, batch, shape) for _ in range(IN_FLIGHT))
        self.captured = False
        self._run = self._prepare()

    def _prepare(self) -> Callable[[], None]:
        """Enqueue everything once, so that nothing initialises lazily later, then capture it."""
        with self.device.on(self.device.compute):
            for tensor in (*self._x, *self._x0):
                tensor.zero_()
        self._enqueue()
        self.device.synchronize()
        if not self.program.capturable:
            return self._enqueue
        try:
            replay = self.device.capture(self._enqueue)
        except CaptureError as error:
            logger.warning(
                "no CUDA graph for batch %d, steps run one by one: %s", self.batch, error
            )
            return self._enqueue
        self.captured = True
        return replay

    def _enqueue(self) -> None:
        with self.device.on(self.device.compute):
            for k in range(self.program.evaluations):
                old, new = k % 2, (k + 1) % 2
                history = self._x0[old]
                if self._ratios[k] and self._history is not None:
                    # The buffer that this evaluation overwrites still holds x0_prev2.
                    history = self._history
                    self.device.combine(history, self._x0[old], self._ratios[k], self._x0[new])
                self.program.enqueue(k, self._x[old], history, self._x[new], self._x0[new])
            self._finite.copy_(self._last.isfinite().flatten(1).all(1))
            self._pixels.copy_(to_pixels(self._last))

    @property
    def _last(self) -> Tensor:
        return self._x[self.program.evaluations % 2]

    def start(self, noise: Images, pixels: bool) -> _Slot:
        """Enqueue a batch: upload, trajectory, download. The host does not wait.

        Args:
            noise: float32 [n, C, S, S], n ≤ B.
            pixels: return uint8 pictures, else float32 images.
        """
        slot, device = self._slots.popleft(), self.device
        slot.count, slot.pixels = len(noise), pixels
        slot.host_noise[: len(noise)].copy_(torch.from_numpy(noise))
        with device.on(device.upload):
            slot.noise.copy_(slot.host_noise, non_blocking=True)
            slot.uploaded.record(device.upload)
        with device.on(device.compute):
            device.compute.wait_event(slot.uploaded)
            self._x[0].copy_(slot.noise)
            self._x0[0].copy_(slot.noise)  # x0_prev of step 0, whose coefficient c is 0
        self._run()
        with device.on(device.compute):
            slot.images[pixels].copy_(self._pixels if pixels else self._last)
            slot.finite.copy_(self._finite)
            slot.computed.record(device.compute)
        with device.on(device.download):
            device.download.wait_event(slot.computed)
            slot.host_images[pixels].copy_(slot.images[pixels], non_blocking=True)
            slot.host_finite.copy_(slot.finite, non_blocking=True)
            slot.downloaded.record(device.download)
        return slot

    def finish(self, slot: _Slot) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Wait for a started batch.

        Returns:
            float32 [n, C, S, S] or uint8 [n, S, S, C], and which of them are finite, bool [n].
        """
        slot.downloaded.synchronize()
        images = slot.host_images[slot.pixels][: slot.count].numpy().copy()
        finite = slot.host_finite[: slot.count].numpy().copy()
        self.release(slot)
        return images, finite

    def release(self, slot: _Slot) -> None:
        """Take back a slot that the device has finished with."""
        self._slots.append(slot)


def evaluate(
    device: CudaDevice, program: Program, k: int, x: Images, x0_prev: Images
) -> tuple[Images, Images]:
    """Run one evaluation from host to host: (x_next, x0), each float32 [B, C, S, S]."""
    with device.on(device.compute):
        tensors = [device.empty(x.shape) for _ in range(4)]
        for tensor, array in zip(tensors, (x, x0_prev), strict=False):
            tensor.copy_(torch.from_numpy(array))
        program.enqueue(k, *tensors)
        x_next, x0 = (tensor.cpu().numpy() for tensor in tensors[2:])
    return x_next, x0


def run_batches(
    device: CudaDevice,
    loop_for: Callable[[int], DeviceLoop],
    batches: Iterable[Batch],
    pixels: bool,
) -> Iterator[tuple[Batch, NDArray[Any], NDArray[np.bool_]]]:
    """Run batches in order. While one computes, the next one's noise is made and uploaded.

    Args:
        device: of all the loops.
        loop_for: returns the loop for a number of images.
        batches: (indices, noise) each.
        pixels: yield uint8 pictures, else float32 images.

    Yields:
        The batch and what :meth:`DeviceLoop.finish` returns for it.
    """
    pending: deque[tuple[Batch, DeviceLoop, _Slot]] = deque()

    def finish() -> tuple[Batch, NDArray[Any], NDArray[np.bool_]]:
        batch, loop, slot = pending.popleft()
        return batch, *loop.finish(slot)

    try:
        for indices, noise in batches:
            while len(pending) >= IN_FLIGHT:
                yield finish()
            loop = loop_for(len(noise))
            batch = indices, np.ascontiguousarray(noise, np.float32)
            pending.append((batch, loop, loop.start(batch[1], pixels)))
        while pending:
            yield finish()
    finally:  # also when the caller stops early: the device still uses the buffers
        device.synchronize()
        for _, loop, slot in pending:
            loop.release(slot)


def split_batches(batches: Iterable[Batch], largest: int) -> Iterator[Batch]:
    """The same images in the same order, at most ``largest`` in a batch."""
    for indices, noise in batches:
        for start in range(0, len(noise), largest):
            yield indices[start : start + largest], noise[start : start + largest]


class Loops:
    """The loops of one schedule, each made when a batch of its size first comes.

    Args:
        make: makes a loop for a batch size.
        smallest: the smallest batch that the engine takes.
    """

    def __init__(self, make: Callable[[int], DeviceLoop], smallest: int = 1) -> None:
        self._make, self._smallest = make, smallest
        self._loops: dict[int, DeviceLoop] = {}

    def __call__(self, count: int) -> DeviceLoop:
        """The loop for ``count`` images.

        A smaller batch is padded into an existing loop where that wastes at most half of the
        work: capturing another loop costs more.
        """
        fitting = [size for size in self._loops if count <= size <= 2 * count]
        size = min(fitting, default=max(count, self._smallest))
        if size not in self._loops:
            self._loops[size] = self._make(size)
        return self._loops[size]
