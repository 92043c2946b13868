"""The command line in processes of their own, which can be stopped, interrupted and killed.

They are forks of one process that has imported what commands import, PyTorch above all, which
takes two seconds of a processor each time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import pytest

PRELOADED = ["torch", "lutdeploy.cli.sample", "lutdeploy.cli.train", "lutdeploy.training.session"]
PRELOADED += ["lutdeploy.reference", "lutdeploy.engines.onnxruntime"]


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")  # read when PyTorch is imported
        ensure_running()
    return context


def _work(arguments: list[str], outputs: tuple[str, str]) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    # A shell may have told background jobs to ignore Ctrl-C; these must not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["lutdeploy", *arguments]
    from lutdeploy.cli import cli

    cli()


class Command:
    """`lutdeploy` with some arguments, which has begun in the current folder."""

    def __init__(self, *arguments: object) -> None:
        files = [tempfile.NamedTemporaryFile(delete=False) for _ in range(2)]
        self._outputs = tuple(Path(file.name) for file in files)
        words = [str(argument) for argument in arguments]
        paths = tuple(map(str, self._outputs))
        self._process = _context().Process(target=_work, args=(words, paths))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until it has ended; stdout and stderr."""
        self._process.join(timeout)
        assert self.returncode is not None, "it does not end"
        out, error = (path.read_text(encoding="utf-8") for path in self._outputs)
        return out, error

    def close(self) -> None:
        """Kill it, if it has not ended."""
        self._process.kill()
        self._process.join()
        for path in self._outputs:
            path.unlink()


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[Command]:
    """A command that does not outlive the block."""
    command = Command(*arguments)
    try:
        yield command
    finally:
        command.close()
