"""`lutdeploy bench`: contenders in interleaved rounds, the machine's limits beside them.

A *window* is some steps of one contender in a row; its figure is the median step. In a *round*
every contender has one window, so that a ratio compares what was measured side by side: the
clock of a shared machine drifts. A contender has *settled* once the medians of three windows in
a row lie within 10 %.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import psutil
from msgspec.structs import replace

from lutdeploy import __version__
from lutdeploy.artefacts import files
from lutdeploy.engines.benchmark import limits
from lutdeploy.engines.benchmark.contenders import (
    Contender,
    RandomModel,
    Subject,
    choose,
    list_contenders,
    open_subject,
)
from lutdeploy.engines.benchmark.process import About, Host, Isolated, Window, Worker, start
from lutdeploy.engines.benchmark.result import (
    GAIN,
    EndToEnd,
    Loop,
    Model,
    Participant,
    Peak,
    Result,
    Row,
    Settings,
    best_row,
)
from lutdeploy.errors import BackendError, UsageError
from lutdeploy.machine import Machine, this_machine
from lutdeploy.sampling import Images, batch_noise
from lutdeploy.schedule import Schedule, Step

WINDOWS = 3  # in a row
TOLERANCE = 0.10  # of the smallest of them
CHECKED_IMAGES = 2  # of the comparison with the original
TRAJECTORIES = 3  # at most, of which the median counts
QUICK: dict[str, Any] = {  # Settings of --quick
    "max_batch": 16,
    "seconds": 12.0,
    "window": 0.06,
    "pause": 0.03,
    "max_rounds": 5,
    "matrix": 1024,
    "trajectory_seconds": 3.0,
    "sample_seconds": 1.0,
}

OnProgress = Callable[[str, int, int], None]  # what comes now; turns done and planned so far


def choose_settings(schedule: Schedule, quick: bool = False, **given: Any) -> Settings:
    """Settings with what is given, and not None, over those of --quick or the usual ones."""
    given = {name: value for name, value in given.items() if value is not None}
    given["batches"] = tuple(sorted(set(given.get("batches", ()))))
    if given["batches"] and "max_batch" in given:
        raise UsageError("--max-batch ends the sweep that --batch replaces; leave one out")
    chosen = {**(QUICK if quick else {}), **given}
    return Settings(schedule, schedule.describe(), schedule.steps, **chosen)


def settled(windows: Sequence[Window]) -> range | None:
    """The last three rounds in a row whose medians lie within 10 %; None: there are none."""
    for first in reversed(range(len(windows) - WINDOWS + 1)):
        if _alike(windows[first : first + WINDOWS]):
            return range(first, first + WINDOWS)
    return None


def _alike(windows: Sequence[Window]) -> bool:
    medians = [window.median for window in windows]
    return max(medians) <= (1 + TOLERANCE) * min(medians)


@dataclass(eq=False)
class Entry:
    """A contender on its way through the benchmark."""

    contender: Contender
    about: About | None = None  # once it has started
    status: Literal["waiting", "refused", "absent", "failed"] = "waiting"
    reason: str | None = None  # why it takes no further part
    rows: list[Row] = field(default_factory=list)  # by batch size
    loop: Loop | None = None
    end_to_end: EndToEnd | None = None

    def gains(self, settings: Settings) -> bool:
        """Whether a larger batch is worth a try; the batches that a user names all are."""
        rates = [row.images_per_second for row in self.rows]
        return bool(settings.batches) or len(rates) < 2 or rates[-1] >= (1 + GAIN) * rates[-2]

    def named(self) -> tuple[str, str, str, str, str | None]:
        """The fields of :class:`Named`."""
        c = self.contender
        return c.name, c.backend, c.precision, c.device, c.export


class Benchmark:
    """One run of the benchmark, of contenders that begin with the original.

    ``start`` and ``isolate`` start the processes of contenders and of limits.
    """

    def __init__(
        self,
        subject: Subject,
        machine: Machine,
        contenders: Sequence[Contender],
        settings: Settings,
        start: Callable[[Contender, int | None, Path], Worker] = start,
        isolate: Callable[..., Isolated] = Isolated,
    ) -> None:
        self.subject, self.machine, self.settings = subject, machine, settings
        self.entries = [Entry(contender) for contender in contenders]
        self.original = self.entries[0]
        self._start, self._isolate = start, isolate
        self._running: dict[Entry, Worker] = {}
        self._limiters: dict[str, Isolated] = {}  # by device
        self._tries: dict[str, dict[str, float]] = {}  # by device: the best of each, in seconds
        self._used_by_others: float | None = None
        self._notes: list[str] = []
        self.interrupt: KeyboardInterrupt | None = None
        self._done = self._total = 0

    def measure(self, on_progress: OnProgress) -> Result:
        """Measure everything, or until Ctrl-C or SIGTERM, which is kept as ``interrupt``."""
        self._on_progress = on_progress
        try:
            self._open()
            self._check()
            self._open_limits()
            self._sweep()
            self._trajectories()
            self._close()  # `lutdeploy sample` has the machine to itself
            self._end_to_end()
        except KeyboardInterrupt as stop:
            self.interrupt = stop
        finally:
            self._close()
        return self._result()

    def _close(self) -> None:
        for process in (*self._running.values(), *self._limiters.values()):
            process.close()
        self._running.clear()
        self._limiters.clear()

    def _drop(self, entry: Entry, status: Literal["refused", "absent", "failed"], why: str) -> None:
        """A contender takes no further part; what it has shown before stays."""
        entry.status, entry.reason = status, why
        self._running.pop(entry).close()

    def _turn(self, text: str) -> None:
        """Say what comes now."""
        self._on_progress(text, self._done, max(self._total, self._done))
        self._done += 1

    def _log(self, name: str) -> Path:
        return self.subject.scratch / f"{name}.log"

    def _open(self) -> None:
        """One after the other, so that each has the machine to itself while it starts."""
        self._total = 2 * len(self.entries)
        for entry in self.entries:
            name, threads = entry.contender.name, self.settings.threads
            self._turn(f"start {name}")
            worker = self._running[entry] = self._start(entry.contender, threads, self._log(name))
            try:
                entry.about = worker.open()
            except BackendError as error:
                if entry is self.original:
                    raise
                self._drop(entry, "absent", str(error))

    def _check(self) -> None:
        """The gate: who does not compute what the original computes is not timed."""
        from lutdeploy.artefacts.checkpoint import load_model
        from lutdeploy.parity import compare

        model = load_model(self.subject.model)
        noise = batch_noise(0, range(CHECKED_IMAGES), self.subject.config.image_shape)
        reference = Remembered(self._running[self.original])
        for entry, worker in list(self._running.items())[1:]:
            contender = entry.contender
            self._turn(f"compare {contender.name} with the original")
            walks = worker.whole_trajectory or contender.device != "cpu"
            levels = ("trajectory", "picture") if walks else ("step",)  # as it is timed
            schedule = worker.schedule or self.settings.schedule
            try:
                report = compare(
                    *(model, worker, contender.precision, schedule, noise, levels),
                    reference=reference,
                )
            except BackendError as error:
                self._drop(entry, "failed", str(error))
                continue
            if not report.passed:
                failure = report.failures()[0]
                self._drop(entry, "refused", f"differs from the original: {failure}")

    def _open_limits(self) -> None:
        for device in sorted({limits.place(e.contender.device) for e in self._running}):
            self._turn(f"start the limits of {device}")
            side = limits.side(device, self.settings.matrix)
            arguments = (device, side, self.settings.threads)
            log = self._log(f"limits-{device}")
            self._limiters[device] = self._isolate(log, limits.open_limits, *arguments)
        self._measure_limits()
        self._tries.clear()  # only what was measured in the rounds counts

    def _measure_limits(self) -> None:
        for device, limiter in list(self._limiters.items()):
            try:
                found = limiter.ask(limits.measure)
            except BackendError as error:
                self._notes.append(f"limits of {device}: {error}")
                self._limiters.pop(device).close()
                continue
            best = self._tries.setdefault(device, found)
            best.update({name: min(seconds, best[name]) for name, seconds in found.items()})

    def _sweep(self) -> None:
        """Rounds at one batch size after the other, while there is time and something to gain."""
        settings, begun = self.settings, time.perf_counter()
        used_before, own_before = processor_seconds()
        sweeping, deadline = list(self._running), begun + settings.seconds
        powers = [2**k for k in range(settings.max_batch.bit_length())]
        try:
            for batch in settings.batches or powers:
                sweeping = [e for e in sweeping if e in self._running and e.gains(settings)]
                if not sweeping:
                    break
                if self._expected(sweeping, batch) > deadline - time.perf_counter():
                    self._notes.append(
                        f"batch {batch} and above: not measured, --seconds {settings.seconds:g} "
                        "are used up"
                    )
                    break
                self._rounds(sweeping, batch, deadline)
        finally:
            used, own = processor_seconds()
            others = max(0.0, (used - used_before) - (own - own_before))
            seconds = time.perf_counter() - begun
            whole = os.cpu_count() or 1  # the machine's, as those seconds are
            self._used_by_others = others / (seconds * whole)

    def _with_original(self, entries: Sequence[Entry]) -> list[Entry]:
        """Those still there, and the original for the ratios, even after its own sweep."""
        return [e for e in self._running if e is self.original or e in entries]

    def _expected(self, sweeping: Sequence[Entry], batch: int) -> float:
        """Seconds that a batch size will take at least, by the one before, if there is one."""
        settings, seconds = self.settings, 0.0
        for row in [row for entry in self._with_original(sweeping) for row in entry.rows[-1:]]:
            step = row.step_seconds * batch / row.batch
            timed = max(settings.window, settings.steps_in_window * step)
            seconds += WINDOWS * (settings.pause + step + timed)
        return seconds

    def _rounds(self, sweeping: Sequence[Entry], batch: int, deadline: float) -> None:
        """Rounds at one batch size until everyone has settled."""
        settings, waiting = self.settings, list(sweeping)
        how = (settings.schedule, settings.pause, settings.window, settings.steps_in_window)
        shown: dict[Entry, list[Window]] = {e: [] for e in self._with_original(sweeping)}
        self._total += WINDOWS * len(shown)
        try:
            for number in range(settings.max_rounds):
                taking_part = self._with_original(waiting)
                if number >= WINDOWS:
                    if not waiting or time.perf_counter() > deadline:
                        break
                    self._total += len(taking_part)
                for entry in taking_part:
                    self._turn(f"batch {batch}, round {number + 1}: {entry.contender.name}")
                    try:
                        window = self._running[entry].ask(Host.window, batch, *how)
                        shown[entry].append(window)
                    except BackendError as error:
                        self._drop(entry, "failed", f"batch {batch}: {error}")
                self._measure_limits()
                waiting = [e for e in waiting if e in self._running and not settled(shown[e])]
        finally:
            for entry, windows in shown.items():
                if windows:
                    original = shown.get(self.original, [])
                    entry.rows.append(self._row(entry, batch, windows, original))

    def _row(
        self, entry: Entry, batch: int, windows: Sequence[Window], original: Sequence[Window]
    ) -> Row:
        """The figures of the settled rounds, or of all where it never settled."""
        assert entry.about is not None
        stable = settled(windows)
        counted = stable or range(len(windows))
        times = [seconds for number in counted for seconds in windows[number].seconds]
        step_seconds = median(windows[number].median for number in counted)
        beside = [original[number] for number in counted if number < len(original)]
        ratios = [o.median / windows[n].median for n, o in zip(counted, beside, strict=False)]
        return Row(
            *entry.named(),
            engine_sha256=windows[-1].engine_sha256,
            computes_on=entry.about.computes_on,
            sample_options=entry.contender.sample_options,
            batch=batch,
            step_seconds=step_seconds,
            step_seconds_min=min(times),
            step_seconds_max=max(times),
            ratio_to_original=median(ratios) if ratios else None,
            ratio_min=min(ratios, default=None),
            ratio_max=max(ratios, default=None),
            ratio_stable=stable is not None and len(beside) == WINDOWS and _alike(beside),
            stable=stable is not None,
            windows=len(windows),
            images_per_second=batch / (step_seconds * self.settings.steps),
            flops_per_second=2 * self.subject.config.multiply_adds() * batch / step_seconds,
            share_of_peak=None,  # the peak is known at the end
            peak_bytes=windows[-1].peak_bytes,
        )

    def _trajectories(self) -> None:
        """Noise in, images out, at each contender's best batch size."""
        self._total += len(self._running)
        for entry, worker in list(self._running.items()):
            name, row = entry.contender.name, best_row(entry.rows)
            assert row is not None  # who has none has failed
            schedule = worker.schedule or self.settings.schedule
            expected = row.step_seconds * schedule.steps
            self._turn(f"whole trajectory, batch {row.batch}: {name}")
            if expected > self.settings.trajectory_seconds:
                self._notes.append(
                    f"{name}: a whole trajectory would take {expected:.0f} s, left out"
                )
                continue
            times: list[float] = []
            try:
                while len(times) < TRAJECTORIES and sum(times) < 1:
                    times.append(worker.ask(Host.trajectory, row.batch, schedule))
            except BackendError as error:
                self._drop(entry, "failed", f"whole trajectory: {error}")
                continue
            rate = row.batch / median(times)
            entry.loop = Loop(row.batch, schedule.describe(), median(times), len(times), rate)

    def _end_to_end(self) -> None:
        """`lutdeploy sample` as a user runs it: start-up, noise, steps, encoding, files."""
        best = [(best_row(entry.rows), entry) for entry in self.entries]
        able = [(row, entry) for row, entry in best if row and row.sample_options]
        able.sort(key=lambda pair: pair[0].images_per_second, reverse=True)
        for row, entry in able[: self.settings.end_to_end]:
            worth = self.settings.sample_seconds * row.images_per_second
            images = row.batch * max(1, math.ceil(worth / row.batch))
            self._turn(f"`lutdeploy sample -n {images}`: {row.path}")
            out = self.subject.scratch / f"sample-{row.path}"
            command = sample_command(entry.contender, self.settings, images, row.batch, out)
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds = time.perf_counter() - start
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["?"])[-1]
                self._notes.append(f"{row.path}: `lutdeploy sample` failed: {said[:300]}")
                continue
            entry.end_to_end = EndToEnd(row.batch, images, seconds, images / seconds)

    def _result(self) -> Result:
        config = self.subject.config
        peaks: dict[str, Peak] = {}
        for device, tries in self._tries.items():
            size = limits.side(device, self.settings.matrix)
            rates = {name: limits.rate(name, seconds, size) for name, seconds in tries.items()}
            copied = rates.pop(limits.MEMORY, None)
            peaks[device] = Peak(rates, copied, size)
        rows, contenders = [], []
        for entry in self.entries:
            best, about = best_row(entry.rows), entry.about
            limit = peaks.get(limits.place(entry.contender.device))
            rate = limit and limit.flops_per_second.get(limits.limit_of(entry.contender.precision))
            for row in entry.rows:
                share = row.flops_per_second / rate if rate else None
                rows.append(replace(row, share_of_peak=share))
            contenders.append(
                Participant(
                    *entry.named(),
                    engine_sha256=(best or about).engine_sha256 if about else None,
                    status="measured" if best else entry.status,
                    reason=entry.reason,
                    startup=about.startup if about else None,
                    best_batch=best.batch if best else None,
                    loop=entry.loop,
                    end_to_end=entry.end_to_end,
                )
            )
        return Result(
            format=1,
            lutdeploy=__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            interrupted=self.interrupt is not None,
            model=Model(
                name=self.subject.name,
                preset=config.preset(),
                config=config,
                sha256=files.sha256(self.subject.model),
                flop_per_image_and_step=2 * config.multiply_adds(),
            ),
            machine=self.machine,
            fingerprint=self.machine.fingerprint(),
            peaks=peaks,
            settings=self.settings,
            used_by_others=self._used_by_others,
            contenders=contenders,
            rows=rows,
            notes=self._notes,
        )


