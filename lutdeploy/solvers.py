"""Time grids and step tables. A solver is nothing but a table of (t, a, b, c).

Every solver of dx/dt = (x0 − x)/(1 − t) that predicts x0 is linear in what it has seen
(spec "Sampling"), so one step of any of them is x' = a·x + b·x0 + c·x0_prev.
All arithmetic here is float64 and pure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lutdeploy.errors import ConfigError


@dataclass(frozen=True)
class Step:
    """One row: evaluate the network at t, then x' = a·x + b·x0 + c·x0_prev."""

    t: float
    a: float
    b: float
    c: float


@dataclass(frozen=True)
class StepTable:
    """A whole trajectory: the solver's name, the shift of its time grid, and its rows."""

    solver: str
    shift: float
    rows: tuple[Step, ...]

    @property
    def steps(self) -> int:
        """Network evaluations (NFE)."""
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; floats survive exactly."""
        rows = [[row.t, row.a, row.b, row.c] for row in self.rows]
        return {"solver": self.solver, "shift": self.shift, "rows": rows}

    @classmethod
    def from_dict(cls, values: Any) -> StepTable:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: not such a table.
        """
        try:
            rows = tuple(Step(*(float(v) for v in row)) for row in values["rows"])
            return cls(str(values["solver"]), float(values["shift"]), rows)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a solver table: {error}") from error

    def describe(self) -> str:
        """For people and folder names: ``euler-64``, ``dpmpp-2m-16-shift2``."""
        suffix = "" if self.shift == 1 else f"-shift{self.shift:g}"
        return f"{self.solver}-{self.steps}{suffix}"


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """t_0 = 0 … t_steps = 1, uniform, then warped by t ↦ s·t/(1 + (s−1)·t).

    Raises:
        ConfigError: steps < 1, or shift not a positive number of a sane size.
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, not {steps}")
    if not (shift > 0 and math.isfinite(shift)):
        raise ConfigError(f"shift must be a positive number, not {shift}")
    uniform = (k / steps for k in range(steps))
    # The end is exact: rounding past 1 would make the last step overshoot x0.
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


def _dpmpp_2m(grid: list[float]) -> list[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022), λ = ln(t/(1−t)); first order where h_prev or h is ∞.

    That is on the first step, the second (whose h_prev is infinite) and the last.
    """
    rows = _euler(grid)
    log_snr = [math.log(t / (1 - t)) if 0 < t < 1 else math.nan for t in grid]  # λ
    for k in range(2, len(rows) - 1):
        t, t_next = grid[k], grid[k + 1]
        h, h_prev = log_snr[k + 1] - log_snr[k], log_snr[k] - log_snr[k - 1]
        r = h_prev / h
        e = t_next * -math.expm1(-h)  # E
        rows[k] = Step(t, (1 - t_next) / (1 - t), e * (1 + 1 / (2 * r)), -e / (2 * r))
    return rows


SOLVERS: dict[str, Callable[[list[float]], list[Step]]] = {"euler": _euler, "dpmpp-2m": _dpmpp_2m}


def step_table(solver: str = "euler", steps: int = 64, shift: float = 1.0) -> StepTable:
    """The table of a solver over a shifted uniform grid.

    Raises:
        ConfigError: unknown solver, steps < 1, or shift not positive.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"no solver {solver!r}; there are {', '.join(SOLVERS)}")
    return StepTable(solver, float(shift), tuple(SOLVERS[solver](time_grid(steps, shift))))
