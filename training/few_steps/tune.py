"""Tune schedules for one model, keep those that win, compare them: `lutdeploy tune-steps`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.tuned_steps import (
    Entry,
    KnownDenoiser,
    Noise,
    TunedSteps,
    read_tuned_steps,
)
from lutdeploy.config import ModelConfig
from lutdeploy.errors import ArtefactError, ConfigError, NonFiniteError, UsageError
from lutdeploy.sampling import batch_noise
from lutdeploy.schedule import SOLVERS, Schedule, solver_schedule
from lutdeploy.training.data import load_images
from lutdeploy.training.evaluation.data import draw_samples
from lutdeploy.training.evaluation.evaluate import Metrics, with_features
from lutdeploy.training.evaluation.evaluate import measure as measure_distances
from lutdeploy.training.evaluation.features import open_extractor
from lutdeploy.training.few_steps.comparison import YARDSTICK, Row, measure
from lutdeploy.training.few_steps.search import Found, Problem, best_shift, resampled, tune

Note = Callable[[str], None]


@dataclass(frozen=True)
class TuneSettings:
    """What `tune-steps` is asked for.

    ``images`` and ``held_out`` images of ``seed`` and of the next seed are tuned on and measured
    on; ``evaluations`` bounds the network evaluations of one search; ``compared`` are the numbers
    of steps in the comparison, ``pictures`` those of each of its rows with ``data``.
    """

    steps: tuple[int, ...]
    solvers: tuple[str, ...] = tuple(SOLVERS)
    images: int = 8
    held_out: int = 16
    evaluations: int = 1000
    compared: tuple[int, ...] = (4, 6, 8, 10, 16, 32, 64)
    data: str | None = None
    pictures: int = 512
    batch: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Tuned:
    """What `tune-steps` found: the rows of the comparison, and what was not worth storing."""

    rows: list[Row]
    reference: str
    refusals: list[str]


def tune_schedules(
    run: Run,
    engine: KnownDenoiser,
    settings: TuneSettings,
    note: Note,
    on_progress: Callable[[int, int, str], None],
) -> Tuned:
    """Search, store what beats every untuned grid on unseen noise, compare, store the comparison.

    Args:
        run: gets the file of tuned schedules.
        engine: takes single steps of the run's model.
        settings: what is asked for.
        note: told what cannot be used of what is stored.
        on_progress: told what is done, of how many, and what now.
    """
    if engine.schedule is not None:
        raise UsageError(
            f"export {engine.identity['export']} holds {engine.schedule.describe()} alone; "
            "name a step export with --export, or use --backend torch"
        )
    model = str(engine.identity["model_sha256"])
    noises = (Noise(settings.seed, settings.images), Noise(settings.seed + 1, settings.held_out))
    jobs = [(solver, count) for solver in settings.solvers for count in settings.steps]
    known = _known(run, model, note)
    real = (
        _real_pictures(settings.data, engine.config, settings.pictures) if settings.data else None
    )
    total, done = 2 + len(jobs) + len(settings.compared), 0
    problems = []
    for noise in noises:
        on_progress(done, total, "reference")
        array = batch_noise(noise.seed, range(noise.images), engine.config.image_shape)
        problems.append(Problem(engine, array, settings.batch))
        done += 1
    training, judging = problems

    def watch(found: Found) -> None:
        schedule = found.schedule
        text = f"{schedule.solver}, {schedule.steps} steps: RMS {found.rms:.4f}"
        on_progress(done, total, text)

    entries: list[Entry] = []
    refusals: list[str] = []
    for solver, count in jobs:
        on_progress(done, total, f"{solver}, {count} steps")
        searched = _search(training, solver, count, known, settings.evaluations, watch)
        try:
            entry = _entry(searched, judging, noises)
        except ConfigError:
            refusals.append(_described(searched, judging) + ": not better, not stored")
        else:
            entries.append(entry)
            known = known.updated([entry])
        done += 1
        on_progress(done, total, _described(searched, judging))
    known = _store(run, model, entries, jobs, note)
    rows: list[Row] = []
    for count in settings.compared:
        on_progress(done, total, f"table, {count} steps")
        rows += measure(judging, _compared(training, known, count))
        done += 1
    if YARDSTICK.steps not in settings.compared:
        rows += measure(judging, [YARDSTICK])
    if real is not None:
        distances = _distances_to(real)
        for k, row in enumerate(rows):
            text = f"{settings.pictures} pictures, {row.schedule.describe()}"
            on_progress(k, len(rows), text)
            rows[k] = _with_distances(row, engine, distances, settings)
    reference = judging.reference.describe()
    comparison = {
        "reference": reference,
        "noise": msgspec.to_builtins(noises[1]),
        "rows": [row.to_dict() for row in rows],
        **({"pictures": settings.pictures, "data": settings.data} if settings.data else {}),
    }
    _store(run, model, [], [], note, comparison)
    return Tuned(rows, reference, refusals)


def _real_pictures(data: str, config: ModelConfig, n: int) -> NDArray[np.uint8]:
    """n of the real images, uint8 [n, C, S, S]."""
    images = load_images(data, config.image_size, config.channels).images
    if len(images) < n:
        raise UsageError(f"--data {data} has {len(images)} images; --pictures {n} needs as many")
    return images[np.random.default_rng(0).permutation(len(images))[:n]]


def _distances_to(real: NDArray[np.uint8]) -> Callable[[NDArray[np.uint8]], Metrics]:
    """What measures pictures against the real ones, whose features are taken once."""

    extractor = open_extractor()
    reference = with_features(real, extractor)
    return lambda made: measure_distances(with_features(made, extractor), reference, 0)


def _with_distances(
    row: Row,
    engine: KnownDenoiser,
    distances: Callable[[NDArray[np.uint8]], Metrics],
    settings: TuneSettings,
) -> Row:
    """A row with the distances of its pictures to real ones, on lutdeploy's own features."""

    names = ("Fréchet", "kernel", "sliced")
    try:
        made = draw_samples(engine, settings.pictures, row.schedule, settings.seed, settings.batch)
    except NonFiniteError:
        return replace(row, metrics={**row.metrics, **dict.fromkeys(names, math.nan)})
    found = distances(made)
    sliced = found.sliced_wasserstein[max(found.sliced_wasserstein)]
    values = (found.frechet_distance, found.kernel_distance, sliced)
    return replace(row, metrics={**row.metrics, **dict(zip(names, values, strict=True))})


