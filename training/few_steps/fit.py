"""Fitting a schedule to a model: few steps that end where 256 Euler steps end.

Every step is x' = a·x + b·x0 + c·x0_prev + d·x0_prev2, so times and coefficients can be fitted
instead of derived (bespoke non-stationary solvers, Shaul et al. 2024). That is done in two stages:

1. Per step, least squares against the reference's state at the step's end, along the schedule's
   own rollout, over a few families of times (:func:`start`).
2. Levenberg–Marquardt (Marquardt 1963) over all times and coefficients together (:func:`polish`).
   Finite differences make the Jacobian: moving row k leaves the states before it alone, so a
   column costs the evaluations after row k, and any backend will do.

Its residual is the difference at the end, and what independent errors of PREDICTION_ERROR in every
prediction would add to it; without that, fits find rows such as 200·x0 − 199·x0_prev, by which half
precision or int8 would multiply its errors. Residuals that ask for the reference's sharpness as
well make textures of the right strength and the wrong shape, and lost (docs/solvers.md).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lutdeploy.artefacts.tuned_steps import KnownDenoiser
from lutdeploy.errors import ConfigError, UsageError
from lutdeploy.sampling import Denoiser, Images, State, follow, history, in_batches, trajectory
from lutdeploy.schedule import Schedule, Step, fitted_schedule, solver_schedule, time_grid

REFERENCE = solver_schedule("euler", 256)
PREDICTION_ERROR = 0.01  # RMS of one x0, about what bfloat16 makes of the embedded model
FIRST_LOGITS, LAST_LOGITS = (-4.0, -3.0, -2.0), (2.0, 3.0, 4.0, 5.0)  # of the inner times
SEGMENT_LOGITS = (4.0, 5.0, 6.0)  # of the times next to 0 and 1, where a fit is in segments
START_IMAGES = 6  # for choosing among those
TIME_PROBE = 0.05  # of the smaller neighbouring increment; finite differences over rounding noise
PROBE = 3e-3  # of a coefficient
LARGEST_MOVE = 1.0  # of a log-increment in one iteration
JACOBIAN_WORK = 2000  # network evaluations; more steps are polished on fewer images
FEWEST_IMAGES = 6
ITERATIONS = 5
WORTH = 2e-2  # relative gain of an iteration under which a fit ends
SMALLEST_C = 1e-3  # of |d|: a graph gets d/c

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """The same noise for every schedule, and the states of the reference trajectory from it."""

    denoiser: Denoiser
    states: NDArray[np.float16]  # [257, n, C, S, S]
    end: Images  # [n, C, S, S]: the last of them, unrounded
    batch: int
    on_work: Callable[[int], None]  # told of every network evaluation: images

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        noise: Images,
        batch: int = 64,
        on_work: Callable[[int], None] = lambda images: None,
    ) -> Problem:
        """Walk the reference trajectory of ``noise`` [n, C, S, S].

        Raises:
            NonFiniteError: NaN or Inf on the way.
        """
        states = np.empty((REFERENCE.steps + 1, *noise.shape), np.float16)
        end = np.empty_like(noise)
        for part in in_batches(range(len(noise)), batch):
            rows = slice(part[0], part[-1] + 1)
            for state in trajectory(denoiser, noise[rows], REFERENCE, part):
                states[state.step, rows] = state.x
                on_work(len(part) if state.step else 0)
            end[rows] = state.x
        return cls(denoiser, states, end, batch, on_work)

    def first(self, images: int) -> Problem:
        """The same with fewer images."""
        few = self.states[:, :images], self.end[:images]
        return Problem(self.denoiser, *few, self.batch, self.on_work)

    def at(self, t: float) -> Images:
        """The reference's state at any time: Euler steps are straight."""
        if t >= 1:
            return self.end
        step, share = divmod(t * REFERENCE.steps, 1)
        before, after = (self.states[int(step) + k].astype(np.float32) for k in (0, 1))
        return before + np.float32(share) * (after - before)

    def predict(self, x: Images, t: float) -> Images:
        """x0 at (x, t)."""
        x0 = np.empty_like(x)
        for part in in_batches(range(len(x)), self.batch):
            rows = slice(part[0], part[-1] + 1)
            x0[rows] = self.denoiser.predict_x0(x[rows], np.full(len(part), t, np.float32))
            self.on_work(len(part))
        return x0

    def begin(self) -> State:
        """The noise."""
        return State(0, self.at(0.0), None)

    def walk(self, rows: Sequence[Step], state: State) -> Iterator[State]:
        """The states that follow ``state``, after ``state.step`` of the rows."""
        for row in rows[state.step :]:
            state = advance(row, state, self.predict(state.x, row.t))
            yield state

    def error(self, schedule: Schedule) -> float:
        """RMS, over all pixels, between the ends of a schedule and of the reference."""
        *_, last = self.walk(schedule.rows, self.begin())
        return float(np.sqrt(np.square(last.x - self.end, dtype=np.float64).mean()))


