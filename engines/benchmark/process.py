"""A process for each contender, from both of its ends.

Each has one of its own because a thread pool that has nothing to do may spin and slow down
whoever comes next, because peak memory belongs to a process, and because one that dies takes
nobody along. Nothing heavy is imported before the contender asks for it: the time until its
first step is what a user waits for.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lutdeploy.artefacts import files
from lutdeploy.config import ModelConfig
from lutdeploy.engines.benchmark.contenders import Contender, open_contender
from lutdeploy.errors import BackendError, ran_out_of_memory
from lutdeploy.sampling import Batch, Finished, Images, batch_noise, finished_batches
from lutdeploy.schedule import Schedule, Step, solver_schedule

PATIENCE = 1800.0  # seconds for one answer: compiling at a large size takes minutes
FAREWELL = 3.0  # seconds in which a process may end by itself

T = TypeVar("T")


class Isolated:
    """An object in a process of its own, which ends with this one or with the parent.

    ``make(*arguments)`` makes the object there when it is first asked for something; ``log``
    gets what libraries print.
    """

    def __init__(self, log: Path, make: Callable[..., Any], *arguments: Hashable) -> None:
        self._log, self._make, self._arguments = log, make, arguments
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _prepare, (log,))
        others = set(multiprocessing.active_children())
        # A terminal sends Ctrl-C to every process, and a starting Python would print a traceback.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._pool.submit(os.getpid)  # the process starts with its first task
        finally:
            signal.signal(signal.SIGINT, before)
        (self.process,) = set(multiprocessing.active_children()) - others

    def ask(self, method: Callable[..., T], *arguments: Any) -> T:
        """Call ``method`` with the object, in its process, and wait for the answer."""
        try:
            answer = self._pool.submit(_call, self._make, self._arguments, method, arguments)
            return answer.result(PATIENCE)
        except TimeoutError as error:
            raise BackendError(f"no answer within {PATIENCE:.0f} seconds") from error
        except BrokenProcessPool as error:
            raise BackendError(self._last_words()) from error

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.process.join(FAREWELL)
        self.process.kill()
        self.process.join()

    def _last_words(self) -> str:
        self._pool.shutdown()  # its exit code is known then
        code = self.process.exitcode
        end = f"its process ended with exit code {code}."
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            end = f"its process was ended by {name}{': out of memory?' * (name == 'SIGKILL')}"
        with contextlib.suppress(OSError):
            said = self._log.read_text(errors="replace").strip().splitlines()
            end += f" {said[-1].strip()[:200]}" if said else ""
        return end


def _prepare(log: Path) -> None:
    """Send to a file what libraries print, ignore Ctrl-C, and end when the parent does."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@cache
def _made(make: Callable[..., Any], arguments: tuple[Hashable, ...]) -> Any:
    """The object of this process."""
    return make(*arguments)


def _call(make: Callable[..., Any], made_of: Any, method: Callable[..., T], arguments: Any) -> T:
    try:
        return method(_made(make, made_of), *arguments)
    except Exception as error:  # of any library, whose exceptions may not survive the journey
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:300] if lines else type(error).__name__
        if ran_out_of_memory(error):
            reason = "out of memory"
        raise BackendError(reason) from None


class Window(NamedTuple):
    """Some steps in a row: seconds of each, and the process's peak memory so far in bytes."""

    seconds: list[float]
    peak_bytes: int
    engine_sha256: str  # of what computed them

    @property
    def median(self) -> float:
        return median(self.seconds)


@dataclass(frozen=True)
class About:
    """What an open contender says of itself."""

    config: ModelConfig
    schedule: Schedule | None
    whole_trajectory: bool
    engine_sha256: str  # of what is open first
    computes_on: str  # as the engine's identity says
    startup: dict[str, float]  # seconds


