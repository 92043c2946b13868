"""Time grids and schedules. A schedule is a table of (t, a, b, c, d).

Every solver of dx/dt = (x0 − x)/(1 − t) that predicts x0 is linear in the states and predictions
so far (spec "Sampling"), so one step of any of them is
x' = a·x + b·x0 + c·x0_prev + d·x0_prev2. A formula gives the numbers, or they are fitted to a
model (`lutdeploy tune-steps`). All arithmetic here is float64. docs/solvers.md derives the
formulas.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from lutdeploy.errors import ConfigError, UsageError

GRIDS = ("uniform", "tuned")  # equal steps, warped by a shift; times found for one model
FITTED = "fitted"  # the "solver" whose rows were fitted to a model
DISTILLED = "distilled"  # the "solver" whose rows a model learnt to follow, and no others


class Step(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Evaluate the network at t, then x' = a·x + b·x0 + c·x0_prev + d·x0_prev2."""

    t: float
    a: float
    b: float
    c: float
    d: float = 0.0

    def __post_init__(self) -> None:
        if self.d and not self.c:  # no graph could be given d, see history_ratio
            raise ConfigError(f"step at t = {self.t:g} has d = {self.d:g} but c = 0")

    @property
    def history_ratio(self) -> float:
        """d/c. Graphs have one history term, c·(x0_prev + d/c·x0_prev2)."""
        return self.d / self.c if self.d else 0.0


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A whole trajectory: a row of coefficients for each network evaluation."""

    solver: str
    shift: float  # of a uniform time grid; 1 for a tuned one
    rows: tuple[Step, ...]
    grid: str = "uniform"

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise ConfigError(f"no grid {self.grid!r}; there are {', '.join(GRIDS)}")

    @property
    def steps(self) -> int:
        """Network evaluations (NFE)."""
        return len(self.rows)

    @property
    def times(self) -> tuple[float, ...]:
        """t_0 = 0 … t_steps = 1."""
        return (*(row.t for row in self.rows), 1.0)

    def describe(self) -> str:
        """For people and folder names: ``euler-64``, ``dpmpp-2m-16-shift2``, ``fitted-4``.

        Exports of earlier versions may hold a solver over tuned times: ``dpmpp-2m-16-tuned``.
        """
        suffix = "" if self.shift == 1 else f"-shift{self.shift:g}"
        if self.grid != "uniform" and self.solver not in (FITTED, DISTILLED):
            suffix = f"-{self.grid}"
        return f"{self.solver}-{self.steps}{suffix}"


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """t_0 = 0 … t_steps = 1: uniform, then warped by t ↦ s·t/(1 + (s−1)·t)."""
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, not {steps}")
    if not (shift > 0 and math.isfinite(shift)):
        raise ConfigError(f"shift must be a positive number, not {shift}")
    uniform = (k / steps for k in range(steps))
    # The end is set to 1: rounded to more, it would make the last step overshoot x0.
    grid = [*(shift * u / (1 + (shift - 1) * u) for u in uniform), 1.0]
    if any(t >= t_next for t, t_next in itertools.pairwise(grid)):
        raise ConfigError(f"shift {shift:g} leaves no time between some of {steps} steps")
    return grid


def _euler(grid: list[float]) -> list[Step]:
    """Euler (= DDIM on this path): a = (1−t')/(1−t), b = 1 − a, c = 0."""
    rows = []
    for t, t_next in itertools.pairwise(grid):
        a = (1 - t_next) / (1 - t)
        rows.append(Step(t, a, 1 - a, 0.0))
    return rows


def _log_snr(grid: list[float]) -> list[float]:
    """λ = ln(t/(1−t)); NaN at the ends, where it is infinite."""
    return [math.log(t / (1 - t)) if 0 < t < 1 else math.nan for t in grid]


def _dpmpp_2m(grid: list[float]) -> list[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022), λ = ln(t/(1−t)).

    It is first order where h or h_prev is infinite: on the first step, the second and the last.
    """
    rows, log_snr = _euler(grid), _log_snr(grid)
    for k in range(2, len(rows) - 1):
        t, t_next = grid[k], grid[k + 1]
        h, h_prev = log_snr[k + 1] - log_snr[k], log_snr[k] - log_snr[k - 1]
        r = h_prev / h
        e = t_next * -math.expm1(-h)  # E
        rows[k] = Step(t, (1 - t_next) / (1 - t), e * (1 + 1 / (2 * r)), -e / (2 * r))
    return rows


def _moments(h: float) -> tuple[float, float, float]:
    """m_n = ∫_0^1 h·e^(−h(1−s))·s^n ds for n = 0, 1, 2."""
    # Integration by parts loses digits for small h; the series Σ_k h·(−h)^k·n!/(n+k+1)! does not.
    if h < 0.5:
        series = []
        for n in range(3):
            term, total = h / (n + 1), 0.0
            for k in range(30):
                total += term
                term *= -h / (n + k + 2)
            series.append(total)
        return series[0], series[1], series[2]
    m0 = -math.expm1(-h)
    m1 = 1 - m0 / h
    return m0, m1, 1 - 2 * m1 / h


def _dpmpp_3m(grid: list[float]) -> list[Step]:
    """DPM-Solver++ multistep, third order (Lu et al. 2022, k = 3).

    x' = (1−t')/(1−t)·x + t'·∫ e^(λ−λ')·p(λ) dλ over the step, where p is the parabola through
    the last three x0. The first two steps and the last are first order, and the third is second
    order, because λ is infinite at both ends.
    """
    rows, log_snr = _dpmpp_2m(grid), _log_snr(grid)
    for k in range(3, len(rows) - 1):
        t, t_next = grid[k], grid[k + 1]
        h = log_snr[k + 1] - log_snr[k]
        r0 = (log_snr[k] - log_snr[k - 1]) / h
        r1 = (log_snr[k - 1] - log_snr[k - 2]) / h
        m0, m1, m2 = _moments(h)
        # p(s) = x0 + D1·s + D2·s·(s + r0), s = 0 … 1 over the step, with the divided differences
        # D1 = (x0 − x0_prev)/r0 and D2 = (D1 − (x0_prev − x0_prev2)/r1)/(r0 + r1). Its integral
        # weights D1 by ``first`` and (r0 + r1)·D2 by ``second``.
        first = t_next * m1
        second = t_next * (m2 + r0 * m1) / (r0 + r1)
        b = t_next * m0 + first / r0 + second / r0
        c = -first / r0 - second * (1 / r0 + 1 / r1)
        rows[k] = Step(t, (1 - t_next) / (1 - t), b, c, second / r1)
    return rows


SOLVERS: dict[str, Callable[[list[float]], list[Step]]] = {
    "euler": _euler,
    "dpmpp-2m": _dpmpp_2m,
    "dpmpp-3m": _dpmpp_3m,
}


def _require_solver(solver: str) -> None:
    if solver not in SOLVERS:
        raise ConfigError(f"no solver {solver!r}; there are {', '.join(SOLVERS)}")


def solver_schedule(solver: str = "euler", steps: int = 64, shift: float = 1.0) -> Schedule:
    """The schedule of a solver over a shifted uniform grid."""
    _require_solver(solver)
    return Schedule(solver, float(shift), tuple(SOLVERS[solver](time_grid(steps, shift))))


def fitted_schedule(rows: Sequence[Step]) -> Schedule:
    """The schedule of rows that were fitted to a model.

    Raises:
        ConfigError: times that do not rise from 0 below 1, or a row that is not finite.
    """
    times = [*(row.t for row in rows), 1.0]
    rising = all(t < t_next for t, t_next in itertools.pairwise(times))
    if len(times) < 2 or times[0] != 0 or not rising:
        raise ConfigError(f"times must rise from 0 to 1, not {', '.join(f'{t:g}' for t in times)}")
    if not all(math.isfinite(value) for row in rows for value in (row.a, row.b, row.c, row.d)):
        raise ConfigError("a fitted step is not finite")
    return Schedule(FITTED, 1.0, tuple(rows), "tuned")


@dataclass(frozen=True)
class ScheduleRequest:
    """The schedule that somebody asks for; None where nothing was said."""

    solver: str | None = None  # one of SOLVERS, or FITTED
    steps: int | None = None
    shift: float | None = None

    def resolve(
        self, held: Schedule | None = None, fitted: Callable[[], Sequence[Schedule]] = tuple
    ) -> Schedule:
        """Find the schedule; what was not said is as in ``held``, else 64 steps of "euler".

        Args:
            held: the only schedule that a denoiser can follow, if that is so, or that its model
                was distilled to.
            fitted: gives the model's fitted schedules, the best first; called only when one
                is asked for.

        Raises:
            UsageError: no such fitted schedule, with those there are; a shift of a fitted one;
                another one than a distilled model's.
            ConfigError: as :func:`solver_schedule`.
        """
        if held is not None and held.grid == "tuned" and self.shift is None:
            if self.solver in (None, held.solver) and self.steps in (None, held.steps):
                return held
        if held is not None and held.solver == DISTILLED:
            raise UsageError(
                f"the model was distilled to {held.steps} steps and has learnt no other times: "
                "leave out --solver, --steps and --shift, or take the model it was distilled from"
            )
        solver = self.solver or (held.solver if held else "euler")
        if solver == FITTED:
            return self._choose(fitted())
        steps = self.steps if self.steps is not None else (held.steps if held else 64)
        shift = self.shift if self.shift is not None else (held.shift if held else 1.0)
        return solver_schedule(solver, steps, shift)

    def _choose(self, fitted: Sequence[Schedule]) -> Schedule:
        """The first of ``fitted`` that has the steps asked for."""
        if self.shift is not None:
            raise UsageError("--shift warps a uniform grid; a fitted schedule has its own times")
        for found in fitted:
            if self.steps in (None, found.steps):
                return found
        counts = ", ".join(str(steps) for steps in sorted({found.steps for found in fitted}))
        there = f"there are some of {counts} steps" if counts else "this model has none"
        asked = f" of {self.steps} steps" if self.steps is not None else ""
        command = f"lutdeploy tune-steps --steps {self.steps}" if asked else "lutdeploy tune-steps"
        raise UsageError(f"no fitted schedule{asked}; {there}; `{command}` fits one")