def require_steps(engine: KnownDenoiser) -> None:
    """Refuse an engine that cannot take any step.

    Raises:
        UsageError: says what to do.
    """
    if engine.schedule is not None:
        raise UsageError(
            f"export {engine.identity['export']} holds {engine.schedule.describe()} alone; "
            "name a step export with --export, or use --backend torch"
        )


def advance(row: Step, state: State, x0: Images) -> State:
    """The state after a row, whose prediction is ``x0``."""
    x = follow(row, state.x, x0, history(row, state.x0, state.x0_prev))
    return State(state.step + 1, x, x0, state.x0)


def free(k: int, steps: int, segment: int | None = None) -> str:
    """The coefficients of row k that are fitted; the last keeps nothing of the noise in x.

    The history begins anew every ``segment`` rows, if that is given.
    """
    history_terms = "cd"[: min(k % segment if segment else k, 2)]
    return ("b" if k == steps - 1 else "ab") + history_terms


def fitted(row: Step) -> str:
    """The coefficients of a row that :func:`least_squares` fitted; it leaves the others at 0.

    b is fitted in every row, and may come out as 0.
    """
    return "".join(name for name in "abcd" if name == "b" or getattr(row, name))


def _step(t: float, coefficients: dict[str, float]) -> Step:
    """A row; what is not given is 0."""
    row = {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0, **coefficients}
    least = SMALLEST_C * abs(row["d"])
    if abs(row["c"]) < least:
        row["c"] = float(np.copysign(least, row["c"]))
    return Step(t, **row)


def least_squares(
    problem: Problem, times: Sequence[float], segment: int | None = None
) -> tuple[list[Step], Images]:
    """Rows for given times, each the best that leads to the reference's next state; their end.

    Args:
        problem: the images.
        times: t_0 = 0 < … < t_steps = 1.
        segment: rows after which the history begins anew.
    """
    rows: list[Step] = []
    state = problem.begin()
    for k, (t, t_next) in enumerate(itertools.pairwise(times)):
        x0 = problem.predict(state.x, t)
        known: dict[str, Any] = {"a": state.x, "b": x0, "c": state.x0, "d": state.x0_prev}
        names = free(k, len(times) - 1, segment)
        terms = np.stack([np.ravel(known[name]) for name in names])
        gram = (terms @ terms.T).astype(np.float64) / terms.shape[1]
        gram += np.diag([0.0 if name == "a" else PREDICTION_ERROR**2 for name in names])
        slope = (terms @ problem.at(t_next).ravel()).astype(np.float64) / terms.shape[1]
        rows.append(
            _step(t, dict(zip(names, map(float, np.linalg.solve(gram, slope)), strict=True)))
        )
        state = advance(rows[-1], state, x0)
    return rows, state.x


