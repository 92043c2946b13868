"""`lutdeploy tune-steps`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import MANIFEST, read_manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.cli.console import note, progress_bar
from lutdeploy.cli.options import DEVICE, EXPORT, POSITIVE, PROVIDER, RUN, SEED, THREADS
from lutdeploy.cli.targets import find_run, open_reported, place
from lutdeploy.errors import ArtefactError, BackendError, ConfigError, UsageError
from lutdeploy.schedule import SOLVERS, Schedule, solver_schedule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lutdeploy.artefacts.tuned_steps import Entry, Noise, TunedSteps
    from lutdeploy.config import ModelConfig
    from lutdeploy.engines import Engine
    from lutdeploy.training.evaluation.evaluate import Metrics
    from lutdeploy.training.few_steps.comparison import Row
    from lutdeploy.training.few_steps.search import Found, Problem


class StepList(click.ParamType[tuple[int, ...]]):
    """Numbers of steps such as 8,10,16."""

    name = "N,N,…"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = sorted({int(part) for part in str(value).split(",")})
        except ValueError:
            numbers = [0]
        if not 1 <= numbers[0] <= numbers[-1] <= 1000:
            self.fail(f"{value!r} is no list of steps from 1 to 1000 such as 8,10,16", param)
        return tuple(numbers)


@click.command("tune-steps")
@RUN
@click.option("--steps", type=StepList(), required=True, help="Numbers of steps to tune for.")
@click.option(
    "--solver",
    "solvers",
    type=click.Choice(tuple(SOLVERS)),
    multiple=True,
    help="To tune for; may be given again. Default: all.",
)
@click.option("--images", type=POSITIVE, default=8, show_default=True, help="To tune on.")
@click.option(
    "--held-out",
    type=POSITIVE,
    default=16,
    show_default=True,
    help="Images of the next seed, to measure errors on.",
)
@click.option(
    "--evaluations",
    type=POSITIVE,
    default=1000,
    show_default=True,
    help="Network evaluations of all images that one search may take.",
)
@click.option(
    "--table",
    type=StepList(),
    default="4,6,8,10,16,32,64",
    show_default=True,
    help="Numbers of steps in the table and plot.",
)
@click.option(
    "--data",
    metavar="DIR",
    help="Real images: the table then has distances of `lutdeploy evaluate` to them, too.",
)
@click.option(
    "--pictures",
    type=click.IntRange(min=16),
    default=512,
    show_default=True,
    help="With --data: images of each row, and as many real ones.",
)
@click.option("--batch", type=POSITIVE, default=64, show_default=True)
@SEED
@click.option(
    "--backend",
    type=click.Choice(("auto", "torch", "onnxruntime", "openvino", "tensorrt")),
    default="auto",
    show_default=True,
    help="auto: onnxruntime when the run has a float32 step export, else torch.",
)
@DEVICE
@PROVIDER
@EXPORT
@THREADS
def command(
    run: Path | None,
    steps: tuple[int, ...],
    solvers: tuple[str, ...],
    images: int,
    held_out: int,
    evaluations: int,
    table: tuple[int, ...],
    data: str | None,
    pictures: int,
    batch: int,
    seed: int,
    backend: str,
    device: str | None,
    provider: str | None,
    export: str | None,
    threads: int | None,
) -> None:
    """Search time grids with which few steps end where 256 Euler steps end.

    Once per model. What is found goes to steps.json in the run and into the manifests of
    its exports, for `--time-grid tuned` of the other commands; a table says how near each solver
    and grid comes, on noise that the search did not see.
    """
    from lutdeploy.artefacts.tuned_steps import Noise
    from lutdeploy.sampling import batch_noise
    from lutdeploy.training.few_steps.comparison import YARDSTICK, measure, plot, show
    from lutdeploy.training.few_steps.search import Problem

    if seed == 2**64 - 1:
        raise UsageError("--seed must leave a next one, for the noise to measure on")
    backend, device = place(backend, device, provider)
    target = find_run(run)
    noises = (Noise(seed, images), Noise(seed + 1, held_out))
    jobs = [(solver, count) for solver in solvers or tuple(SOLVERS) for count in steps]
    if backend == "auto" and export is None:
        backend, export = _float32(target)
    with open_reported(target.path, backend, device, export, threads, batch=batch) as engine:
        if engine.schedule is not None:
            raise UsageError(
                f"export {engine.identity['export']} holds {engine.schedule.describe()} alone; "
                "name a step export with --export, or use --backend torch"
            )
        model = str(engine.identity["model_sha256"])
        known = _known(target, model)
        real = _real_pictures(data, engine.config, pictures) if data else None
        with progress_bar("state") as bar:
            task = bar.add_task("tune", total=2 + len(jobs) + len(table), state="reference")
            problems = []
            for noise in noises:
                array = batch_noise(noise.seed, range(noise.images), engine.config.image_shape)
                problems.append(Problem(engine, array, batch))
                bar.advance(task)
            training, judging = problems

            def watch(found: Found) -> None:
                schedule = found.schedule
                state = f"{schedule.solver}, {schedule.steps} steps: RMS {found.rms:.4f}"
                bar.update(task, state=state)

            entries: list[Entry] = []
            refusals: list[str] = []
            for solver, count in jobs:
                bar.update(task, state=f"{solver}, {count} steps")
                searched = _search(training, solver, count, known, evaluations, watch)
                try:
                    entry = _entry(searched, judging, noises)
                except ConfigError:
                    refusals.append(_told(searched, judging) + ": not better, not stored")
                else:
                    entries.append(entry)
                    known = known.updated([entry])
                bar.update(task, advance=1, state=_told(searched, judging))
            known = _store(target, model, entries, jobs)
            rows: list[Row] = []
            for count in table:
                bar.update(task, state=f"table, {count} steps")
                rows += measure(judging, _compared(training, known, count))
                bar.advance(task)
            if YARDSTICK.steps not in table:
                rows += measure(judging, [YARDSTICK])
            if real is not None:
                bar.update(task, completed=0, total=len(rows))
                distances = _distances_to(real)
                for k, row in enumerate(rows):
                    bar.update(task, state=f"{pictures} pictures, {row.schedule.describe()}")
                    rows[k] = _with_distances(row, engine, distances, pictures, seed, batch)
                    bar.advance(task)
    reference = judging.reference.describe()
    comparison = {
        "reference": reference,
        "noise": asdict(noises[1]),
        "rows": [row.to_dict() for row in rows],
        **({"pictures": pictures, "data": data} if data else {}),
    }
    _store(target, model, [], [], comparison)
    for line in refusals:
        note(line)
    show(rows, f"{noises[1].images} images, against {reference}")
    try:
        files.write_atomic(target.steps_plot, plot(rows, reference))
        note(f"plot: {target.steps_plot}")
    except BackendError as error:
        note(f"no plot: {error}")
    click.echo(target.tuned_steps)


def _real_pictures(data: str, config: ModelConfig, n: int) -> NDArray[np.uint8]:
    """n of the real images, uint8 [n, C, S, S].

    Raises:
        UsageError: there are not so many.
    """
    import numpy as np

    from lutdeploy.training.data import load_images

    images = load_images(data, config.image_size, config.channels).images
    if len(images) < n:
        raise UsageError(f"--data {data} has {len(images)} images; --pictures {n} needs as many")
    return images[np.random.default_rng(0).permutation(len(images))[:n]]


def _distances_to(real: NDArray[np.uint8]) -> Callable[[NDArray[np.uint8]], Metrics]:
    """What measures pictures against the real ones, whose features are taken once."""
    from lutdeploy.training.evaluation.evaluate import measure, with_features
    from lutdeploy.training.evaluation.features import open_extractor

    extractor = open_extractor()
    reference = with_features(real, extractor)
    return lambda made: measure(with_features(made, extractor), reference, 0)


def _with_distances(
    row: Row,
    engine: Engine,
    distances: Callable[[NDArray[np.uint8]], Metrics],
    pictures: int,
    seed: int,
    batch: int,
) -> Row:
    """A row with the distances of its pictures to real ones, on lutdeploy's own features."""
    from lutdeploy.errors import NonFiniteError
    from lutdeploy.training.evaluation.data import draw_samples

    names = ("Fréchet", "kernel", "sliced")
    try:
        made = draw_samples(engine, pictures, row.schedule, seed, batch)
    except NonFiniteError:
        return replace(row, metrics={**row.metrics, **dict.fromkeys(names, math.nan)})
    found = distances(made)
    sliced = found.sliced_wasserstein[max(found.sliced_wasserstein)]
    values = (found.frechet_distance, found.kernel_distance, sliced)
    return replace(row, metrics={**row.metrics, **dict(zip(names, values, strict=True))})


