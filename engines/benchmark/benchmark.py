"""`lutdeploy bench`: the contenders side by side, in interleaved rounds, beside the limits.

The method is in method.py, the processes are in process.py.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from lutdeploy.engines.benchmark import process as bench_process
from lutdeploy.engines.benchmark.contenders import ORIGINAL, Contender
from lutdeploy.engines.benchmark.findings import Entry, Findings, Settings
from lutdeploy.engines.benchmark.method import (
    WINDOWS,
    Window,
    best_row,
    block_seconds,
    gains,
    settled,
    sweep_sizes,
)
from lutdeploy.engines.benchmark.process import Worker
from lutdeploy.engines.benchmark.subject import Subject
from lutdeploy.errors import BackendError
from lutdeploy.sampling import Denoiser, Images
from lutdeploy.schedule import Step

CHECKED_IMAGES = 2  # of the comparison with the original
TRAJECTORIES = 3  # at most, of which the median counts


@dataclass(frozen=True)
class Progress:
    """What is being done, and how many turns of those that are planned so far."""

    text: str
    done: int
    total: int


class Benchmark:
    """One run of the benchmark; what it has found so far is there at any time.

    Args:
        subject: the model.
        contenders: the original among them.
        settings: see there.
        start: starts a contender's process.
        limits: starts the process that measures a device's limits.
    """

    def __init__(
        self,
        subject: Subject,
        contenders: Sequence[Contender],
        settings: Settings,
        start: Callable[[Contender, int | None, Path], Any] = bench_process.start,
        limits: Callable[[str, int, int | None, Path], Any] = bench_process.Limits,
    ) -> None:
        self.subject, self.settings = subject, settings
        self.entries = {contender.name: Entry(contender) for contender in contenders}
        self.findings = Findings(subject, settings, self.entries)
        self._start, self._limits = start, limits
        self._workers: dict[str, Worker] = {}
        self._limiters: dict[str, bench_process.Limits] = {}
        self._done = self._total = 0

    def run(self) -> Iterator[Progress]:
        """Measure everything; yields before each thing that takes time.

        Raises:
            BackendError: the original cannot run.
        """
        try:
            yield from self._open()
            yield from self._check()
            yield from self._open_limits()
            yield from self._rounds()
            yield from self._trajectories()
            self._close()
            yield from self._end_to_end()
        finally:
            self._close()

    def _close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        for limiter in self._limiters.values():
            limiter.close()
        self._workers.clear()
        self._limiters.clear()

    def _drop(self, name: str, status: str, reason: str) -> None:
        """A contender takes no further part; what it has shown before stays."""
        entry = self.entries[name]
        entry.status = "measured" if entry.windows else status
        entry.reason = reason
        if worker := self._workers.pop(name, None):
            worker.close()

    def _log(self, name: str) -> Path:
        return self.subject.scratch / f"{name}.log"

    def _say(self, text: str) -> Progress:
        return Progress(text, self._done, max(self._total, self._done))

    def _turn(self) -> None:
        self._done += 1

    # The phases.

    def _open(self) -> Iterator[Progress]:
        """One after the other, so that each has the machine to itself while it starts."""
        self._total += 2 * len(self.entries)
        for name, entry in self.entries.items():
            yield self._say(f"start {name}")
            try:
                worker = self._start(entry.contender, self.settings.threads, self._log(name))
            except BackendError as error:
                if name == ORIGINAL:
                    raise
                self._drop(name, "absent", str(error))
            else:
                self._workers[name] = worker
                entry.engine_sha256, entry.startup = worker.engine_sha256, worker.startup
                entry.computes_on = worker.computes_on
            self._turn()

    def _check(self) -> Iterator[Progress]:
        """The gate: who does not compute what the original computes is not timed."""
        from lutdeploy.artefacts.checkpoint import load_model
        from lutdeploy.parity import compare
        from lutdeploy.sampling import batch_noise

        model = load_model(self.subject.model)
        noise = batch_noise(0, range(CHECKED_IMAGES), self.subject.config.image_shape)
        original = self._workers[ORIGINAL]
        reference = Remembered(original)
        for name, worker in list(self._workers.items()):
            if worker is original:
                continue
            yield self._say(f"compare {name} with the original")
            contender = self.entries[name].contender
            walks = worker.whole_trajectory or contender.place != "cpu"
            levels = ("trajectory", "picture") if walks else ("step",)  # as it is timed
            schedule = worker.schedule or self.settings.schedule
            try:
                report = compare(
                    *(model, worker, contender.precision, schedule, noise, levels),
                    reference=reference,
                )
            except BackendError as error:
                self._drop(name, "failed", str(error))
            else:
                if not report.passed:
                    reason = f"differs from the original: {report.failures()[0]}"
                    self._drop(name, "refused", reason)
            self._turn()

    def _open_limits(self) -> Iterator[Progress]:
        for device in sorted({self.entries[name].contender.place for name in self._workers}):
            yield self._say(f"start the limits of {device}")
            arguments = (device, self.settings.matrix, self.settings.threads)
            try:
                self._limiters[device] = self._limits(*arguments, self._log(f"limits-{device}"))
            except BackendError as error:
                self.findings.notes.append(f"limits of {device}: {error}")

    def _rounds(self) -> Iterator[Progress]:
        settings, deadline = self.settings, time.perf_counter() + self.settings.seconds
        begun, before = time.perf_counter(), processor_seconds()
        sweeping = [name for name in self.entries if name in self._workers]
        rates: dict[str, list[float]] = defaultdict(list)
        previous: int | None = None
        try:
            for batch in settings.batches or sweep_sizes(settings.max_batch):
                if not sweeping:
                    break
                left = deadline - time.perf_counter()
                if previous is not None and self._expected(sweeping, previous, batch) > left:
                    self.findings.notes.append(
                        f"batch {batch} and above: not measured, --seconds {settings.seconds:g} "
                        "are used up"
                    )
                    break
                yield from self._block(sweeping, batch, deadline)
                sweeping = [name for name in sweeping if name in self._workers]
                for name in list(sweeping):
                    rates[name].append(batch / self.entries[name].step_seconds(batch))
                    if not settings.batches and not gains(rates[name]):
                        sweeping.remove(name)
                previous = batch
        finally:
            used, own = (n - t for n, t in zip(processor_seconds(), before, strict=True))
            available = (time.perf_counter() - begun) * (os.cpu_count() or 1)
            self.findings.used_by_others = max(0.0, used - own) / available if available else None

    def _expected(self, sweeping: Sequence[str], previous: int, batch: int) -> float:
        """Seconds that a batch size will take, by the one before."""
        settings = self.settings
        steps = {
            name: self.entries[name].step_seconds(previous) * batch / previous
            for name in {ORIGINAL, *sweeping} & set(self._workers)
        }
        return block_seconds(steps, settings.window, settings.steps_in_window, settings.pause)

    def _block(self, sweeping: Sequence[str], batch: int, deadline: float) -> Iterator[Progress]:
        """Rounds at one batch size until everyone has settled.

        The original stays to the end, for the ratios, even when its own sweep is over.
        """
        running = list(sweeping)
        self._total += WINDOWS * len({ORIGINAL, *running})
        for number in range(self.settings.max_rounds):
            if number >= WINDOWS:
                if not running or time.perf_counter() > deadline:
                    break
                self._total += len({ORIGINAL, *running})
            for name in [n for n in self.entries if n in running or n == ORIGINAL]:
                if name not in self._workers:
                    continue
                yield self._say(f"batch {batch}, round {number + 1}: {name}")
                self._window(name, batch, number)
                self._turn()
            self._measure_limits()
            running = [
                name
                for name in running
                if name in self._workers and not settled(self.entries[name].windows[batch])
            ]

    def _window(self, name: str, batch: int, number: int) -> None:
        settings, entry = self.settings, self.entries[name]
        least = settings.steps_in_window
        try:
            times, peak_bytes = self._workers[name].window(
                batch, settings.schedule, settings.pause, settings.window, least
            )
        except BackendError as error:
            self._drop(name, "failed", f"batch {batch}: {error}")
            return
        entry.windows[batch].append(Window(number, tuple(times)))
        entry.peak_bytes[batch] = peak_bytes
        entry.status = "measured"

    def _measure_limits(self) -> None:
        for device, limiter in list(self._limiters.items()):
            try:
                found = limiter.measure()
            except BackendError as error:
                self.findings.notes.append(f"limits of {device}: {error}")
                del self._limiters[device]
                limiter.close()
                continue
            self.findings.add_limits(device, found)

    def _trajectories(self) -> Iterator[Progress]:
        """Noise in, images out, at each contender's best batch size."""
        schedule = self.settings.schedule
        self._total += len(self._workers)
        for name, worker in list(self._workers.items()):
            entry, row = self.entries[name], best_row(self.findings.rows(name))
            assert row is not None
            own = worker.schedule or schedule
            expected = row["step_seconds"] * own.steps
            self._turn()
            if expected > self.settings.trajectory_seconds:
                self.findings.notes.append(
                    f"{name}: a whole trajectory would take {expected:.0f} s, left out"
                )
                continue
            batch, times = int(row["batch"]), list[float]()
            yield self._say(f"whole trajectory, batch {batch}: {name}")
            try:
                while len(times) < TRAJECTORIES and sum(times) < 1:
                    times.append(worker.trajectory(batch, own))
            except BackendError as error:
                self._drop(name, "failed", f"whole trajectory: {error}")
                continue
            entry.loop = {
                "batch": batch,
                "solver": own.describe(),
                "seconds": median(times),
                "trajectories": len(times),
                "images_per_second": batch / median(times),
            }

    def _end_to_end(self) -> Iterator[Progress]:
        """`lutdeploy sample` as a user runs it: start-up, noise, steps, encoding, files."""
        best = [(best_row(self.findings.rows(name)), e) for name, e in self.entries.items()]
        able = [(row, e) for row, e in best if row and e.contender.sample_options]
        able.sort(key=lambda pair: pair[0]["images_per_second"], reverse=True)
        for row, entry in able[: self.settings.end_to_end]:
            batch, rate = int(row["batch"]), row["images_per_second"]
            images = batch * max(1, math.ceil(self.settings.sample_seconds * rate / batch))
            name = entry.contender.name
            yield self._say(f"`lutdeploy sample -n {images}`: {name}")
            out = self.subject.scratch / f"sample-{name}"
            command = sample_command(entry.contender, self.settings, images, batch, out)
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds = time.perf_counter() - start
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["?"])[-1]
                self.findings.notes.append(f"{name}: `lutdeploy sample` failed: {said[:300]}")
                continue
            entry.end_to_end = {
                "batch": batch,
                "images": images,
                "seconds": seconds,
                "images_per_second": images / seconds,
            }


