"""`lutdeploy bench`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lutdeploy.artefacts import files
from lutdeploy.artefacts.target import find
from lutdeploy.cli.console import INTERRUPTED, note, progress_bar, stop_with
from lutdeploy.cli.requests import POSITIVE, RUN, THREADS, schedule_request
from lutdeploy.config import PRESETS, SIZES, model_config
from lutdeploy.errors import UsageError
from lutdeploy.schedule import ScheduleRequest

if TYPE_CHECKING:
    from lutdeploy.engines.benchmark.benchmark import Benchmark
    from lutdeploy.engines.benchmark.subject import Subject

# What --quick changes in lutdeploy.engines.benchmark.findings.Settings.
QUICK = {
    "max_batch": 16,
    "seconds": 12.0,
    "window": 0.06,
    "pause": 0.03,
    "max_rounds": 5,
    "matrix": 1024,
    "trajectory_seconds": 3.0,
    "sample_seconds": 1.0,
}
QUICK_LEAVES_OUT = "torch-compiled"  # compiling takes longer than everything else
STDOUT = Path("-")
WIDE = 160  # columns, where no terminal sets a limit


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
    if batches and max_batch is not None:
        raise UsageError("--max-batch ends the sweep that --batch replaces; leave one out")
    for option, file in (("--json", json_file), ("--plot", plot), ("--markdown", markdown)):
        if file is not None and not (option == "--markdown" and file == STDOUT):
            _require_writable(file, option)
    if plot is not None and plot.suffix.lower() != ".png":
        raise UsageError(f"--plot writes PNG; {plot} does not end in .png")
    if plot is not None and not _has_matplotlib():
        raise UsageError("--plot needs matplotlib: pip install 'lutdeploy[bench]'")
    from lutdeploy.engines.benchmark.benchmark import Benchmark
    from lutdeploy.engines.benchmark.contenders import choose, list_contenders
    from lutdeploy.engines.benchmark.findings import Settings
    from lutdeploy.machine import this_machine

    options: dict[str, Any] = dict(QUICK) if quick else {}
    given = {"max_batch": max_batch, "seconds": seconds}
    options.update({name: value for name, value in given.items() if value is not None})
    settings = Settings(
        schedule=schedule.resolve(),
        threads=threads,
        batches=tuple(sorted(set(batches))),
        end_to_end=end_to_end,
        **options,
    )
    machine = this_machine()
    with contextlib.ExitStack() as stack:
        subject = stack.enter_context(_subject(run, preset, size))
        if subject.run is not None:
            folder = subject.run.path
            stack.enter_context(files.lock(folder, "`lutdeploy bench`", name=".bench.lock"))
            json_file = json_file or subject.run.bench
        everyone = list_contenders(
            subject.model, subject.exports, subject.run, gpu=bool(machine.gpus)
        )
        contenders = choose(everyone, only)
        if quick and not only:
            contenders = [c for c in contenders if c.name != QUICK_LEAVES_OUT]
        note(f"machine: {machine.describe()}")
        benchmark = Benchmark(subject, contenders, settings)
        interrupted = False
        try:
            _measure(benchmark)
        except KeyboardInterrupt:
            interrupted = True
        result = benchmark.findings.result(machine, interrupted)
    if interrupted and not result["rows"]:
        stop_with("interrupted: nothing was measured yet", INTERRUPTED)
    written = _write(result, json_file, plot, markdown)
    if markdown != STDOUT:
        _show(result)
        for file in written:
            click.echo(file)
    if interrupted:
        where = f"; what was measured is in {written[0]}" if written else ""
        stop_with(f"interrupted{where}", INTERRUPTED)


def _require_writable(file: Path, option: str) -> None:
    """Refuse now what could not be written after minutes of measuring."""
    folder = file.absolute().parent
    if file.is_dir():
        raise UsageError(f"{file} is a folder; {option} names a file")
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; {option} writes into one that is there")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{folder} is not writable; choose another {option}")


def _has_matplotlib() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


@contextlib.contextmanager
def _subject(run: Path | None, preset: str | None, size: str | None) -> Iterator[Subject]:
    from lutdeploy.engines.benchmark import subject as bench_subject

    if preset or size:
        preset, size = preset or "static-tanh-64", size or "seed"
        name = f"{preset} {size}, random weights"
        note(f"model: {name}")
        with bench_subject.random(model_config(preset, size), name) as subject:
            yield subject
        return
    with bench_subject.given(find(run, note), note) as subject:
        yield subject


def _measure(benchmark: Benchmark) -> None:
    with progress_bar() as bar:
        task = bar.add_task("bench", total=None)
        for progress in benchmark.run():
            bar.update(
                task,
                description=progress.text,
                completed=progress.done,
                total=progress.total,
            )
        bar.update(task, description="bench")


def _write(
    result: dict[str, Any], json_file: Path | None, plot: Path | None, markdown: Path | None
) -> list[Path]:
    """Write what was asked for; says which files there are now."""
    from lutdeploy.engines.benchmark import report as bench_report

    written = []
    if json_file is not None:
        files.write_json(json_file, result)
        written.append(json_file)
    text = bench_report.markdown(result)
    if markdown == STDOUT:
        click.echo(text, nl=False)
    elif markdown is not None:
        files.write_atomic(markdown, text.encode())
        written.append(markdown)
    picture = plot or (json_file.with_suffix(".png") if json_file else None)
    if picture is not None and result["rows"]:
        try:
            data = bench_report.plot(result)
        except ImportError:
            note("no plot: it needs matplotlib; pip install 'lutdeploy[bench]'")
        else:
            files.write_atomic(picture, data)
            written.append(picture)
    return written


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lutdeploy.engines.benchmark import report as bench_report

    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    for table in bench_report.tables(result):
        shown = Table(title=table.title, title_justify="left")
        for k, name in enumerate(table.header):
            shown.add_column(name, justify="right" if k else "left", no_wrap=True)
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
    for remark in bench_report.remarks(result):
        click.echo(remark)