def _float32(target: Run) -> tuple[str, str | None]:
    """Backend and export for --backend auto. Less precise ones would put noise in the search."""
    folder = target.float32_step(files.sha256(target.model))
    return ("onnxruntime", folder.name) if folder else ("torch", None)


def _known(target: Run, model: str) -> TunedSteps:
    """What was found before for these weights; nothing, and a note, if for others."""
    from lutdeploy.artefacts.tuned_steps import TunedSteps, read_tuned_steps

    if target.tuned_steps.is_file():
        known = read_tuned_steps(target.tuned_steps)
        if known.model_sha256 == model:
            return known
        note(f"{target.tuned_steps} was tuned for other weights; it will be replaced")
    return TunedSteps(model)


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
    from lutdeploy.training.few_steps.search import best_shift, resampled, tune

    shifted = best_shift(training, solver, count).schedule
    starts = [resampled(found.times, count) for found in known.schedules]
    tuned = tune(training, solver, count, [shifted.times, *starts], budget, watch).schedule
    return _Searched(solver_schedule(solver, count), shifted, tuned)


def _entry(searched: _Searched, judging: Problem, noises: tuple[Noise, Noise]) -> Entry:
    """What is stored.

    Raises:
        ConfigError: the tuned grid is not the best of the three on the held-out noise.
    """
    from lutdeploy.artefacts.tuned_steps import Entry

    reference, shift = judging.reference.describe(), searched.shifted.shift
    return Entry(searched.tuned, *noises, reference, *searched.errors(judging), shift)


