"""Sampling: the Denoiser protocol, per-image noise, the loop. Arrays in, arrays out."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lutdeploy.config import ModelConfig
from lutdeploy.errors import ConfigError, NonFiniteError, UsageError
from lutdeploy.schedule import Schedule, ScheduleRequest, Step

T = TypeVar("T")

Images = NDArray[np.float32]  # [B, C, S, S]
Batch = tuple[Sequence[int], Images]  # the images' indices, and their noise
Finished = tuple[Sequence[int], NDArray[Any]]  # indices; float32 images or uint8 pixels


class Denoiser(Protocol):
    """Anything that can be sampled from: a PyTorch model, an ONNX graph, an engine."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def schedule(self) -> Schedule | None:
        """The only schedule that it can follow; None when it follows any."""

    @property
    def whole_trajectory(self) -> bool:
        """True when :meth:`run` is all it can do: the steps are inside the graph."""

    def predict_x0(self, x: Images, t: NDArray[np.float32]) -> Images:
        """The clean images at (x_t, t): float32 [B, C, S, S] and [B] to [B, C, S, S]."""

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        """One row of a schedule: (x', x0) with x' = a·x + b·x0 + c·x0_prev.

        ``x0_prev`` is what :func:`history` makes of the x0 before, None on the first step.
        """

    def run(self, noise: Images) -> Images:
        """The whole trajectory of ``schedule``: noise in, images out."""


@runtime_checkable
class StreamingDenoiser(Denoiser, Protocol):
    """A denoiser that walks whole trajectories by itself, batches beside one another."""

    def stream(
        self, batches: Iterable[Batch], schedule: Schedule, pixels: bool
    ) -> Iterator[Finished]:
        """The trajectories of all batches, in order; a large batch may come in parts.

        Args:
            batches: taken while an earlier one computes.
            schedule: the steps.
            pixels: uint8 [n, S, S, C] as :func:`lutdeploy.images.to_uint8` makes them,
                instead of float32 [n, C, S, S].
        """


def image_noise(seed: int, index: int, shape: tuple[int, int, int]) -> Images:
    """The noise of one image, a function of (seed, index) alone: float32 N(0, 1).

    Philox is a counter-based generator (Salmon et al. 2011); seed and index are its key,
    so no two images share a stream and none depends on a batch.
    """
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 2**64:
            raise ConfigError(f"{name} must be in [0, 2^64), not {value}")
    generator = np.random.Generator(np.random.Philox(key=seed | index << 64))
    return generator.standard_normal(shape, dtype=np.float32)


