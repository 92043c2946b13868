"""The search for time grids, on a denoiser whose flow is known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lutdeploy.errors import ConfigError
from lutdeploy.sampling import Denoiser, Images, batch_noise
from lutdeploy.schedule import SOLVERS, Schedule, Step, solver_schedule, time_grid, tuned_schedule
from lutdeploy.training.few_steps.search import Found, Problem, best_shift, resampled, rms, tune

SHAPE = (1, 4, 4)


class Gaussian:
    """Data N(0, s²) with another s at each pixel: x0(x, t) = t·s²/(t²s² + (1−t)²)·x."""

    schedule: Schedule | None = None
    whole_trajectory = False
    spread = np.linspace(0.05, 2, 16, dtype=np.float32).reshape(SHAPE)

    def __init__(self) -> None:
        self.images = 0  # that went through the network

    config: Any = None  # of no model

    def predict_x0(self, x: Images, t: NDArray[np.float32]) -> Images:
        self.images += len(x)
        t = t.reshape(-1, 1, 1, 1)
        share = t * self.spread**2 / (t**2 * self.spread**2 + (1 - t) ** 2)
        return (share * x).astype(np.float32)

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        x0 = self.predict_x0(x, np.full(len(x), row.t, np.float32))
        past = np.float32(row.c) * x0_prev if row.c and x0_prev is not None else np.float32(0)
        return np.float32(row.a) * x + np.float32(row.b) * x0 + past, x0

    def run(self, noise: Images) -> Images:
        raise NotImplementedError


def problem(seed: int = 0, images: int = 6, denoiser: Denoiser | None = None) -> Problem:
    return Problem(denoiser or Gaussian(), batch_noise(seed, range(images), SHAPE))


def test_the_reference_ends_where_the_flow_does() -> None:
    found = problem()
    assert found.reference == solver_schedule("euler", 256)
    assert rms(found.target, found.noise * Gaussian.spread) < 0.02


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [2, 5, 8])
def test_tuned_times_win_on_noise_that_they_never_saw(solver: str, steps: int) -> None:
    training, judging = problem(0), problem(1, images=50)
    shifted = best_shift(training, solver, steps)
    found = tune(training, solver, steps, [shifted.schedule.times])
    assert found.rms == pytest.approx(training.rms(found.schedule))
    assert training.cost(found.schedule) <= training.cost(
        tuned_schedule(solver, shifted.schedule.times)
    )
    assert judging.rms(found.schedule) < judging.rms(solver_schedule(solver, steps))
    assert judging.rms(found.schedule) < 1.02 * judging.rms(shifted.schedule)


def test_few_tuned_steps_equal_many() -> None:
    found = tune(problem(), "dpmpp-3m", 8)
    assert found.rms < problem().rms(solver_schedule("euler", 64))


def test_the_search_is_deterministic_and_starts_nowhere_near() -> None:
    """Also from times that are far off."""
    far = [time_grid(6, 5.0)]
    one, same = tune(problem(), "dpmpp-2m", 6), tune(problem(), "dpmpp-2m", 6)
    assert one == same
    from_far = tune(problem(), "dpmpp-2m", 6, far)
    assert from_far.rms == pytest.approx(one.rms, rel=0.2)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(sorted(SOLVERS)),
    st.integers(1, 7),
    st.integers(1, 150),
    st.lists(st.floats(0.2, 5.0), max_size=2),
)
def test_a_search_keeps_its_budget_and_never_loses(
    solver: str, steps: int, budget: int, shifts: list[float]
) -> None:
    denoiser = Gaussian()
    given_problem = problem(images=2, denoiser=denoiser)
    starts = [time_grid(steps, shift) for shift in shifts]
    before, told = given_problem.passes, list[Found]()
    found = tune(given_problem, solver, steps, starts, budget, told.append)
    assert given_problem.passes - before <= max(budget, steps * (1 + len(starts)))
    assert denoiser.images == 2 * given_problem.passes
    assert found.schedule.times[0] == 0
    assert found.schedule.times[-1] == 1
    assert all(t < t_next for t, t_next in itertools.pairwise(found.schedule.times))
    assert given_problem.cost(found.schedule) <= given_problem.cost(solver_schedule(solver, steps))
    costs = [given_problem.cost(f.schedule) for f in told]
    assert costs == sorted(costs, reverse=True)
    assert found == told[-1]


@pytest.mark.parametrize("solver", ["dpmpp-2m", "dpmpp-3m"])
@pytest.mark.parametrize("steps", [6, 10])
def test_tuned_steps_bear_imprecise_predictions(solver: str, steps: int) -> None:
    """With an error of 1% in every x0 the end is hardly worse than that error."""

    class Imprecise(Gaussian):
        def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
            seed = int(row.t * 1e9)
            x0 = self.predict_x0(x, np.full(len(x), row.t, np.float32))
            x0 += np.float32(0.01) * batch_noise(seed, range(len(x)), SHAPE)
            past = np.float32(row.c) * x0_prev if row.c and x0_prev is not None else np.float32(0)
            return np.float32(row.a) * x + np.float32(row.b) * x0 + past, x0

    found = tune(problem(), solver, steps)
    exact, imprecise = problem(7, 50), problem(7, 50)
    imprecise.denoiser = Imprecise()
    error = rms(imprecise.end(found.schedule), exact.end(found.schedule))
    assert error < 0.05
    assert max(abs(row.c) for row in found.schedule.rows) < 5


def test_the_best_shift_is_downhill() -> None:
    given_problem = problem()
    found = best_shift(given_problem, "euler", 8)
    for octave in (-0.25, 0.25):
        shift = found.schedule.shift * 2**octave
        assert found.rms <= given_problem.rms(solver_schedule("euler", 8, shift))


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.2, 5))
def test_resampled_times_follow_the_same_curve(old: int, new: int, shift: float) -> None:
    times = time_grid(old, shift)
    found = resampled(times, new)
    assert len(found) == new + 1
    assert (found[0], found[-1]) == (0, 1)
    assert all(t < t_next for t, t_next in itertools.pairwise(found))
    np.testing.assert_allclose(resampled(times, old), times, atol=1e-12)


def test_a_trajectory_that_explodes_is_never_the_best() -> None:
    class Explodes(Gaussian):
        def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
            x_next, x0 = super().step(x, row, x0_prev)
            return (x_next * np.float32(np.nan) if 0.35 < row.t < 0.45 else x_next), x0

    class Reference(Problem):
        def end(self, schedule: Schedule) -> Images:
            honest = Gaussian() if schedule == self.reference else self.denoiser
            self.denoiser, kept = honest, self.denoiser
            try:
                return super().end(schedule)
            finally:
                self.denoiser = kept

    explosive = Reference(Explodes(), batch_noise(0, range(2), SHAPE))
    assert explosive.rms(solver_schedule("euler", 5)) == np.inf
    found = tune(explosive, "euler", 5, [time_grid(5, 0.7)])
    assert np.isfinite(found.rms)
    assert not any(0.35 < t < 0.45 for t in found.schedule.times)


def test_impossible_searches_raise() -> None:
    with pytest.raises(ConfigError, match="no solver 'heun'"):
        tune(problem(), "heun", 4)
    with pytest.raises(ConfigError, match="at least 1"):
        tune(problem(), "euler", 0)
