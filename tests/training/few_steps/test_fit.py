"""Fitting schedules, on a denoiser whose flow is known."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lutdeploy.sampling import Denoiser, Images, batch_noise
from lutdeploy.schedule import Schedule, Step, fitted_schedule, solver_schedule
from lutdeploy.training.few_steps.fit import (
    REFERENCE,
    Problem,
    fit,
    least_squares,
    polish,
    start,
    work,
)
from lutdeploy.training.few_steps.tune import best_formula

SHAPE = (1, 8, 8)


class Gaussian:
    """Data N(0, s²) with another s at each pixel: x0(x, t) = t·s²/(t²s² + (1−t)²)·x."""

    schedule: Schedule | None = None
    whole_trajectory = False
    config: Any = None  # of no model
    spread = np.linspace(0.05, 2, 64, dtype=np.float32).reshape(SHAPE)

    def predict_x0(self, x: Images, t: NDArray[np.float32]) -> Images:
        t = t.reshape(-1, 1, 1, 1)
        share = t * self.spread**2 / (t**2 * self.spread**2 + (1 - t) ** 2)
        return (share * x).astype(np.float32)

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        x0 = self.predict_x0(x, np.full(len(x), row.t, np.float32))
        past = np.float32(row.c) * x0_prev if row.c and x0_prev is not None else np.float32(0)
        return np.float32(row.a) * x + np.float32(row.b) * x0 + past, x0

    def run(self, noise: Images) -> Images:
        raise NotImplementedError


BASIS = np.sqrt(2 / 8) * np.cos(np.pi * (np.arange(8) + 0.5) * np.arange(8)[:, None] / 8)
BASIS[0] /= np.sqrt(2)


def dctn(x: Images) -> Images:
    return (BASIS @ x @ BASIS.T).astype(np.float32)


def idctn(x: Images) -> Images:
    return (BASIS.T @ x @ BASIS).astype(np.float32)


def problem(seed: int = 1, images: int = 12, denoiser: Denoiser | None = None) -> Problem:
    return Problem.of(denoiser or Gaussian(), batch_noise(seed, range(images), SHAPE), batch=5)


@functools.cache
def fitted(steps: int) -> Schedule:
    return fit(problem(), steps)


def end(given: Problem, schedule: Schedule) -> Images:
    *_, last = given.walk(schedule.rows, given.begin())
    return last.x


def test_the_reference_is_walked_and_kept() -> None:
    given = problem()
    np.testing.assert_allclose(given.end, given.at(0.0) * Gaussian.spread, atol=0.05)
    states = []
    x, noise = given.at(0.0), batch_noise(1, range(12), SHAPE)
    np.testing.assert_allclose(x, noise, atol=2e-3)  # float16
    for row in REFERENCE.rows:
        states.append(x)
        x, _ = given.denoiser.step(x, row, None)
    np.testing.assert_allclose(given.at(0.25), states[64], atol=5e-3)
    np.testing.assert_allclose(given.at(100.5 / 256), (states[100] + states[101]) / 2, atol=5e-3)
    assert given.at(1.0) is given.end


@pytest.mark.parametrize("steps", [2, 3, 4, 8])
def test_a_fit_beats_every_formula_on_noise_that_it_never_saw(steps: int) -> None:
    judging = problem(seed=2, images=40)
    formula = best_formula(judging, steps)  # even though this was chosen there
    assert fitted(steps).steps == steps
    assert judging.error(fitted(steps)) < judging.error(formula)


def test_few_fitted_steps_equal_many() -> None:
    judging = problem(seed=2)
    assert judging.error(fitted(6)) < judging.error(solver_schedule("euler", 64))


def test_a_fit_is_deterministic() -> None:
    assert fit(problem(), 3) == fitted(3)


def test_a_polish_is_better_than_least_squares() -> None:
    given, judging = problem(), problem(2, 40)
    rows = start(given, 3)
    costs: list[float] = []
    polished = fitted_schedule(polish(given, rows, watch=costs.append))
    assert len(costs) > 1
    assert costs == sorted(costs, reverse=True)
    assert judging.error(polished) < 0.8 * judging.error(fitted_schedule(rows))


def test_least_squares_finds_the_step_that_there_is() -> None:
    """One Euler step of the reference is such a step."""
    given = problem()
    times = [k / 256 for k in range(0, 9)] + [1.0]
    rows, _ = least_squares(given, times)
    *_, state = given.walk(rows[:8], given.begin())
    np.testing.assert_allclose(state.x, given.at(8 / 256), atol=5e-3)


def test_the_last_step_keeps_no_noise_and_history_has_its_term() -> None:
    for steps in (1, 2, 4, 8):
        rows = fitted(steps).rows
        assert rows[-1].a == 0
        assert rows[0].c == 0
        assert all(abs(row.d) <= 1001 * abs(row.c) for row in rows)


@pytest.mark.parametrize("steps", [4, 8])
def test_fits_bear_imprecise_predictions(steps: int) -> None:
    """With an error of 1% in every x0 the end is hardly worse than that error."""

    class Imprecise(Gaussian):
        def predict_x0(self, x: Images, t: NDArray[np.float32]) -> Images:
            error = batch_noise(int(t[0] * 1e9), range(len(x)), SHAPE)
            return super().predict_x0(x, t) + np.float32(0.01) * error

    denoisers = (Gaussian(), Imprecise())
    exact, imprecise = (end(problem(7, 40, denoiser), fitted(steps)) for denoiser in denoisers)
    assert np.sqrt(np.square(imprecise - exact).mean()) < 0.05


def test_work_is_about_what_is_done() -> None:
    done = 0

    def on_work(images: int) -> None:
        nonlocal done
        done += images

    given = Problem.of(Gaussian(), batch_noise(1, range(12), SHAPE), 64, on_work)
    assert done == 12 * 256
    fit(given, 4)
    assert 0.1 * work(4, 12) < done - 12 * 256 < 1.2 * work(4, 12)
