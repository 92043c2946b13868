"""Fit schedules to one model, measure them on unseen noise, keep what wins: `tune-steps`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.tuned_steps import Entry, KnownDenoiser, Measured, TunedSteps
from lutdeploy.errors import ArtefactError, ConfigError, NonFiniteError, UsageError
from lutdeploy.sampling import batch_noise
from lutdeploy.schedule import SOLVERS, Schedule, solver_schedule
from lutdeploy.training.data import OnProgress, load_images
from lutdeploy.training.evaluation.data import draw_samples
from lutdeploy.training.evaluation.distances import (
    Pixels,
    frechet_distance,
    require_torchmetrics,
    sliced_wasserstein,
)
from lutdeploy.training.evaluation.features import open_extractor
from lutdeploy.training.few_steps import fit as fitting
from lutdeploy.training.few_steps.fit import REFERENCE, Problem, fit

SHIFTS = (1.0, 0.6, 0.4, 0.3, 0.2, 0.14)  # of the formulas' grids
FORMULA_IMAGES = 8  # on which the best formula is found
YARDSTICK = solver_schedule("euler", 64)  # its RMS is shown beside the others'

Note = Callable[[str], None]
Distances = Callable[[Pixels], tuple[float, float]]  # Fréchet, sliced Wasserstein


@dataclass(frozen=True)
class TuneSettings:
    """What `tune-steps` is asked for; see :class:`TunedSteps`."""

    steps: tuple[int, ...]
    images: int
    data: str | None
    pictures: int
    batch: int
    seed: int


@dataclass(frozen=True)
class Tuned:
    """What was measured, and what a person should know: of the data, and what was not stored."""

    rows: list[Measured]
    remarks: list[str]


def tune_schedules(
    run: Run,
    engine: KnownDenoiser,
    settings: TuneSettings,
    on_progress: Callable[[float, str], None],
) -> Tuned:
    """Fit, measure, and store what beats the best formula of as many steps.

    Args:
        run: gets the file of schedules, in the place of an earlier one.
        engine: takes single steps of the run's model.
        settings: what is asked for.
        on_progress: told which share is done, and what is done now.
    """
    fitting.require_steps(engine)
    shape, n = engine.config.image_shape, settings.images
    distances: Distances | None = None
    about_data: tuple[str, ...] = ()
    if settings.data:
        distances, about_data = _distances(
            settings, shape, lambda read, of: on_progress(0.0, f"data {read}/{of}")
        )
    done, doing, total = 0, "reference", _work(settings)

    def on_work(images: int) -> None:
        nonlocal done
        done += images
        on_progress(min(done / total, 1.0), doing)

    fitted_on, unseen = (
        Problem.of(engine, batch_noise(seed, range(n), shape), settings.batch, on_work)
        for seed in (settings.seed, settings.seed + 1)
    )

    def measure(schedule: Schedule) -> Measured:
        rms, drawn = unseen.error(schedule), 0
        if distances is None:
            return Measured(schedule, rms)

        def on_drawn(images: int, _: int) -> None:
            nonlocal drawn
            on_work((images - drawn) * schedule.steps)
            drawn = images

        how = settings.pictures, schedule, settings.seed + 1, settings.batch
        return Measured(schedule, rms, *distances(draw_samples(engine, *how, on_drawn)))

    entries, rows, remarks = [], [], list(about_data)
    for steps in settings.steps:
        doing = f"{steps} steps, formulas"
        formula = measure(best_formula(fitted_on.first(FORMULA_IMAGES), steps))
        rows.append(formula)
        doing = f"{steps} steps, fit"
        try:
            fitted = measure(fit(fitted_on, steps))
            rows.append(fitted)
            entries.append(Entry(fitted, formula))
        except (ConfigError, NonFiniteError) as error:
            remarks.append(f"{steps} steps, not stored: {error}")
    doing = YARDSTICK.describe()
    rows.append(Measured(YARDSTICK, unseen.error(YARDSTICK)))
    model = str(engine.identity["model_sha256"])
    if files.sha256(run.model) != model:
        raise ArtefactError(f"{run.model} changed while it was tuned for; run again")
    pictures = settings.pictures if settings.data else 0
    TunedSteps(model, settings.seed, n, pictures, REFERENCE.describe(), tuple(entries)).write(
        run.tuned_steps
    )
    return Tuned(rows, remarks)


def best_formula(problem: Problem, steps: int) -> Schedule:
    """The solver and shift of the least RMS."""
    best = solver_schedule("euler", steps), math.inf
    for solver, shift in itertools.product(SOLVERS, SHIFTS):
        try:
            schedule = solver_schedule(solver, steps, shift)
            error = problem.error(schedule)
        except ConfigError:  # no time left between steps
            continue
        if error < best[1]:
            best = schedule, error
    return best[0]


def _distances(
    settings: TuneSettings, shape: tuple[int, int, int], on_progress: OnProgress
) -> tuple[Distances, tuple[str, ...]]:
    """What measures pictures against real ones, whose features are taken once; remarks on these."""
    require_torchmetrics()
    found = load_images(str(settings.data), shape[-1], shape[0], on_progress=on_progress)
    images, n = found.images, settings.pictures
    if len(images) < n:
        raise UsageError(
            f"--data {settings.data} has {len(images)} images; --pictures {n} needs as many"
        )
    real = images[np.random.default_rng(0).permutation(len(images))[:n]]
    extractor = open_extractor()
    features = extractor(real)

    def distances(made: Pixels) -> tuple[float, float]:
        sliced = sliced_wasserstein(made, real)
        return frechet_distance(extractor(made), features), sliced[max(sliced)]

    return distances, found.all_remarks()


def _work(settings: TuneSettings) -> int:
    """About how many network evaluations it takes, for the bar."""
    n, pictures = settings.images, settings.pictures if settings.data else 0
    work = 2 * n * REFERENCE.steps + n * YARDSTICK.steps
    for steps in settings.steps:
        work += steps * len(SOLVERS) * len(SHIFTS) * FORMULA_IMAGES + 2 * steps * (n + pictures)
        work += fitting.work(steps, n)
    return work
