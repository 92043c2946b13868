"""Searching time grids: fewer steps that end where very many Euler steps end.

The measure is the RMS, over all pixels of all images, between the end of a schedule's
trajectory and the end of the reference trajectory from the same noise. For tuned grids it is
minimised by Levenberg–Marquardt (Marquardt 1963) over the logarithms of the K time
increments, so that times always rise and their ends are exact. The Jacobian is taken by
finite differences of the K−1 inner times; moving t_k leaves the states before it alone, so
each column resumes there and costs half a trajectory on average. Learning the times from the
solver's own endpoint is what LD3 does by gradients (Tong et al. 2024); so few unknowns need
none, and any backend will do. Everything is deterministic.

In exact arithmetic two evaluations at nearly the same time are a good derivative, and a search
finds that: rows such as 200·x0 − 199·x0_prev, by which half precision or int8 would multiply its
errors. So the cost has a second term, what predictions with independent errors of PREDICTION_ERROR
add: its square times b² + c² + d², summed over the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lutdeploy.errors import ConfigError, NonFiniteError
from lutdeploy.sampling import Denoiser, Images, State, finished_batches, given_batches, resume
from lutdeploy.schedule import Schedule, solver_schedule, time_grid, tuned_schedule

REFERENCE = solver_schedule("euler", 256)
SHIFT_OCTAVES = 4.0  # shifts from 1/16 to 16
PROBE = 0.1  # of the smaller neighbouring increment: a finite difference over rounding noise
LARGEST_MOVE = 1.0  # of a log-increment in one iteration
PREDICTION_ERROR = 0.01  # RMS of one x0, about what bfloat16 makes of the embedded model
WORTH = 2e-3  # relative gain of an iteration under which the search ends

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """A schedule and its RMS to the reference on the noise that it was searched with."""

    schedule: Schedule
    rms: float


class Problem:
    """The same noise for every schedule, and where the reference ends.

    Args:
        denoiser: follows any schedule.
        noise: float32 [n, C, S, S].
        batch: images per pass.
        reference: the trajectory to end like; by default 256 Euler steps.

    Raises:
        NonFiniteError: NaN or Inf in the reference trajectory.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        noise: Images,
        batch: int = 64,
        reference: Schedule | None = None,
    ) -> None:
        self.denoiser, self.noise, self.batch = denoiser, noise, batch
        self.reference = reference or REFERENCE
        self.passes = 0  # network evaluations of all the noise
        self.target = self.end(self.reference)
        self._known: dict[Schedule, float] = {}

    def end(self, schedule: Schedule) -> Images:
        """Where a schedule's trajectories end, float32 [n, C, S, S].

        Raises:
            NonFiniteError: NaN or Inf on the way.
        """
        batches = given_batches(self.noise, self.batch)
        parts = [images for _, images in finished_batches(self.denoiser, batches, schedule)]
        self.passes += schedule.steps
        return np.concatenate(parts).astype(np.float32, copy=False)

    def rms(self, schedule: Schedule) -> float:
        """To the reference; infinite where a trajectory is not finite."""
        if schedule not in self._known:
            try:
                self._known[schedule] = rms(self.end(schedule), self.target)
            except NonFiniteError:
                self._known[schedule] = math.inf
        return self._known[schedule]

    def cost(self, schedule: Schedule) -> float:
        """What a search minimises: the RMS, and what imprecise predictions would add to it."""
        return math.hypot(self.rms(schedule), *_added_errors(schedule))

    def states(self, schedule: Schedule, start: State) -> list[State]:
        """``start`` and all that follow it.

        Raises:
            NonFiniteError: NaN or Inf on the way.
        """
        following = list(resume(self.denoiser, start, schedule, range(len(self.noise))))
        self.passes += len(following)
        return [start, *following]


def rms(candidate: Images, reference: Images) -> float:
    """Root of the mean squared difference, in float64."""
    return math.sqrt(float(np.square(candidate - reference, dtype=np.float64).mean()))


def _added_errors(schedule: Schedule) -> Vector:
    """What the predictions' errors add in each row, float64 [K]."""
    weights = np.array([(row.b, row.c, row.d) for row in schedule.rows])
    return PREDICTION_ERROR * np.linalg.norm(weights, axis=1)


def best_shift(problem: Problem, solver: str, steps: int) -> Found:
    """The best shift of the uniform grid: downhill from 1 by half, then by quarter octaves."""

    def value(octave: float) -> float:
        try:
            return problem.rms(solver_schedule(solver, steps, 2.0**octave))
        except ConfigError:  # so strong that no time is left between steps
            return math.inf

    best = 0.0
    for width in (0.5, 0.25):
        while True:
            near = [best, best - width, best + width]
            lowest = min((o for o in near if abs(o) <= SHIFT_OCTAVES), key=value)
            if lowest == best:
                break
            best = lowest
    return Found(solver_schedule(solver, steps, 2.0**best), value(best))


