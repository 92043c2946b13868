"""What commands say to a person or a log: answers, notes, reports, last words.

Nothing else in the command line writes to a stream. Whatever reads there, a terminal of any
encoding, a file, a pipe that closes early, must not cost the work that was done.
"""

from __future__ import annotations

import codecs
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from lutdeploy.errors import Terminated

if TYPE_CHECKING:
    from rich.console import Console

    from lutdeploy.training.evaluation.evaluate import Evaluation
    from lutdeploy.training.evaluation.features import Extractor

WIDE = 160  # columns, where no terminal sets a limit
ENCODING_ERRORS = "lutdeploy"


def prepare_streams() -> None:
    """Let stdout and stderr take every text: names of files as their bytes, the rest escaped."""
    codecs.register_error(ENCODING_ERRORS, _encode_anyhow)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a notebook, say, put something else
            stream.reconfigure(errors=ENCODING_ERRORS)


def _encode_anyhow(error: UnicodeError) -> tuple[str | bytes, int]:
    """A byte that Python could not decode as that byte, any other character as in its source."""
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return character.encode("ascii", "backslashreplace").decode(), error.start + 1


def discard_streams() -> None:
    """Throw away what is still to be written, since nobody reads it; also at the very end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def interrupted_code(stop: BaseException | None) -> int:
    """The exit code of a command that a signal ended: 128 + its number, as shells report it."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def stop_with(message: str, code: int) -> None:
    note(f"error: {' '.join(message.split())}")
    sys.exit(code)


def note(text: str) -> None:
    """What a person wants to know and a pipe does not."""
    print(text, file=sys.stderr, flush=True)


def answer(value: object) -> None:
    """A line of what the command was run for."""
    print(value, flush=True)


def console(stderr: bool = True) -> Console:
    """Where tables are shown: as wide as the terminal, or as it takes."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else WIDE)


def show_report(report: Any) -> None:
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
    console().print(table)
    final = report.final
    drift = [report.drift[k] for k in sorted({0, len(report.drift) // 2, len(report.drift) - 1})]
    note(
        f"final pictures: max abs {final.max_abs:.3g}, PSNR {final.psnr:.1f} dB, cosine "
        f"{final.cosine:.8f}; rms drift, first to last step: {', '.join(f'{d:.2g}' for d in drift)}"
    )


def show_evaluation(evaluation: Evaluation, extractor: Extractor) -> None:
    from rich.table import Table

    from lutdeploy.training.evaluation import report

    for found in (
        report.metric_table(evaluation, extractor),
        report.memorisation_table(evaluation),
    ):
        table = Table(title=found.title)
        for column, head in enumerate(found.heads):
            table.add_column(head, justify="left" if column < found.text_columns else "right")
        for row in found.rows:
            table.add_row(*row)
        console().print(table)
    for sentence in report.sentences(evaluation):
        note(sentence)
