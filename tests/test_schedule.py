"""Step schedules: exact where they must be, of the order they claim."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutdeploy.errors import ConfigError
from lutdeploy.schedule import (
    SOLVERS,
    Schedule,
    Step,
    fitted_schedule,
    solver_schedule,
    time_grid,
)

NAN = math.nan
SCHEDULES = st.builds(
    solver_schedule,
    st.sampled_from(sorted(SOLVERS)),
    st.integers(1, 80),
    st.floats(0.2, 5.0),
)
# Times that rise from 0 to 1 however their increments fall out.
TIMES = st.lists(st.floats(1e-3, 1), min_size=1, max_size=20).map(
    lambda parts: [0.0, *(sum(parts[:k]) / sum(parts) for k in range(1, len(parts))), 1.0]
)


def over(solver: str, times: Sequence[float]) -> Schedule:
    """A solver over any times."""
    return Schedule(solver, 1.0, tuple(SOLVERS[solver](list(times))), "tuned")


TUNED = st.builds(over, st.sampled_from(sorted(SOLVERS)), TIMES)


@given(SCHEDULES | TUNED)
def test_coefficients_of_every_step(schedule: Schedule) -> None:
    for row in schedule.rows:  # with x = x0 = x0_prev = x0_prev2 nothing moves
        assert math.isclose(row.a + row.b + row.c + row.d, 1, abs_tol=1e-9)
        # d needs c and weighs less: the composed history stays of the size of an x0.
        assert row.d == pytest.approx(row.c * row.history_ratio)
        assert -1 < row.history_ratio <= 0
    assert (schedule.rows[0].t, schedule.rows[0].c) == (0, 0)
    last = schedule.rows[-1]
    assert (last.a, last.b, last.c, last.d) == (0, 1, 0, 0)


@given(SCHEDULES | TUNED)
def test_json_is_exact_and_as_in_earlier_versions(schedule: Schedule) -> None:
    assert msgspec.json.decode(msgspec.json.encode(schedule), type=Schedule) == schedule
    assert ("grid" in msgspec.to_builtins(schedule)) == (schedule.grid != "uniform")


def test_a_schedule_of_an_earlier_version_is_read() -> None:
    values = {"solver": "euler", "shift": 1.0, "rows": [[0.0, 0.5, 0.5, 0.0], [0.5, 0.0, 1.0, 0.0]]}
    assert msgspec.convert(values, Schedule) == solver_schedule("euler", 2)


@given(TUNED)
def test_times_are_kept(schedule: Schedule) -> None:
    assert schedule.times[0] == 0
    assert schedule.times[-1] == 1
    assert all(t < t_next for t, t_next in itertools.pairwise(schedule.times))
    assert fitted_schedule(schedule.rows).times == schedule.times


@given(st.integers(1, 40), st.floats(0.2, 5.0), st.sampled_from(sorted(SOLVERS)))
def test_a_solver_knows_times_alone(steps: int, shift: float, solver: str) -> None:
    """The shift is in the times, and nowhere else."""
    rows = over(solver, time_grid(steps, shift)).rows
    assert solver_schedule(solver, steps, shift).rows == rows


def test_a_second_history_term_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"t = 0\.5 has d = 0\.1 but c = 0"):
        Step(0.5, 0.5, 0.4, 0.0, 0.1)
    rows = [[0.0, 0.5, 0.4, 0.0, 0.1]]
    with pytest.raises(ConfigError, match="has d"):
        msgspec.convert({"solver": "dpmpp-3m", "shift": 1, "rows": rows}, Schedule)


def test_orders_rise_and_fall_at_the_ends() -> None:
    """First order where λ is infinite: the first two steps and the last; then one more each."""
    rows = solver_schedule("dpmpp-3m", 8).rows
    assert [(row.c != 0) + (row.d != 0) for row in rows] == [0, 0, 1, 2, 2, 2, 2, 0]
    assert rows[:3] == solver_schedule("dpmpp-2m", 8).rows[:3]


def test_reference_is_64_uniform_euler_steps() -> None:
    schedule = solver_schedule()
    assert schedule.steps == 64
    assert [row.t for row in schedule.rows] == [k / 64 for k in range(64)]
    for k, row in enumerate(schedule.rows):
        assert row.a == (1 - (k + 1) / 64) / (1 - k / 64)
        assert row.c == 0


@given(st.integers(1, 50), st.floats(0.1, 10))
def test_grid_is_warped_monotonically(steps: int, shift: float) -> None:
    grid = time_grid(steps, shift)
    assert grid[0] == 0
    assert math.isclose(grid[-1], 1)
    assert all(t < t_next for t, t_next in itertools.pairwise(grid))
    middle = shift * 0.5 / (1 + (shift - 1) * 0.5)
    if steps % 2 == 0:
        assert math.isclose(grid[steps // 2], middle)


SPREAD = 0.5  # s of data N(0, s²), whose exact flow goes from noise to s·noise


def _predict(x: float, t: float) -> float:
    """x0(x, t) = t·s²/(t²s² + (1−t)²)·x."""
    return t * SPREAD**2 / _exact(t) ** 2 * x


def _exact(t: float) -> float:
    """The state at t of the flow that starts at 1."""
    return math.sqrt(t**2 * SPREAD**2 + (1 - t) ** 2)


def _walk(rows: Sequence[Step], x: float, history: list[float]) -> float:
    """From x through some rows; ``history`` holds the x0 before, newest last."""
    past = [0.0, 0.0, *history]
    for row in rows:
        x0 = _predict(x, row.t)
        x = row.a * x + row.b * x0 + row.c * past[-1] + row.d * past[-2]
        past.append(x0)
    return x


def _endpoint_error(solver: str, steps: int) -> float:
    return abs(_walk(solver_schedule(solver, steps).rows, 1.0, []) - SPREAD)


def _inner_error(solver: str, steps: int) -> float:
    """From an exact state with exact history, over equal steps of λ from −2 to 2."""
    inner = [1 / (1 + math.exp(2 - 4 * k / steps)) for k in range(steps + 1)]
    schedule = over(solver, [0.0, *inner, 1.0])
    first = 4  # all its history lies behind the first steps, whose order is lower
    exact = [_predict(_exact(t), t) for t in schedule.times[first - 2 : first]]
    end = _walk(schedule.rows[first:-1], _exact(schedule.times[first]), exact)
    return abs(end - _exact(schedule.times[-2]))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpmpp-2m", 2), ("dpmpp-3m", 3)])
def test_order_of_the_inner_steps(solver: str, order: int) -> None:
    coarse, fine = _inner_error(solver, 64), _inner_error(solver, 128)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


# The ends are first order, so that no whole trajectory over uniform times has a third.
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpmpp-2m", 1.6), ("dpmpp-3m", 1.6)])
def test_order_of_whole_trajectories(solver: str, order: float) -> None:
    coarse, fine = _endpoint_error(solver, 64), _endpoint_error(solver, 256)
    assert math.log(coarse / fine, 4) > 0.9 * order


@given(st.floats(0.05, 6), st.floats(0.2, 5), st.floats(0.2, 5))
def test_third_order_is_exact_for_parabolas(h: float, r0: float, r1: float) -> None:
    """With x0 = (λ − λ_k)² one step adds t'·∫ e^(λ−λ')·x0 dλ = t'·(h² − 2h + 2 − 2e^(−h))."""
    log_snr = [-1 - h * (r0 + r1), -1 - h * r0, -1.0, -1 + h]
    inner = [1 / (1 + math.exp(-value)) for value in log_snr]
    row = over("dpmpp-3m", [0.0, inner[0] / 2, *inner, 1.0]).rows[4]
    found = row.c * (h * r0) ** 2 + row.d * (h * (r0 + r1)) ** 2
    expected = inner[-1] * (h**2 - 2 * h - 2 * math.expm1(-h))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("heun", 8), "heun"),
        (("euler", 0), "0"),
        (("euler", 8, 0.0), "0.0"),
        (("euler", 8, math.inf), "inf"),
        (("dpmpp-4m", 8), "there are euler, dpmpp-2m, dpmpp-3m"),
    ],
)
def test_impossible_schedules_raise(arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        solver_schedule(*arguments)


@pytest.mark.parametrize("times", [[], [0.1], [0, 0], [0, 0.6, 0.5], [0, 1], [0, NAN]])
def test_times_that_do_not_rise_raise(times: list[float]) -> None:
    with pytest.raises(ConfigError, match="rise from 0 to 1"):
        fitted_schedule([Step(t, 0.5, 0.5, 0.0) for t in times])


def test_rows_that_are_not_finite_raise() -> None:
    with pytest.raises(ConfigError, match="not finite"):
        fitted_schedule([Step(0.0, 0.5, NAN, 0.0)])


@pytest.mark.parametrize(
    "broken",
    [
        None,
        {},
        {"solver": "euler", "shift": 1, "rows": [[1, 2]]},
        {"solver": "euler", "shift": 1, "rows": [[0, 0, 1, 0, 0, 0]]},
        {"solver": "euler", "shift": 1, "grid": "best", "rows": [[0, 0, 1, 0]]},
    ],
)
def test_damaged_schedules_raise(broken: object) -> None:
    with pytest.raises((ConfigError, msgspec.ValidationError)):
        msgspec.convert(broken, Schedule)


def test_names_for_folders() -> None:
    assert solver_schedule("euler", 64).describe() == "euler-64"
    assert solver_schedule("dpmpp-2m", 16, 2.0).describe() == "dpmpp-2m-16-shift2"
    assert over("dpmpp-3m", [0, 0.2, 0.5, 1]).describe() == "dpmpp-3m-3-tuned"
    assert fitted_schedule([Step(0.0, 0.0, 1.0, 0.0)]).describe() == "fitted-1"
