"""Step tables: exact where they must be, of the order they claim."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutdeploy.errors import ConfigError
from lutdeploy.solvers import SOLVERS, StepTable, step_table, time_grid

TABLES = st.builds(
    step_table,
    st.sampled_from(sorted(SOLVERS)),
    st.integers(1, 80),
    st.floats(0.2, 5.0),
)


@given(TABLES)
def test_coefficients_sum_to_one(table: StepTable) -> None:
    """With x = x0 = x0_prev nothing moves."""
    for row in table.rows:
        assert math.isclose(row.a + row.b + row.c, 1, abs_tol=1e-9)


@given(TABLES)
def test_first_and_last_row(table: StepTable) -> None:
    assert table.rows[0].t == 0
    assert table.rows[0].c == 0
    last = table.rows[-1]
    assert (last.a, last.b, last.c) == (0, 1, 0)


@given(TABLES)
def test_dict_round_trip_is_exact(table: StepTable) -> None:
    assert StepTable.from_dict(table.to_dict()) == table


def test_reference_is_64_uniform_euler_steps() -> None:
    table = step_table()
    assert table.steps == 64
    assert [row.t for row in table.rows] == [k / 64 for k in range(64)]
    for k, row in enumerate(table.rows):
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


def _endpoint_error(solver: str, steps: int) -> float:
    """Data N(0, s²): x0(x, t) = t·s²/(t²s² + (1−t)²)·x, whose exact flow ends at s·noise."""
    s = 0.5
    x, previous = 1.0, 0.0
    for row in step_table(solver, steps).rows:
        variance = row.t**2 * s**2 + (1 - row.t) ** 2
        x0 = row.t * s**2 / variance * x
        x, previous = row.a * x + row.b * x0 + row.c * previous, x0
    return abs(x - s)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpmpp-2m", 1.6)])
def test_order_of_convergence(solver: str, order: float) -> None:
    coarse, fine = _endpoint_error(solver, 64), _endpoint_error(solver, 256)
    assert math.log(coarse / fine, 4) > 0.9 * order


def test_second_order_beats_first() -> None:
    assert _endpoint_error("dpmpp-2m", 16) < _endpoint_error("euler", 64)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("heun", 8), "heun"),
        (("euler", 0), "0"),
        (("euler", 8, 0.0), "0.0"),
        (("euler", 8, math.inf), "inf"),
    ],
)
def test_impossible_tables_raise(arguments: tuple[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        step_table(*arguments)


@pytest.mark.parametrize("broken", [None, {}, {"solver": "euler", "shift": 1, "rows": [[1, 2]]}])
def test_damaged_tables_raise(broken: object) -> None:
    with pytest.raises(ConfigError):
        StepTable.from_dict(broken)


def test_names_for_folders() -> None:
    assert step_table("euler", 64).describe() == "euler-64"
    assert step_table("dpmpp-2m", 16, 2.0).describe() == "dpmpp-2m-16-shift2"
