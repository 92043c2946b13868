"""`lutdeploy bench`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.run import locate
from lutdeploy.artefacts.target import find, place_of_results
from lutdeploy.artefacts.tuned_steps import distilled_schedule, fitted_schedules
from lutdeploy.cli.console import answer, console, interrupted_code, note, stop_with
from lutdeploy.cli.progress import progress_bar
from lutdeploy.cli.requests import POSITIVE, RUN, THREADS, schedule_request
from lutdeploy.config import PRESETS, SIZES
from lutdeploy.errors import UsageError
from lutdeploy.schedule import Schedule, ScheduleRequest

if TYPE_CHECKING:
    from lutdeploy.engines.benchmark.contenders import RandomModel
    from lutdeploy.engines.benchmark.result import Result

STDOUT = Path("-")


@click.command("bench")
@RUN
@click.option("--preset", type=click.Choice(tuple(PRESETS)), help="Random weights of a preset.")
@click.option("--size", type=click.Choice(tuple(SIZES)), help="Random weights of a size.")
@click.option("--only", multiple=True, metavar="NAME", help="A contender, beside the original.")
@click.option("--batch", "batches", type=POSITIVE, multiple=True, help="Instead of the sweep.")
@click.option("--max-batch", type=POSITIVE, help="Where the sweep ends at the latest.")
@schedule_request
@THREADS
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="Of all rounds; no batch size is begun that would go beyond. Default: 240.",
)
@click.option(
    "--end-to-end",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Of the fastest contenders, as `lutdeploy sample`.",
)
@click.option("--quick", is_flag=True, help="Rough figures, in less than a minute.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png")
@click.option("--markdown", type=click.Path(path_type=Path), metavar="FILE", help="- for stdout.")
def command(
    run: Path | None,
    preset: str | None,
    size: str | None,
    only: tuple[str, ...],
    batches: tuple[int, ...],
    max_batch: int | None,
    schedule: ScheduleRequest,
    threads: int | None,
    seconds: float | None,
    end_to_end: int,
    quick: bool,
    json_file: Path | None,
    plot: Path | None,
    markdown: Path | None,
) -> None:
    """Images a second with every backend, precision and batch size, beside the limits.

    Every contender is first compared with the original's layout in eager PyTorch. Writes
    bench.json and bench.png into the run; elsewhere only what --json and --plot name.
    """
    if run is not None and (preset or size):
        raise UsageError("--preset and --size mean random weights; leave out RUN")
    if find_spec("torch") is None:  # each of its processes would say so, as an error of its own
        raise ModuleNotFoundError("the original runs in PyTorch", name="torch")
    from lutdeploy.engines.benchmark import report
    from lutdeploy.engines.benchmark.contenders import RandomModel
    from lutdeploy.engines.benchmark.measure import choose_settings, open_benchmark

    random = RandomModel(preset or "static-tanh-64", size or "seed") if preset or size else None
    subject = random or place_of_results(find(run, note), note)
    own = distilled_schedule(subject) if isinstance(subject, Path) else None
    settings = choose_settings(
        schedule.resolve(own, lambda: _fitted(subject)),
        quick,
        threads=threads,
        batches=batches,
        max_batch=max_batch,
        seconds=seconds,
        end_to_end=end_to_end,
    )
    markdown_file = None if markdown == STDOUT else markdown
    report.require_writable(json_file, plot, markdown_file)
    with open_benchmark(subject, settings, only, quick, note) as benchmark:
        if benchmark.subject.run is not None:
            json_file = json_file or benchmark.subject.run.bench
        with progress_bar() as bar:
            task = bar.add_task("bench", total=None)
            result = benchmark.measure(
                lambda text, done, total: bar.update(
                    task, description=text, completed=done, total=total
                )
            )
            bar.update(task, description="bench")
    if result.interrupted and not result.rows:
        stop_with("interrupted: nothing was measured yet", interrupted_code(benchmark.interrupt))
    if markdown == STDOUT:
        answer(report.markdown(result).rstrip())
    else:
        _show(result)
    written = report.write(result, json_file, plot, markdown_file, note)
    if markdown != STDOUT:
        for file in written:
            answer(file)
    if result.interrupted:
        where = f"; what was measured is in {written[0]}" if written else ""
        stop_with(f"interrupted{where}", interrupted_code(benchmark.interrupt))


def _fitted(subject: Path | RandomModel) -> Sequence[Schedule]:
    """The fitted schedules of what is measured; random weights have none."""
    if not isinstance(subject, Path):
        return ()
    located = locate(subject)
    if located.model is not None:
        return fitted_schedules(subject, files.sha256(located.model))
    assert located.export is not None
    return fitted_schedules(subject, read_manifest(located.export).source_sha256)


def _show(result: Result) -> None:
    from rich.markup import escape
    from rich.table import Table

    from lutdeploy.engines.benchmark import report

    for table in report.tables(result):
        shown = Table(title=table.title, title_justify="left")
        for k, name in enumerate(table.header):
            shown.add_column(name, justify="right" if k else "left", no_wrap=True)
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console(stderr=False).print(shown)
    for remark in report.remarks(result):
        answer(remark)
