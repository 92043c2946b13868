"""The other end of a contender's process, see :mod:`lutdeploy.engines.benchmark.worker`."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lutdeploy.config import ModelConfig
from lutdeploy.engines.benchmark import worker as bench_worker
from lutdeploy.engines.benchmark.contenders import Contender
from lutdeploy.errors import BackendError
from lutdeploy.sampling import Batch, Finished, Images
from lutdeploy.schedule import Schedule, Step

PATIENCE = 1800.0  # seconds for one answer: compiling at a large size takes minutes
FAREWELL = 3.0  # seconds in which a process may end by itself


class Process:
    """A process that answers requests, and dies with this object or with this process.

    Args:
        target: of :mod:`lutdeploy.engines.benchmark.worker`; its last argument is the link.
        arguments: the others.
        log: what the process prints.
    """

    def __init__(self, target: Callable[..., None], arguments: tuple[Any, ...], log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._link, there = context.Pipe()
        self._log = log
        self._process = context.Process(
            target=_quietly, args=(log, target, *arguments, there), daemon=True
        )
        with _without_interrupts():
            self._process.start()
        there.close()  # a process that dies is then an EOFError on this side
        try:
            self.ready = self._receive()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def ask(self, name: str, *arguments: Any) -> Any:
        """Send a request and wait for its answer.

        Raises:
            BackendError: the process says why it has none, or has died.
        """
        try:
            self._link.send((name, *arguments))
        except OSError as error:
            raise BackendError(self._last_words()) from error
        return self._receive()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._link.send((bench_worker.END,))
        self._link.close()
        self._process.join(FAREWELL)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> Any:
        try:
            if not self._link.poll(PATIENCE):
                raise BackendError(f"no answer within {PATIENCE:.0f} seconds")
            verdict, value = self._link.recv()
        except (EOFError, OSError) as error:
            raise BackendError(self._last_words()) from error
        if verdict == "error":
            raise BackendError(value)
        return value

    def _last_words(self) -> str:
        self._process.join(FAREWELL)
        code = self._process.exitcode
        said = ""
        with contextlib.suppress(OSError):
            lines = self._log.read_text(errors="replace").split("\n")
            said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = ": out of memory?" if name == "SIGKILL" else ""
            return f"its process was ended by {name}{hint} {said[:200]}".strip()
        return f"its process ended with exit code {code}. {said[:200]}".strip()


def _quietly(log: Path, target: Callable[..., None], *arguments: Any) -> None:
    bench_worker.redirect_output(log)
    target(*arguments)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """What starts in here never sees Ctrl-C, which a terminal sends to everyone.

    For this process it is only put off until the end of the block.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Worker:
    """A contender in its process; a :class:`lutdeploy.sampling.Denoiser` that computes there.

    Raises:
        BackendError: it cannot run here, with the reason.
    """

    def __init__(self, contender: Contender, threads: int | None, log: Path) -> None:
        self.contender = contender
        arguments = (contender, threads, time.time())
        self.process = Process(bench_worker.serve, arguments, log)
        ready = self.process.ready
        self.config: ModelConfig = ready["config"]
        self.schedule: Schedule | None = ready["table"]
        self.whole_trajectory: bool = ready["whole_trajectory"]
        self.engine_sha256: str = ready["engine_sha256"]
        self.computes_on: str = ready["computes_on"]
        self.startup: dict[str, float] = ready["startup"]

    def close(self) -> None:
        """End the process."""
        self.process.close()

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        """See :class:`lutdeploy.sampling.Denoiser`."""
        x_next, x0 = self.process.ask("step", x, row, x0_prev)
        return x_next, x0

    def run(self, noise: Images) -> Images:
        """See :class:`lutdeploy.sampling.Denoiser`."""
        images: Images = self.process.ask("run", noise)
        return images

    def predict_x0(self, x: Images, t: NDArray[np.float32]) -> Images:
        """See :class:`lutdeploy.sampling.Denoiser`."""
        x0: Images = self.process.ask("predict_x0", x, t)
        return x0

    def window(
        self, batch: int, schedule: Schedule, pause: float, seconds: float, least: int
    ) -> tuple[list[float], int]:
        """See :meth:`lutdeploy.engines.benchmark.worker.Host.window`."""
        times, peak_bytes = self.process.ask("window", batch, schedule, pause, seconds, least)
        return times, peak_bytes

    def trajectory(self, batch: int, schedule: Schedule) -> float:
        """See :meth:`lutdeploy.engines.benchmark.worker.Host.trajectory`."""
        return float(self.process.ask("trajectory", batch, schedule))


class StreamingWorker(Worker):
    """A contender that walks whole trajectories by itself."""

    def stream(
        self, batches: Iterable[Batch], schedule: Schedule, pixels: bool
    ) -> Iterator[Finished]:
        """See :class:`lutdeploy.sampling.StreamingDenoiser`."""
        for indices, noise in batches:
            parts = self.process.ask("stream", noise, schedule, pixels)
            yield indices, np.concatenate([images for _, images in parts])


def start(contender: Contender, threads: int | None, log: Path) -> Worker:
    """Start a contender's process.

    Raises:
        BackendError: it cannot run here, with the reason.
    """
    kind = Worker if contender.place == "cpu" else StreamingWorker  # as all engines on a GPU do
    return kind(contender, threads, log)


class Limits:
    """The process that measures the limits of a device."""

    def __init__(self, device: str, size: int, threads: int | None, log: Path) -> None:
        self.process = Process(bench_worker.serve_limits, (device, size, threads), log)

    def measure(self) -> dict[str, float]:
        """Seconds of the best try of each, see limits.measure."""
        found: dict[str, float] = self.process.ask("measure")
        return found

    def close(self) -> None:
        """End the process."""
        self.process.close()
