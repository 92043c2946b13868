"""The bars that move on a terminal, drawn by rich, whose import a log should not wait for."""

from __future__ import annotations

from collections.abc import Sequence

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lutdeploy.cli.console import console


def counting_bar(fields: Sequence[str]) -> Progress:
    """How much of a total is done, the named fields and the time left."""
    columns = [TextColumn("{task.fields[" + name + "]}") for name in fields]
    description = TextColumn("{task.description}")
    return Progress(
        description,
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console(),
    )


def phase_bar() -> Progress:
    """What is being done, and the time that it has taken."""
    columns = (SpinnerColumn("line"), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=console())