def start(problem: Problem, steps: int) -> list[Step]:
    """Rows by least squares, over the best of some times whose logits are evenly spaced."""
    few = problem.first(START_IMAGES)
    best, lowest = time_grid(steps), np.inf
    for first, last in itertools.product(FIRST_LOGITS, LAST_LOGITS):
        times = [0.0, *(1 / (1 + np.exp(-np.linspace(first, last, steps - 1)))).tolist(), 1.0]
        _, end = least_squares(few, times)
        error = float(np.square(end - few.end).mean())
        if error < lowest:
            best, lowest = times, error
    return least_squares(problem, best)[0]


def _residual(problem: Problem, end: Images, rows: Sequence[Step]) -> NDArray[np.float32]:
    """What a fit makes small: float32 [N + 3·steps], of an end and the rows that led there."""
    difference = (end - problem.end).ravel() / np.float32(np.sqrt(end.size))
    weights = [weight for row in rows for weight in (row.b, row.c, row.d)]
    return np.concatenate((difference, PREDICTION_ERROR * np.array(weights)), dtype=np.float32)


def _moves(rows: Sequence[Step]) -> Iterator[tuple[int, str, float]]:
    """What is fitted: row, name, and how far a finite difference moves it; times come first."""
    steps, times = len(rows), [*(row.t for row in rows), 1.0]
    for k in range(1, steps):
        yield k, "t", TIME_PROBE * min(times[k] - times[k - 1], times[k + 1] - times[k])
    for k in range(steps):
        yield from ((k, name, PROBE) for name in fitted(rows[k]))


def _jacobian_work(steps: int) -> int:
    """Network evaluations of a Jacobian, for each image."""
    in_rows = sum(len(free(k, steps)) * (steps - 1 - k) for k in range(steps))
    return steps * (steps - 1) // 2 + in_rows