def batch_noise(seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> Images:
    """The noise of several images, float32 [len(indices), C, S, S]."""
    noise = np.empty((len(indices), *shape), np.float32)
    for row, index in enumerate(indices):
        noise[row] = image_noise(seed, index, shape)
    return noise


def in_batches(indices: Sequence[int], batch: int) -> Iterator[Sequence[int]]:
    """``indices`` in order, ``batch`` at a time; fewer at the end."""
    return (indices[start : start + batch] for start in range(0, len(indices), batch))


def given_batches(noise: Images, batch: int) -> Iterator[Batch]:
    """The rows of ``noise`` [n, C, S, S], a batch at a time; their numbers are the indices."""
    for group in in_batches(range(len(noise)), batch):
        yield group, np.ascontiguousarray(noise[group[0] : group[-1] + 1], np.float32)


def noise_batches(
    seed: int, indices: Sequence[int], batch: int, shape: tuple[int, int, int]
) -> Iterator[Batch]:
    """The noise of many images, a batch at a time, each made when it is asked for."""
    return ((group, batch_noise(seed, group, shape)) for group in in_batches(indices, batch))


def ahead(items: Iterator[T], most: int) -> Generator[T, None, None]:
    """``items``, of which a thread takes up to ``most`` before they are asked for.

    An error in the thread is raised here, in its place. Close this generator where it may end
    early: that ends the thread.
    """
    end = object()
    thread = ThreadPoolExecutor(1, "ahead")
    try:
        waiting = deque(thread.submit(next, items, end) for _ in range(most))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item  # type: ignore[misc]
    finally:
        thread.shutdown(cancel_futures=True)


def held_row(schedule: Schedule, row: Step) -> int:
    """Which row of a denoiser's own schedule is asked for."""
    if row not in schedule.rows:
        raise UsageError(f"this export holds no step {row}; it holds {schedule.describe()}")
    return schedule.rows.index(row)


def predict_by_row(denoiser: Denoiser, x: Images, t: NDArray[np.float32]) -> Images:
    """:meth:`Denoiser.predict_x0` of a denoiser that holds the timesteps of its schedule alone."""
    if denoiser.whole_trajectory:
        raise UsageError("a loop export holds whole trajectories, no single prediction")
    schedule, t = denoiser.schedule, np.asarray(t, np.float32)
    assert schedule is not None
    x0 = np.empty_like(x)
    for value in np.unique(t):
        held = [row for row in schedule.rows if np.float32(row.t) == value]
        if not held:
            some = ", ".join(f"{row.t:g}" for row in schedule.rows[:4])
            raise UsageError(f"this export holds no timestep {value:g}; it holds {some}, …")
        rows = np.flatnonzero(t == value)
        x0[rows] = denoiser.step(np.ascontiguousarray(x[rows]), held[0], None)[1]
    return x0


def history(row: Step, x0_prev: Images | None, x0_prev2: Images | None) -> Images | None:
    """The one history term that graphs take: x0_prev + (d/c)·x0_prev2.

    With it c·x0_prev is c·x0_prev + d·x0_prev2, so that a third-order step needs no other graph.
    """
    if not row.d or x0_prev is None or x0_prev2 is None:
        return x0_prev
    return x0_prev + np.float32(row.history_ratio) * x0_prev2


def follow(row: Step, x: Images, x0: Images, past: Images | None = None) -> Images:
    """x' = a·x + b·x0 + c·past in float32; ``past`` is what :func:`history` makes."""
    after = np.float32(row.a) * x + np.float32(row.b) * x0
    if row.c and past is not None:
        after += np.float32(row.c) * past
    return after


@dataclass(frozen=True)
class State:
    """The trajectory after ``step`` steps; x0 is the prediction that led here (None at 0).

    x0_prev is the prediction before that; None where there is none.
    """

    step: int
    x: Images
    x0: Images | None
    x0_prev: Images | None = None


def check_schedule(denoiser: Denoiser, schedule: Schedule) -> None:
    """Refuse a schedule that the denoiser's graphs do not hold."""
    held = denoiser.schedule
    if held is not None and held != schedule:
        raise UsageError(
            f"this export holds the steps of {held.describe()}, not {schedule.describe()}: ask for "
            "those, or export again with other --solver, --steps or --shift"
        )


def trajectory(
    denoiser: Denoiser, noise: Images, schedule: Schedule, indices: Sequence[int] | None = None
) -> Iterator[State]:
    """Sample, yielding every state, the noise first.

    A denoiser with the whole trajectory in one graph yields the noise and the end.

    Args:
        denoiser: steps through ``schedule``.
        noise: float32 [B, C, S, S].
        schedule: the steps.
        indices: the images' numbers for messages; 0 to B−1 by default.

    Raises:
        UsageError: the denoiser holds other steps than ``schedule``.
        NonFiniteError: NaN or Inf in a state; names the step and the image.
    """
    names = range(len(noise)) if indices is None else indices
    check_schedule(denoiser, schedule)
    yield State(0, noise, None)
    if denoiser.whole_trajectory:
        x = denoiser.run(noise)
        require_finite(x, schedule.steps, names)
        yield State(schedule.steps, x, None)
        return
    yield from resume(denoiser, State(0, noise, None), schedule, names)


def resume(
    denoiser: Denoiser, state: State, schedule: Schedule, indices: Sequence[int]
) -> Iterator[State]:
    """The states that follow ``state``, step by step.

    Args:
        denoiser: takes single steps.
        state: from a trajectory whose first ``state.step`` rows were those of ``schedule``.
        schedule: the steps.
        indices: the images' numbers for messages.
    """
    for row in schedule.rows[state.step :]:
        x, x0 = denoiser.step(state.x, row, history(row, state.x0, state.x0_prev))
        state = State(state.step + 1, x, x0, state.x0)
        require_finite(x, state.step, indices)
        yield state


def require_finite(x: Images, step: int, indices: Sequence[int]) -> None:
    """Raise a NonFiniteError that names the step and the first image with NaN or Inf."""
    # A sum is not finite when any term is not; one pass, no temporary array.
    with np.errstate(invalid="ignore"):  # Inf − Inf is what it looks for
        total = x.sum(dtype=np.float64)
    if not np.isfinite(total):
        bad = np.flatnonzero(~np.isfinite(x).all(axis=(1, 2, 3)))
        if len(bad):
            raise NonFiniteError(
                f"NaN or Inf after step {step} in image {indices[int(bad[0])]}; "
                "`lutdeploy parity` shows where the model and its export part"
            )


def finished_batches(
    denoiser: Denoiser, batches: Iterable[Batch], schedule: Schedule, pixels: bool = False
) -> Iterator[Finished]:
    """The end of every batch's trajectory, in order, by the denoiser's own way if it has one.

    Args:
        denoiser: what walks.
        batches: indices and noise float32 [n, C, S, S] of each.
        schedule: the steps.
        pixels: uint8 pictures are welcome; only a :class:`StreamingDenoiser` makes them.

    Raises:
        UsageError, NonFiniteError: as :func:`trajectory`.
    """
    if isinstance(denoiser, StreamingDenoiser):
        check_schedule(denoiser, schedule)
        yield from denoiser.stream(batches, schedule, pixels)
        return
    for indices, noise in batches:
        for state in trajectory(denoiser, noise, schedule, indices):
            last = state.x
        yield indices, last


def sample(
    denoiser: Denoiser,
    n: int,
    seed: int = 0,
    steps: int | None = None,
    solver: str | None = None,
    batch: int = 64,
    noise: Images | None = None,
    shift: float | None = None,
    schedule: Schedule | None = None,
) -> Images:
    """Sample n images. Image i depends on (seed, i) alone, never on ``batch``.

    Args:
        denoiser: from :func:`lutdeploy.load`.
        n: number of images, at least 1.
        seed: of the noise, in [0, 2^64).
        steps, solver, shift: the schedule; by default the export's own where it holds
            one, else 64 steps of "euler" at shift 1.
        batch: images per pass, at least 1.
        noise: float32 [n, C, S, S] to start from instead of the seed's.
        schedule: all of the steps at once, such as a fitted schedule, instead of the three.

    Returns:
        float32 [n, C, S, S], about [−1, 1], not clipped.

    Raises:
        UsageError: impossible n, batch, noise shape, or steps the export does not hold.
        NonFiniteError: NaN or Inf on the way.
    """
    shape = denoiser.config.image_shape
    if n < 1 or batch < 1:
        raise UsageError(f"n and batch must be at least 1, not n={n}, batch={batch}")
    if noise is not None and noise.shape != (n, *shape):
        raise UsageError(f"noise must have shape {(n, *shape)}, not {noise.shape}")
    if schedule is None:
        schedule = ScheduleRequest(solver, steps, shift).resolve(denoiser.schedule)
    elif (steps, solver, shift) != (None, None, None):
        raise UsageError("table says solver, steps and shift; give either")
    check_schedule(denoiser, schedule)
    batches = (
        noise_batches(seed, range(n), batch, shape)
        if noise is None
        else given_batches(noise, batch)
    )
    images = np.empty((n, *shape), np.float32)
    for indices, ends in finished_batches(denoiser, batches, schedule):
        images[indices[0] : indices[-1] + 1] = ends
    return images
