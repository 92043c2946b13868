"""What commands say to a person: notes, progress, reports, last words."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from lutdeploy.errors import Terminated

if TYPE_CHECKING:
    from rich.progress import Progress

    from lutdeploy.training.evaluation.evaluate import Evaluation
    from lutdeploy.training.evaluation.features import Extractor


def interrupted_code(stop: BaseException | None) -> int:
    """The exit code of a command that a signal ended: 128 + its number, as shells report it."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def stop_with(message: str, code: int) -> None:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def note(text: str) -> None:
    """What a person wants to know and a pipe does not."""
    click.echo(text, err=True)


@contextlib.contextmanager
def progress_bar(*fields: str) -> Iterator[Progress]:
    """A progress bar on stderr with the named fields and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = [TextColumn("{task.fields[" + name + "]}") for name in fields]
    with Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        yield bar


def show_report(report: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{report.precision}, {report.schedule.describe()}, {report.images} images"
    table = Table("level", "what", "measure", "value", "limit", "", title=title)
    for check in report.checks:
        verdict = "[green]ok[/]" if check.passed else "[red]FAILED[/]"
        table.add_row(
            check.level,
            check.what,
            check.measure,
            f"{check.value:.3g}",
            f"{check.limit:.3g}",
            verdict,
        )
    console = Console(stderr=True)
    console.print(table)
    final = report.final
    drift = [report.drift[k] for k in sorted({0, len(report.drift) // 2, len(report.drift) - 1})]
    console.print(
        f"final pictures: max abs {final.max_abs:.3g}, PSNR {final.psnr:.1f} dB, cosine "
        f"{final.cosine:.8f}; rms drift, first to last step: {', '.join(f'{d:.2g}' for d in drift)}"
    )


def show_evaluation(evaluation: Evaluation, extractor: Extractor) -> None:
    from rich.console import Console
    from rich.table import Table

    from lutdeploy.training.evaluation import report

    console = Console(stderr=True)
    for found in (
        report.metric_table(evaluation, extractor),
        report.memorisation_table(evaluation),
    ):
        table = Table(title=found.title)
        for column, head in enumerate(found.heads):
            table.add_column(head, justify="left" if column < found.text_columns else "right")
        for row in found.rows:
            table.add_row(*row)
        console.print(table)
    for sentence in report.sentences(evaluation):
        console.print(sentence, markup=False, highlight=False)