class Remembered:
    """A denoiser that answers the same question once: all contenders are asked the same."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.config, self.schedule = denoiser.config, denoiser.schedule
        self.whole_trajectory = denoiser.whole_trajectory
        self._denoiser = denoiser
        self._steps: dict[Any, tuple[Images, Images]] = {}
        self._predictions: dict[Any, Images] = {}

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        """See :class:`lutdeploy.sampling.Denoiser`."""
        key = (x.tobytes(), row, None if x0_prev is None else x0_prev.tobytes())
        if key not in self._steps:
            self._steps[key] = self._denoiser.step(x, row, x0_prev)
        return self._steps[key]

    def predict_x0(self, x: Images, t: NDArray[np.float32]) -> Images:
        """See :class:`lutdeploy.sampling.Denoiser`."""
        key = (x.tobytes(), t.tobytes())
        if key not in self._predictions:
            self._predictions[key] = self._denoiser.predict_x0(x, t)
        return self._predictions[key]

    def run(self, noise: Images) -> Images:
        """See :class:`lutdeploy.sampling.Denoiser`."""
        return self._denoiser.run(noise)


def sample_command(
    contender: Contender, settings: Settings, images: int, batch: int, out: Path
) -> list[str]:
    """`lutdeploy sample` with a contender."""
    schedule = settings.schedule
    # -P: a folder that is called lutdeploy, where the user stands, is not the package.
    command = [sys.executable, "-P", "-m", "lutdeploy.cli", "sample", contender.path, "-n", images]
    command += ["--batch", batch, *(contender.sample_options or ()), "--out", out, "--no-grid"]
    command += ["--solver", schedule.solver, "--steps", schedule.steps, "--shift", schedule.shift]
    if settings.threads is not None:
        command += ["--threads", settings.threads]
    return [str(word) for word in command]


def processor_seconds() -> tuple[float, float]:
    """Processor time since boot: what all processes used, and what this one's family did."""
    whole = psutil.cpu_times()
    stolen = getattr(whole, "steal", 0.0)  # by other guests of the same host, on Linux
    own = psutil.Process()
    seconds = 0.0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            ended = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
            seconds += times.user + times.system + ended
    return whole.user + whole.system + getattr(whole, "nice", 0.0) + stolen, seconds