def polished_on(steps: int, images: int) -> int:
    """How many of the images a polish takes."""
    return min(images, max(FEWEST_IMAGES, JACOBIAN_WORK // max(_jacobian_work(steps), 1)))


def segments_work(segments: int, rows: int, images: int) -> int:
    """Network evaluations of :func:`fit_segments`, at most about."""
    steps = segments * rows
    iteration = (_jacobian_work(steps) + steps) * polished_on(steps, images)
    tried = (len(SEGMENT_LOGITS) + 1) * steps * images
    return work(segments, images) + tried + ITERATIONS * iteration


def work(steps: int, images: int) -> int:
    """Network evaluations of one fit, at most about."""
    families = len(FIRST_LOGITS) * len(LAST_LOGITS)
    iteration = (_jacobian_work(steps) + steps) * polished_on(steps, images)
    return families * steps * START_IMAGES + ITERATIONS * iteration


def _jacobian(problem: Problem, rows: list[Step], states: list[State]) -> NDArray[np.float32]:
    """∂residual/∂(times, coefficients), [what :func:`_moves` lists, residual]."""
    here = _residual(problem, states[-1].x, rows)
    columns = []
    for k, name, probe in _moves(rows):
        moved = list(rows)
        moved[k] = msgspec.structs.replace(rows[k], **{name: getattr(rows[k], name) + probe})
        state, x0 = states[k], states[k + 1].x0
        if name == "t":
            x0 = problem.predict(state.x, moved[k].t)
        assert x0 is not None
        after = advance(moved[k], state, x0)
        *_, last = (after, *problem.walk(moved, after))
        columns.append((_residual(problem, last.x, moved) - here) / np.float32(probe))
    return np.stack(columns)


def _moved(rows: list[Step], change: Vector) -> list[Step]:
    """Rows whose log-increments of time, then coefficients, are changed."""
    steps = len(rows)
    increments = np.diff([*(row.t for row in rows), 1.0]) * np.exp(change[:steps])
    times = [0.0, *np.cumsum(increments / increments.sum())[:-1].tolist()]
    changes = iter(change[steps:].tolist())
    return [
        _step(t, {name: getattr(row, name) + next(changes) for name in fitted(row)})
        for t, row in zip(times, rows, strict=True)
    ]


def polish(
    problem: Problem,
    rows: list[Step],
    watch: Callable[[float], None] = lambda cost: None,
) -> list[Step]:
    """Rows of a smaller residual, by Levenberg–Marquardt over the log-increments and coefficients.

    Args:
        problem: the images.
        rows: where it begins.
        watch: told of the root of the summed squares after each iteration.
    """
    steps, damping = len(rows), 1e-3
    states = [problem.begin(), *problem.walk(rows, problem.begin())]
    found = _residual(problem, states[-1].x, rows)
    cost = float(found @ found)
    for _ in range(ITERATIONS):
        jacobian = _jacobian(problem, rows, states)
        to_parameters = _log_increments(rows, len(jacobian))
        gram = to_parameters.T @ (jacobian @ jacobian.T).astype(np.float64) @ to_parameters
        slope = to_parameters.T @ (jacobian @ found).astype(np.float64)
        before = cost
        while cost == before and damping < 1e3:
            scale = np.diag(np.diag(gram) + 1e-9 * np.trace(gram) / len(gram))
            solved = np.linalg.lstsq(gram + damping * scale, slope, rcond=None)[0]
            change = -np.asarray(solved, np.float64)
            change *= min(1.0, LARGEST_MOVE / max(np.abs(change[:steps]).max(), 1e-12))
            trial = _moved(rows, change)
            try:
                fitted_schedule(trial)
                walked = [problem.begin(), *problem.walk(trial, problem.begin())]
            except ConfigError:  # no time left between steps
                damping *= 8
                continue
            there = _residual(problem, walked[-1].x, trial)
            if float(there @ there) < cost:
                rows, states, found, cost = trial, walked, there, float(there @ there)
                damping = max(damping / 8, 1e-7)
                watch(cost**0.5)
            else:
                damping *= 8
        if cost > before * (1 - WORTH):
            break
    return rows


def _log_increments(rows: Sequence[Step], moves: int) -> Vector:
    """∂(inner times, coefficients)/∂(log-increments, coefficients), [moves, moves + 1]."""
    steps = len(rows)
    times = np.array([*(row.t for row in rows), 1.0])
    below = np.arange(steps) <= np.arange(steps - 1)[:, None]
    matrix = np.zeros((moves, moves + 1))
    matrix[: steps - 1, :steps] = (below - times[1:-1, None]) * np.diff(times)
    matrix[steps - 1 :, steps:] = np.eye(moves - steps + 1)
    return matrix


def fit(
    problem: Problem, steps: int, watch: Callable[[float], None] = lambda cost: None
) -> Schedule:
    """The schedule of so many steps that fits the model best.

    Raises:
        ConfigError: what was found is not finite.
    """
    rows = start(problem, steps)
    few = problem.first(polished_on(steps, len(problem.end)))
    return fitted_schedule(polish(few, rows, watch=watch))


def fit_segments(problem: Problem, segments: int, rows: int) -> Schedule:
    """A schedule that can begin anywhere at a segment's start, where its history begins anew.

    The segments start at the times of the fit of as many steps. Each gets ``rows`` rows, which are
    evenly spaced in logits before they are fitted.

    Raises:
        ConfigError: what was found is not finite.
    """
    inner = [math.log(row.t / (1 - row.t)) for row in fit(problem, segments).rows[1:]]
    nodes, at = range(segments + 1), np.arange(1, segments * rows) / rows
    best, lowest = [0.0, *at.tolist(), 1.0], math.inf
    for ends in SEGMENT_LOGITS:
        logits = np.interp(at, nodes, [-ends, *inner, ends])
        times = [0.0, *(1 / (1 + np.exp(-logits))).tolist(), 1.0]
        _, end = least_squares(problem, times, rows)
        error = float(np.square(end - problem.end).mean())
        if error < lowest:
            best, lowest = times, error
    few = problem.first(polished_on(segments * rows, len(problem.end)))
    return fitted_schedule(polish(few, least_squares(problem, best, rows)[0]))