def _known(run: Run, model: str, note: Note) -> TunedSteps:
    """What was found before for these weights; nothing, and a note, if for others."""

    if run.tuned_steps.is_file():
        known = read_tuned_steps(run.tuned_steps)
        if known.model_sha256 == model:
            return known
        note(f"{run.tuned_steps} was tuned for other weights; it will be replaced")
    return TunedSteps(model, (), None)


@dataclass(frozen=True)
class _Searched:
    """The three grids of a solver and a number of steps."""

    uniform: Schedule
    shifted: Schedule
    tuned: Schedule

    def errors(self, judging: Problem) -> tuple[float, float, float]:
        """RMS of the tuned, the uniform and the shifted grid on the held-out noise."""
        return judging.rms(self.tuned), judging.rms(self.uniform), judging.rms(self.shifted)


def _search(
    training: Problem,
    solver: str,
    count: int,
    known: TunedSteps,
    budget: int,
    watch: Callable[[Found], None],
) -> _Searched:

    shifted = best_shift(training, solver, count).schedule
    starts = [resampled(found.times, count) for found in known.schedules]
    tuned = tune(training, solver, count, [shifted.times, *starts], budget, watch).schedule
    return _Searched(solver_schedule(solver, count), shifted, tuned)


def _entry(searched: _Searched, judging: Problem, noises: tuple[Noise, Noise]) -> Entry:
    """What is stored.

    Raises:
        ConfigError: the tuned grid is not the best of the three on the held-out noise.
    """

    reference, shift = judging.reference.describe(), searched.shifted.shift
    return Entry(searched.tuned, *noises, reference, *searched.errors(judging), shift)


def _described(searched: _Searched, judging: Problem) -> str:
    tuned, uniform, shifted = searched.errors(judging)
    name = f"{searched.uniform.solver}, {searched.uniform.steps} steps"
    return f"{name}: RMS {tuned:.4f} tuned, {uniform:.4f} uniform, {shifted:.4f} best shift"


def _store(
    run: Run,
    model: str,
    entries: list[Entry],
    jobs: list[tuple[str, int]],
    note: Note,
    comparison: dict[str, Any] | None = None,
) -> TunedSteps:
    """Put the entries in the place of those of ``jobs``.

    What is there is read again: another process may have added to it meanwhile.
    """
    with files.lock(run.exports_folder, "`lutdeploy export` or tune-steps", on_wait=note):
        if files.sha256(run.model) != model:
            raise ArtefactError(f"{run.model} changed while it was tuned for; run again")
        known = _known(run, model, note)
        for solver, count in jobs:
            known = known.without(solver, count)
        known = known.updated(entries)
        if comparison is not None:
            known = msgspec.structs.replace(known, comparison=comparison)
        known.write(run.tuned_steps)
    return known


def _compared(training: Problem, known: TunedSteps, count: int) -> list[Schedule]:
    """The schedules of one number of steps: each solver with each of its grids."""

    schedules: list[Schedule] = []
    for solver in SOLVERS:
        schedules += [solver_schedule(solver, count), best_shift(training, solver, count).schedule]
        schedules += [t for t in known.schedules if (t.solver, t.steps) == (solver, count)]
    return list(dict.fromkeys(schedules))
