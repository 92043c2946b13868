"""A contender's process: what runs in it. Its other end is process.py.

A process of its own for each, because a thread pool that has nothing to do may spin and slow
down whoever comes next, because peak memory belongs to a process, and because one that dies
takes nobody along. Nothing heavy is imported before the contender asks for it: the time until
its first step is what a user waits for.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lutdeploy.artefacts import files
from lutdeploy.engines.benchmark.contenders import Contender, open_contender

END = "end"


def serve(contender: Contender, threads: int | None, started: float, link: Connection) -> None:
    """A contender's process: opens it, then answers requests until there are no more.

    Args:
        contender: what to open.
        threads: see :func:`engines.open_engine`.
        started: time.time() just before the process was started.
        link: gets ("ok", value) or ("error", reason) for every request.
    """
    with _answering(link):
        host = Host(contender, threads, started)
        _answer(link, host.ready, host.requests())


def serve_limits(device: str, size: int, threads: int | None, link: Connection) -> None:
    """The process that measures the limits of a device."""
    from lutdeploy.engines.benchmark import limits as bench_limits

    with _answering(link):
        tries = bench_limits.open_limits(device, size, threads)
        _answer(link, True, {"measure": lambda: bench_limits.measure(tries)})


@contextlib.contextmanager
def _answering(link: Connection) -> Iterator[None]:
    """What prevents an answer becomes the answer."""
    try:
        yield
    except (EOFError, BrokenPipeError):
        pass  # nobody asks any more
    except Exception as error:
        link.send(("error", reason(error)))


def _answer(link: Connection, ready: Any, requests: dict[str, Callable[..., Any]]) -> None:
    link.send(("ok", ready))
    while True:
        name, *arguments = link.recv()
        if name == END:
            return
        try:
            answer = ("ok", requests[name](*arguments))
        except Exception as error:  # of any library: the contender's, not the benchmark's
            answer = ("error", reason(error))
        link.send(answer)


def reason(error: BaseException) -> str:
    """One line of what an exception says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return "out of memory" if isinstance(error, MemoryError) else first[:300]


def redirect_output(file: Path) -> None:
    """Let everything that libraries print in this process go to a file."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


class Host:
    """An open contender."""

    def __init__(self, contender: Contender, threads: int | None, started: float) -> None:
        running = time.time()
        self.denoiser = open_contender(contender, threads)
        opened = time.time()
        self._noise: Any = None
        self._streams = callable(getattr(self.denoiser, "stream", None))
        schedule = self.denoiser.schedule
        first = self._work(1, schedule)
        first()
        finished = time.time()
        identity = getattr(self.denoiser, "identity", None)
        digest = identity["engine_sha256"] if identity else files.sha256(contender.path)
        self.ready = {
            "config": self.denoiser.config,
            "table": schedule,
            "whole_trajectory": self.denoiser.whole_trajectory,
            "engine_sha256": digest,
            "computes_on": identity["device"] if identity else contender.device,
            "startup": {
                "seconds": finished - started,
                "python_seconds": running - started,
                "open_seconds": opened - running,  # with the imports that it takes
                "first_step_seconds": finished - opened,
            },
        }

    def requests(self) -> dict[str, Callable[..., Any]]:
        """What can be asked for, by name."""
        return {
            "step": self.denoiser.step,
            "predict_x0": self.denoiser.predict_x0,
            "run": self.denoiser.run,
            "stream": self.stream,
            "window": self.window,
            "trajectory": self.trajectory,
        }

    def stream(self, noise: Any, schedule: Any, pixels: bool) -> list[Any]:
        """The denoiser's own way through a trajectory: images of one batch."""
        return list(self.denoiser.stream([(range(len(noise)), noise)], schedule, pixels))

    def window(
        self, batch: int, schedule: Any, pause: float, seconds: float, least: int
    ) -> tuple[list[float], int]:
        """A pause, an untimed step, then timed ones.

        Args:
            batch: B.
            schedule: what a denoiser that walks by itself walks; a time is that of one step.
            pause: seconds in which other processes' idle threads fall asleep.
            seconds: that the steps should last together.
            least: how many there must be.

        Returns:
            Seconds of each step, and the peak memory so far in bytes.
        """
        time.sleep(pause)
        work = self._work(batch, schedule)
        work()
        times: list[float] = []
        while len(times) < least or sum(times) < seconds:
            start = time.perf_counter()
            evaluations = work()
            times.append((time.perf_counter() - start) / evaluations)
        return times, peak_memory()

    def trajectory(self, batch: int, schedule: Any) -> float:
        """Seconds of a whole trajectory, noise in and images out, after an untimed step."""
        from lutdeploy.sampling import finished_batches

        self._work(batch, schedule)()
        work = [(range(batch), self._images(batch))]
        start = time.perf_counter()
        for _ in finished_batches(self.denoiser, work, schedule, pixels=True):
            pass
        return time.perf_counter() - start

    def _images(self, batch: int) -> Any:
        from lutdeploy.sampling import batch_noise

        if self._noise is None or len(self._noise) < batch:
            self._noise = batch_noise(0, range(batch), self.denoiser.config.image_shape)
        return self._noise[:batch]

    def _work(self, batch: int, schedule: Any) -> Callable[[], int]:
        """The shortest thing that it does by itself; the call returns how many steps that is."""
        from lutdeploy.schedule import solver_schedule

        noise = self._images(batch)
        schedule = self.denoiser.schedule or schedule or solver_schedule("euler", 2)
        if self._streams:

            def stream() -> int:
                self.stream(noise, schedule, True)
                return int(schedule.steps)

            return stream
        if self.denoiser.whole_trajectory:

            def run() -> int:
                self.denoiser.run(noise)
                return int(schedule.steps)

            return run
        row = schedule.rows[schedule.steps // 2]

        def step() -> int:
            self.denoiser.step(noise, row, noise)
            return 1

        return step


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
