"""The Denoiser protocol over programs on a device, for TensorRT, ONNX Runtime and PyTorch."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from lutdeploy.config import ModelConfig
from lutdeploy.engines.cuda.device import CudaDevice
from lutdeploy.engines.cuda.loop import (
    DeviceLoop,
    Loops,
    Program,
    evaluate,
    run_batches,
    split_batches,
)
from lutdeploy.errors import NonFiniteError, UsageError
from lutdeploy.sampling import (
    Batch,
    Finished,
    Images,
    check_schedule,
    held_row,
    predict_by_row,
    trajectory,
)
from lutdeploy.schedule import Schedule, Step
from lutdeploy.signature import Signature, TensorSpec

COEFFICIENTS = ("t", "a", "b", "c")


class ExportProgram(Program, Protocol):
    """A program for any kind of graph."""

    batch: int

    def set_coefficients(self, values: NDArray[np.float32]) -> None:
        """Set t, a, b, c of every step, float32 [steps, 4, B], of a "step" export."""


class DeviceDenoiser(abc.ABC):
    """Graphs on a device. A :class:`lutdeploy.sampling.StreamingDenoiser`.

    Batches larger than the engine's largest are split; those smaller than its smallest are padded.

    Args:
        config: of the model inside.
        graph: the kind of graph: "step", "per-step" or "loop".
        schedule: the only one it can follow; None for "step", which follows any.
        device: where it runs.
        sizes: smallest and largest batch of the engine; None means no limit.
    """

    def __init__(
        self,
        config: ModelConfig,
        graph: str,
        schedule: Schedule | None,
        device: CudaDevice,
        sizes: tuple[int, int | None] = (1, None),
    ) -> None:
        self.config, self.schedule, self.graph, self.device = config, schedule, graph, device
        self.whole_trajectory = graph == "loop"
        self._smallest, self._largest = sizes
        self._loops: tuple[Schedule, Loops] | None = None
        self._single: ExportProgram | None = None
        self._captures = True

    @abc.abstractmethod
    def make_program(self, batch: int, steps: int, alone: bool) -> ExportProgram:
        """Make a program over the export's engines at one batch size.

        Args:
            batch: B.
            steps: of the schedule, for a "step" export.
            alone: for single evaluations at changing addresses.
        """

    def close(self) -> None:
        """Free loops and programs when the device has finished with them."""
        self.device.synchronize()
        self._loops = self._single = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def predict_x0(self, x: Images, t: NDArray[np.float32]) -> Images:
        """See :class:`lutdeploy.sampling.Denoiser`."""
        if self.schedule is not None:
            return predict_by_row(self, x, t)
        values = np.zeros((len(COEFFICIENTS), len(x)), np.float32)
        values[0], values[2] = t, 1  # x' = x0
        return self._evaluate(0, x, x, values)[1]

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        """See :class:`lutdeploy.sampling.Denoiser`."""
        previous = x if x0_prev is None else x0_prev
        if self.schedule is None:
            return self._evaluate(0, x, previous, _coefficients((row,), len(x))[0])
        return self._evaluate(held_row(self.schedule, row), x, previous, None)

    def run(self, noise: Images) -> Images:
        """See :class:`lutdeploy.sampling.Denoiser`."""
        if self.schedule is None or not self.whole_trajectory:
            raise UsageError(f"a {self.graph} export holds steps, no whole trajectory")
        batches = [(range(len(noise)), noise)]
        return np.concatenate([images for _, images in self.stream(batches, self.schedule, False)])

    def stream(
        self, batches: Iterable[Batch], schedule: Schedule, pixels: bool
    ) -> Iterator[Finished]:
        """See :class:`lutdeploy.sampling.StreamingDenoiser`."""
        check_schedule(self, schedule)
        if self._loops is None or self._loops[0] != schedule:
            self._loops = None  # free the previous schedule's buffers first
            self._loops = (
                schedule,
                Loops(lambda batch: self._loop(batch, schedule), self._smallest),
            )
        batches = self._checked(batches)
        if self._largest is not None:
            batches = split_batches(batches, self._largest)
        results = run_batches(self.device, self._loops[1], batches, pixels)
        for (indices, noise), images, finite in results:
            if not finite.all():
                self._locate(noise, indices, schedule, int(np.flatnonzero(~finite)[0]))
            yield indices, images

    def _check(self, x: Images) -> None:
        Signature((TensorSpec("x", self.config.image_shape),), ()).check_feed({"x": x})

    def _checked(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for indices, noise in batches:
            self._check(noise)
            yield indices, noise

    def _loop(self, batch: int, schedule: Schedule) -> DeviceLoop:
        program = self.make_program(batch, schedule.steps, alone=False)
        if self.schedule is None:
            program.set_coefficients(_coefficients(schedule.rows, batch))
        tries = program.capturable and self._captures
        program.capturable = tries
        ratios = () if self.whole_trajectory else [row.history_ratio for row in schedule.rows]
        loop = DeviceLoop(self.device, program, batch, self.config.image_shape, ratios)
        if tries and not loop.captured:
            self._captures = False  # where it failed once, do not try (and log) again
        return loop

    def _evaluate(
        self, k: int, x: Images, x0_prev: Images, values: NDArray[np.float32] | None
    ) -> tuple[Images, Images]:
        """One evaluation from host to host; ``values`` as for :func:`_coefficients`, [4, B]."""
        self._check(x)
        parts = []
        size = self._largest or len(x)
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            count = len(x[rows])
            batch = max(count, self._smallest)
            if self._single is None or self._single.batch != batch:
                self._single = None  # free its memory first
                self._single = self.make_program(batch, 1, alone=True)
            if values is not None:
                self._single.set_coefficients(_padded(values[:, rows].T, batch).T[None].copy())
            inputs = (_padded(x[rows], batch), _padded(x0_prev[rows], batch))
            outputs = evaluate(self.device, self._single, k, *inputs)
            parts.append([output[:count] for output in outputs])
        x_next, x0 = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return x_next, x0

    def _locate(
        self, noise: Images, indices: Sequence[int], schedule: Schedule, first: int
    ) -> None:
        """Repeat a failed trajectory step by step to say where it failed."""
        if not self.whole_trajectory:
            for _ in trajectory(self, noise, schedule, indices):
                pass
        raise NonFiniteError(
            f"NaN or Inf after step {schedule.steps} in image {indices[first]}; `lutdeploy parity` "
            "shows where the model and its engine differ"
        )


def _coefficients(rows: Sequence[Step], batch: int) -> NDArray[np.float32]:
    """The values of ``COEFFICIENTS`` for every step and image, float32 [steps, 4, B]."""
    values = np.array([[row.t, row.a, row.b, row.c] for row in rows], np.float32)
    return values[:, :, None].repeat(batch, 2)  # [steps, 4, B]


def _padded(array: NDArray[np.float32], batch: int) -> NDArray[np.float32]:
    """Pad float32 [n, …] to [batch, …] with copies of its last row; contiguous."""
    missing = batch - len(array)
    if missing:
        array = np.concatenate([array, array[-1:].repeat(missing, 0)])
    return np.ascontiguousarray(array, np.float32)