def resampled(times: Sequence[float], steps: int) -> list[float]:
    """The times of another number of steps along the same curve."""
    old = np.linspace(0, 1, len(times))
    inner = np.interp(np.linspace(0, 1, steps + 1)[1:-1], old, times)
    return [0.0, *map(float, inner), 1.0]


def tune(
    problem: Problem,
    solver: str,
    steps: int,
    starts: Iterable[Sequence[float]] = (),
    budget: int = 1000,
    watch: Callable[[Found], None] = lambda found: None,
) -> Found:
    """Search the times of a solver's steps.

    Args:
        problem: what they should end like.
        solver: its name.
        steps: K.
        starts: times to begin from, besides the uniform ones; the best of them is taken.
        budget: network evaluations of all the noise, after which the search ends.
        watch: told of what is best so far.

    Returns:
        The schedule of the least cost that was met, at worst the best start.
    """
    end = problem.passes + budget
    schedules = [tuned_schedule(solver, times) for times in (time_grid(steps), *starts)]
    best = min(schedules, key=problem.cost)
    cost, damping = problem.cost(best), 1e-2
    watch(Found(best, problem.rms(best)))
    if steps == 1 or not math.isfinite(cost):
        return Found(best, problem.rms(best))
    while problem.passes + steps * (steps + 3) // 2 < end:
        increments = np.diff(best.times)
        try:
            gram, slope = _normal_equations(problem, best)
        except NonFiniteError:  # so near to times that explode
            break
        move = _increments_to_times(increments)
        gram, slope = move.T @ gram @ move, move.T @ slope
        before = cost
        while cost == before and damping < 1e4 and problem.passes + steps <= end:
            scale = np.diag(np.diag(gram) + 1e-9 * np.trace(gram) / steps)
            change = -np.linalg.lstsq(gram + damping * scale, slope, rcond=None)[0]
            change *= min(1.0, LARGEST_MOVE / max(np.abs(change).max(), 1e-12))
            schedule = _from_increments(solver, increments * np.exp(change))
            if schedule is not None and problem.cost(schedule) < cost:
                best, cost = schedule, problem.cost(schedule)
                damping = max(damping / 5, 1e-6)
                watch(Found(best, problem.rms(best)))
            else:
                damping *= 5
        if cost > before * (1 - WORTH):
            break
    return Found(best, problem.rms(best))


def _from_increments(solver: str, increments: Vector) -> Schedule | None:
    """The schedule whose increments have these proportions; None where rounding leaves no time."""
    inner = np.cumsum(increments / increments.sum())[:-1]
    try:
        return tuned_schedule(solver, [0.0, *map(float, inner), 1.0])
    except (ConfigError, ZeroDivisionError, ValueError):
        return None


def _increments_to_times(increments: Vector) -> Vector:
    """∂t_k/∂ln Δ_j of the inner times, [K−1, K]: Δ_j where j ≤ k, less t_k·Δ_j."""
    times = np.cumsum(increments)[:-1]
    below = np.arange(len(increments)) <= np.arange(len(times))[:, None]
    return (below - times[:, None]) * increments


def _normal_equations(problem: Problem, schedule: Schedule) -> tuple[Vector, Vector]:
    """JᵀJ [K−1, K−1] and Jᵀr [K−1] of both terms of the cost over the inner times."""
    states = problem.states(schedule, State(0, problem.noise, None))
    end, added = states[-1].x, _added_errors(schedule)
    ends = np.empty((schedule.steps - 1, end.size), np.float32)
    errors = np.empty((schedule.steps - 1, schedule.steps))
    for k in range(1, schedule.steps):
        times = list(schedule.times)
        room = min(times[k] - times[k - 1], times[k + 1] - times[k])
        moved = []
        for probe in (PROBE * room, 1e-4 * room):
            times[k] = schedule.times[k] + probe
            moved.append(tuned_schedule(schedule.solver, times))
        ends[k - 1] = (problem.states(moved[0], states[k - 1])[-1].x - end).ravel() / (PROBE * room)
        errors[k - 1] = (_added_errors(moved[1]) - added) / (1e-4 * room)
    gram = (ends @ ends.T).astype(np.float64) / end.size + errors @ errors.T
    residual = (end - problem.target).ravel()
    slope = (ends @ residual).astype(np.float64) / end.size + errors @ added
    return gram, slope