class Remembered:
    """A denoiser that computes the same step once: all contenders are asked for the same."""

    def __init__(self, denoiser: Worker) -> None:
        self.config, self.schedule = denoiser.config, denoiser.schedule
        self.whole_trajectory = denoiser.whole_trajectory
        self.predict_x0, self.run, self._step = denoiser.predict_x0, denoiser.run, denoiser.step
        self._known: dict[Any, tuple[Images, Images]] = {}

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        key = (x.tobytes(), row, None if x0_prev is None else x0_prev.tobytes())
        if key not in self._known:
            self._known[key] = self._step(x, row, x0_prev)
        return self._known[key]


def sample_command(
    contender: Contender, settings: Settings, images: int, batch: int, out: Path
) -> list[str]:
    """`lutdeploy sample` with a contender."""
    schedule = settings.schedule
    # -P: a folder that is called lutdeploy, where the user stands, is not the package.
    command = [sys.executable, "-P", "-m", "lutdeploy.cli", "sample", contender.path, "-n", images]
    command += ["--batch", batch, *(contender.sample_options or ()), "--out", out, "--no-grid"]
    command += ["--solver", schedule.solver, "--steps", schedule.steps]
    if schedule.grid == "uniform":
        command += ["--shift", schedule.shift]
    if settings.threads is not None:
        command += ["--threads", settings.threads]
    return [str(word) for word in command]