def _told(searched: _Searched, judging: Problem) -> str:
    tuned, uniform, shifted = searched.errors(judging)
    name = f"{searched.uniform.solver}, {searched.uniform.steps} steps"
    return f"{name}: RMS {tuned:.4f} tuned, {uniform:.4f} uniform, {shifted:.4f} best shift"


def _store(
    target: Run,
    model: str,
    entries: list[Entry],
    jobs: list[tuple[str, int]],
    comparison: dict[str, Any] | None = None,
) -> TunedSteps:
    """Put the entries in the place of those of ``jobs``, also in the exports' manifests.

    What is there is read again: another process may have added to it meanwhile.

    Raises:
        ArtefactError: the model is not the one any more that was tuned for.
    """
    with files.lock(target.exports_folder, "`lutdeploy export` or tune-steps", on_wait=note):
        if files.sha256(target.model) != model:
            raise ArtefactError(f"{target.model} changed while it was tuned for; run again")
        known = _known(target, model)
        for solver, count in jobs:
            known = known.without(solver, count)
        known = known.updated(entries)
        if comparison is not None:
            known = replace(known, comparison=comparison)
        known.write(target.tuned_steps)
        for folder in target.exports():
            manifest = read_manifest(folder)
            if manifest.source_sha256 == model and manifest.tuned != known.schedules:
                updated = replace(manifest, tuned=known.schedules)
                files.write_json(folder / MANIFEST, updated.to_dict())
    return known


def _compared(training: Problem, known: TunedSteps, count: int) -> list[Schedule]:
    """The schedules of one number of steps: each solver with each of its grids."""
    from lutdeploy.training.few_steps.search import best_shift

    schedules: list[Schedule] = []
    for solver in SOLVERS:
        schedules += [solver_schedule(solver, count), best_shift(training, solver, count).schedule]
        schedules += [t for t in known.schedules if (t.solver, t.steps) == (solver, count)]
    return list(dict.fromkeys(schedules))
