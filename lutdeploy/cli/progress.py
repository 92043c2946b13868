"""How far long work is: a bar that moves on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lutdeploy.cli.console import console, note

# Seconds between two lines of a log.
SELDOM = 60.0  # at most, as long as something happens
OFTEN = 5.0  # at least; what deserves a line is a tenth of the work, or another phase


@contextlib.contextmanager
def progress_bar(*fields: str) -> Iterator[Progress]:
    """Progress on stderr with the named fields and the time left."""
    columns = [TextColumn("{task.fields[" + name + "]}") for name in fields]
    description = TextColumn("{task.description}")
    with _progress(
        description, BarColumn(), MofNCompleteColumn(), *columns, TimeRemainingColumn()
    ) as progress:
        yield progress


@contextlib.contextmanager
def phases() -> Iterator[Progress]:
    """The phase of work whose end nobody knows, and the time that it has taken."""
    columns = (SpinnerColumn("line"), TextColumn("{task.description}"), TimeElapsedColumn())
    with _progress(*columns) as progress:
        yield progress


@contextlib.contextmanager
def _progress(*columns: ProgressColumn) -> Iterator[Progress]:
    """A bar where it can move. FORCE_COLOR, which rich takes for a terminal, does not move it."""
    where = console()
    if sys.stderr.isatty() and not where.is_dumb_terminal:
        with Progress(*columns, console=where) as bar:
            yield bar
        return
    lines = LogLines()
    try:
        yield lines
    finally:
        for task in lines.tasks:
            if task.completed or any(task.fields.values()):
                lines.say(task)


class LogLines(Progress):
    """Keeps count as a bar does, and writes lines that are worth it."""

    def __init__(self) -> None:
        super().__init__(disable=True)
        self._said: dict[int, str] = {}  # by task
        self._news: object = None  # what the last line was about
        self._time = time.monotonic()  # when that was

    def update(self, *arguments: Any, **values: Any) -> None:
        """See :class:`rich.progress.Progress`."""
        super().update(*arguments, **values)
        task, waited = self.tasks[arguments[0]], time.monotonic() - self._time
        phase = describe(task) if task.total is None else int(10 * task.completed / task.total)
        news = (task.id, phase)
        if waited >= SELDOM or (waited >= OFTEN and news != self._news):
            self.say(task)
            self._news, self._time = news, time.monotonic()

    def say(self, task: Task) -> None:
        """Write how far a task is, unless that was said."""
        text = describe(task)
        if self._said.get(task.id) != text:
            note(text)
            self._said[task.id] = text


def describe(task: Task) -> str:
    """How far a task is, in one line."""
    parts = [task.description]
    if task.total:
        count = f" {task.completed:g} of {task.total:g}," if task.total > 1 else ""
        parts = [f"{task.description}{count} {task.percentage:.0f}%"]
    parts += [text for text in task.fields.values() if text]
    if task.total and not task.finished and task.time_remaining:
        parts.append(f"{datetime.timedelta(seconds=int(task.time_remaining))} left")
    return ", ".join(parts)
