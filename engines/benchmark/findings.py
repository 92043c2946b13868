"""What `lutdeploy bench` finds out, and its JSON. README.md says what each value is."""

from __future__ import annotations

import datetime
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

from lutdeploy import __version__
from lutdeploy.artefacts import files
from lutdeploy.engines.benchmark import limits as bench_limits
from lutdeploy.engines.benchmark.contenders import ORIGINAL, Contender
from lutdeploy.engines.benchmark.method import (
    Window,
    best_row,
    images_per_second,
    share_of_peak,
    speed,
)
from lutdeploy.engines.benchmark.subject import Subject
from lutdeploy.machine import Machine
from lutdeploy.schedule import Schedule

FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """How long and how closely to measure. Seconds throughout."""

    schedule: Schedule  # of whole trajectories
    threads: int | None = None  # of each contender; its library's own choice by default
    batches: tuple[int, ...] = ()  # ascending; none: powers of two while they bring something
    max_batch: int = 1024  # of the sweep
    seconds: float = 240.0  # of all rounds; no batch size is begun that would go beyond
    window: float = 0.3
    steps_in_window: int = 3  # at least
    pause: float = 0.1  # before a window; threads that wait for work spin for some milliseconds
    max_rounds: int = 10  # at one batch size
    matrix: int = 2048  # n of the n×n products
    trajectory_seconds: float = 30.0  # a whole trajectory that would take longer is left out
    end_to_end: int = 1  # of the fastest contenders, as `lutdeploy sample`
    sample_seconds: float = 10.0  # worth of images for it


@dataclass
class Entry:
    """All that is found out about one contender."""

    contender: Contender
    status: str = "waiting"  # "measured", "refused", "absent", "failed"
    reason: str | None = None
    engine_sha256: str | None = None
    computes_on: str | None = None  # as the engine's identity says
    startup: dict[str, float] | None = None
    loop: dict[str, Any] | None = None
    end_to_end: dict[str, Any] | None = None
    windows: dict[int, list[Window]] = field(default_factory=lambda: defaultdict(list))
    peak_bytes: dict[int, int] = field(default_factory=dict)

    def step_seconds(self, batch: int) -> float:
        """The figure at a batch size, as far as it is known."""
        return speed(self.windows[batch], ()).step_seconds


@dataclass
class Findings:
    """Everything so far; :meth:`result` may be asked for at any time."""

    subject: Subject
    settings: Settings
    entries: dict[str, Entry]
    notes: list[str] = field(default_factory=list)
    used_by_others: float | None = None  # of the processors' time in the rounds
    limits: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))

    def add_limits(self, device: str, seconds: dict[str, float]) -> None:
        """Tries of a device's limits, in seconds; the best of all counts."""
        best = self.limits[device]
        for name, value in seconds.items():
            best[name] = min(value, best.get(name, math.inf))

    def peaks(self) -> dict[str, Any]:
        """By device: the best products of the run in FLOP/s, and the best copy in bytes/s."""
        size = self.settings.matrix
        found = {}
        for device, best in self.limits.items():
            rates = {name: bench_limits.rate(name, s, size) for name, s in best.items()}
            copied = rates.pop(bench_limits.MEMORY, None)
            found[device] = {
                "flops_per_second": rates,
                "bytes_per_second": copied,
                "matrix": size,
            }
        return found

    def rows(self, name: str) -> list[dict[str, Any]]:
        entry, peaks = self.entries[name], self.peaks()
        contender, steps = entry.contender, self.settings.schedule.steps
        original = self.entries[ORIGINAL].windows
        rates = peaks.get(contender.place, {}).get("flops_per_second", {})
        peak = rates.get(bench_limits.limit_of(contender.precision))
        rows = []
        for batch, windows in entry.windows.items():
            if not windows:
                continue
            found = speed(windows, original.get(batch, ()))
            flop = 2 * self.subject.config.multiply_adds() * batch
            rows.append(
                {
                    **_named(entry),
                    "computes_on": entry.computes_on,
                    "sample_options": contender.sample_options,
                    "batch": batch,
                    **asdict(found),
                    "images_per_second": images_per_second(batch, found.step_seconds, steps),
                    "flops_per_second": flop / found.step_seconds,
                    "share_of_peak": share_of_peak(flop, found.step_seconds, peak),
                    "peak_bytes": entry.peak_bytes[batch],
                }
            )
        return rows

    def result(self, machine: Machine, interrupted: bool = False) -> dict[str, Any]:
        """Everything as plain JSON values; README.md says what each is."""
        settings = {
            **asdict(self.settings),
            "table": self.settings.schedule.describe(),
            "steps": self.settings.schedule.steps,
            "batches": list(self.settings.batches),
        }
        config = self.subject.config
        return {
            "format": FORMAT,
            "lutdeploy": __version__,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "interrupted": interrupted,
            "model": {
                "name": self.subject.name,
                "preset": config.preset(),
                "config": config.to_dict(),
                "sha256": files.sha256(self.subject.model),
                "flop_per_image_and_step": 2 * config.multiply_adds(),
            },
            "machine": machine.to_dict(),
            "fingerprint": machine.fingerprint(),
            "peaks": self.peaks(),
            "settings": settings,
            "used_by_others": self.used_by_others,
            "contenders": [self._describe(entry) for entry in self.entries.values()],
            "rows": [row for name in self.entries for row in self.rows(name)],
            "notes": self.notes,
        }

    def _describe(self, entry: Entry) -> dict[str, Any]:
        row = best_row(self.rows(entry.contender.name))
        return {
            **_named(entry),
            "status": entry.status,
            "reason": entry.reason,
            "startup": entry.startup,
            "best_batch": row["batch"] if row else None,
            "loop": entry.loop,
            "end_to_end": entry.end_to_end,
        }


def _named(entry: Entry) -> dict[str, Any]:
    """What a contender is, as plain JSON values."""
    contender = entry.contender
    return {
        "path": contender.name,
        "backend": contender.backend,
        "precision": contender.precision,
        "device": contender.device,
        "export": contender.export,
        "engine_sha256": entry.engine_sha256,
    }