class Host:
    """A contender, open in this process, after its first step.

    ``started`` is time.time() just before the process was started.
    """

    def __init__(self, contender: Contender, threads: int | None, started: float) -> None:
        running = time.time()
        self._contender, self._threads, self._batch = contender, threads, 1
        self.denoiser = open_contender(contender, threads, self._batch)
        opened = time.time()
        self._noise: Images = np.empty(0, np.float32)  # of the largest batch so far
        compute, _ = self._shortest(1, solver_schedule("euler", 2))
        compute()
        finished = time.time()
        identity = getattr(self.denoiser, "identity", None)
        self.about = About(
            self.denoiser.config,
            self.denoiser.schedule,
            self.denoiser.whole_trajectory,
            self.engine_sha256,
            identity["device"] if identity else contender.device,
            {
                "seconds": finished - started,
                "python_seconds": running - started,
                "open_seconds": opened - running,  # with the imports that it takes
                "first_step_seconds": finished - opened,
            },
        )

    @property
    def engine_sha256(self) -> str:
        """Of what is open now."""
        identity = getattr(self.denoiser, "identity", None)
        return identity["engine_sha256"] if identity else files.sha256(self._contender.path)

    def _open_for(self, batch: int) -> None:
        """Have open what `lutdeploy sample --batch` would open."""
        if self._contender.by_batch and batch != self._batch:
            self.denoiser.close()
            self.denoiser = open_contender(self._contender, self._threads, batch)
            self._batch = batch

    def compute(self, name: str, *arguments: Any) -> Any:
        """What a method of the denoiser returns; of ``stream`` a list."""
        answer = getattr(self.denoiser, name)(*arguments)
        return list(answer) if name == "stream" else answer

    def window(
        self, batch: int, schedule: Schedule, pause: float, seconds: float, least: int
    ) -> Window:
        """An untimed step, then at least ``least`` timed ones that together last ``seconds``.

        Other processes' idle threads fall asleep in the ``pause`` before, in seconds. A denoiser
        that walks by itself walks the whole schedule; a time is that of one step.
        """
        self._open_for(batch)
        time.sleep(pause)
        compute, steps = self._shortest(batch, schedule)
        compute()
        times: list[float] = []
        while len(times) < least or sum(times) < seconds:
            start = time.perf_counter()
            compute()
            times.append((time.perf_counter() - start) / steps)
        return Window(times, peak_memory(), self.engine_sha256)

    def trajectory(self, batch: int, schedule: Schedule) -> float:
        """Seconds of a whole trajectory, noise in and images out, after an untimed step."""
        self._open_for(batch)
        compute, _ = self._shortest(batch, schedule)
        compute()
        work = [(range(batch), self._images(batch))]
        start = time.perf_counter()
        for _ in finished_batches(self.denoiser, work, schedule, pixels=True):
            pass
        return time.perf_counter() - start

    def _images(self, batch: int) -> Images:
        if len(self._noise) < batch:
            self._noise = batch_noise(0, range(batch), self.denoiser.config.image_shape)
        return self._noise[:batch]

    def _shortest(self, batch: int, schedule: Schedule) -> tuple[Callable[[], Any], int]:
        """The shortest computation that it does by itself, and how many steps that is."""
        noise, denoiser = self._images(batch), self.denoiser
        schedule = denoiser.schedule or schedule
        if hasattr(denoiser, "stream"):
            work = [(range(batch), noise)]
            return partial(self.compute, "stream", work, schedule, True), schedule.steps
        if denoiser.whole_trajectory:
            return partial(denoiser.run, noise), schedule.steps
        row = schedule.rows[schedule.steps // 2]
        return partial(denoiser.step, noise, row, noise), 1


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    if sys.platform == "linux":
        # Not ru_maxrss, which a new process inherits from the one that started it.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Worker(Isolated):
    """A contender in its process; once open, a :class:`lutdeploy.sampling.Denoiser`."""

    def open(self) -> About:
        """Open the contender and say what it is."""
        about: About = self.ask(attrgetter("about"))
        self.config, self.schedule = about.config, about.schedule
        self.whole_trajectory = about.whole_trajectory
        return about

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        return self.ask(Host.compute, "step", x, row, x0_prev)

    def predict_x0(self, x: Images, t: NDArray[np.float32]) -> Images:
        return self.ask(Host.compute, "predict_x0", x, t)

    def run(self, noise: Images) -> Images:
        return self.ask(Host.compute, "run", noise)


class StreamingWorker(Worker):
    """A contender that walks whole trajectories by itself, as all on a GPU do."""

    def stream(
        self, batches: Iterable[Batch], schedule: Schedule, pixels: bool
    ) -> Iterator[Finished]:
        for batch in batches:
            yield from self.ask(Host.compute, "stream", [batch], schedule, pixels)


def start(contender: Contender, threads: int | None, log: Path) -> Worker:
    """Start a contender's process."""
    kind = Worker if contender.device == "cpu" else StreamingWorker
    return kind(log, Host, contender, threads, time.time())