def processor_seconds() -> tuple[float, float]:
    """Processor time since boot: what all processes used, and what this one's family did."""
    whole, own, seconds = psutil.cpu_times(), psutil.Process(), 0.0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            seconds += sum(process.cpu_times()[:4])  # user, system, and those of ended children
    used = ("user", "system", "nice", "steal")  # "steal": by other guests of the host, on Linux
    return sum(getattr(whole, name, 0.0) for name in used), seconds


@contextlib.contextmanager
def open_benchmark(
    target: Path | RandomModel,
    settings: Settings,
    only: Sequence[str],
    quick: bool,
    note: Callable[[str], None],
) -> Iterator[Benchmark]:
    """A benchmark of a model, which holds the model's run until the end of the block."""
    machine = this_machine()
    with contextlib.ExitStack() as stack:
        subject = stack.enter_context(open_subject(target, note))
        if subject.run is not None:
            folder = subject.run.path
            stack.enter_context(files.lock(folder, "`lutdeploy bench`", name=".bench.lock"))
        gpu = bool(machine.gpus)
        everyone = list_contenders(subject.model, subject.exports, subject.run, gpu)
        contenders = choose(everyone, only, quick)
        note(f"machine: {machine.describe()}")
        yield Benchmark(subject, machine, contenders, settings)
