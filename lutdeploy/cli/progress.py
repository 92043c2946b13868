"""How far long work is: a bar that moves on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from lutdeploy.cli.console import note

# Seconds between two lines of a log.
SELDOM = 60.0  # at most, as long as something happens
OFTEN = 5.0  # at least; what deserves a line is a tenth of the work, or another phase
RECENT = 30.0  # seconds whose speed tells how long the rest will take


class Progress(Protocol):
    """Shows how far tasks are, as :class:`rich.progress.Progress` does."""

    def add_task(
        self, description: str, *, total: float | None = None, completed: int = 0, **fields: Any
    ) -> Any:
        """Show another task, whose total may be unknown; returns what names it."""

    def update(
        self,
        task_id: Any,
        *,
        total: float | None = None,
        completed: float | None = None,
        advance: float | None = None,
        description: str | None = None,
        **fields: Any,
    ) -> None:
        """Say what is new of a task; ``advance`` adds to what is completed."""


def progress_bar(*fields: str) -> AbstractContextManager[Progress]:
    """Progress on stderr with the named fields and the time left."""
    if not _bars_move():
        return _log_lines()
    from lutdeploy.cli.bars import counting_bar  # rich, only where there is a bar

    return counting_bar(fields)


def phases() -> AbstractContextManager[Progress]:
    """The phase of work whose end nobody knows, and the time that it has taken."""
    if not _bars_move():
        return _log_lines()
    from lutdeploy.cli.bars import phase_bar

    return phase_bar()


def _bars_move() -> bool:
    """Whether stderr is a terminal that can. FORCE_COLOR does not make one of a file."""
    return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


@contextlib.contextmanager
def _log_lines() -> Iterator[Progress]:
    lines = LogLines()
    try:
        yield lines
    finally:
        lines.finish()


@dataclass
class Task:
    """A piece of work, and how much of it was completed when."""

    description: str
    total: float | None
    completed: float
    fields: dict[str, Any]
    recent: deque[tuple[float, float]] = field(default_factory=deque)  # (seconds, completed)

    def reach(self, completed: float) -> None:
        """Remember that this much is completed now."""
        now, self.completed = time.monotonic(), completed
        self.recent.append((now, completed))
        while self.recent[0][0] < now - RECENT:
            self.recent.popleft()

    def seconds_left(self) -> float | None:
        """What the rest takes at the speed of late; None where that is unknown, or nothing left."""
        (before, less), (now, more) = self.recent[0], self.recent[-1]
        if self.total is None or self.completed >= self.total or now == before or more == less:
            return None
        return math.ceil((self.total - self.completed) * (now - before) / (more - less))


class LogLines:
    """A :class:`Progress` that writes a line where it is worth one."""

    def __init__(self) -> None:
        self._tasks: list[Task] = []
        self._said: dict[int, str] = {}  # by task
        self._news: object = None  # what the last line was about
        self._time = time.monotonic()  # when that was

    def add_task(
        self, description: str, *, total: float | None = None, completed: int = 0, **fields: Any
    ) -> int:
        self._tasks.append(Task(description, total, completed, fields))
        self._tasks[-1].reach(completed)
        return len(self._tasks) - 1

    def update(
        self,
        task_id: int,
        *,
        total: float | None = None,
        completed: float | None = None,
        advance: float | None = None,
        description: str | None = None,
        **fields: Any,
    ) -> None:
        task, waited = self._tasks[task_id], time.monotonic() - self._time
        task.total = task.total if total is None else total
        task.description = description or task.description
        task.fields.update(fields)
        if completed is not None or advance is not None:
            task.reach((task.completed if completed is None else completed) + (advance or 0))
        phase = describe(task) if not task.total else int(10 * task.completed / task.total)
        news = (task_id, phase)
        if waited >= SELDOM or (waited >= OFTEN and news != self._news):
            self._say(task_id)
            self._news, self._time = news, time.monotonic()

    def finish(self) -> None:
        """Write how far every task came of which something happened."""
        for number, task in enumerate(self._tasks):
            if task.completed or any(task.fields.values()):
                self._say(number)

    def _say(self, number: int) -> None:
        """Write how far a task is, unless that was said."""
        text = describe(self._tasks[number])
        if self._said.get(number) != text:
            note(text)
            self._said[number] = text


def describe(task: Task) -> str:
    """How far a task is, in one line."""
    parts = [task.description]
    if task.total:
        count = f" {task.completed:g} of {task.total:g}," if task.total > 1 else ""
        percentage = min(100.0, 100 * task.completed / task.total)
        parts = [f"{task.description}{count} {percentage:.0f}%"]
    parts += [text for text in task.fields.values() if text]
    left = task.seconds_left()
    if left is not None:
        parts.append(f"{datetime.timedelta(seconds=left)} left")
    return ", ".join(parts)
