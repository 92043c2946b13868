"""bench.json as typed records: what `lutdeploy bench` measured. docs/speed.md has their meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from lutdeploy.config import ModelConfig
from lutdeploy.machine import Machine
from lutdeploy.schedule import Schedule

GAIN = 0.05  # in images/s; a larger batch that brings less is not worth it
REMEDY = "delete it and run `lutdeploy bench`"  # where bench.json cannot be read


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of bench.json."""


class Settings(Record, frozen=True):
    """How long and how closely to measure. Seconds throughout."""

    schedule: Schedule  # of whole trajectories
    table: str  # the schedule's name
    steps: int
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


class Model(Record, frozen=True):
    """What was measured."""

    name: str
    preset: str
    config: ModelConfig
    sha256: str
    flop_per_image_and_step: int


class Peak(Record, frozen=True):
    """The limits of a device."""

    flops_per_second: dict[str, float]  # by precision
    bytes_per_second: float | None
    matrix: int  # n of the n×n products


class Loop(Record, frozen=True):
    """Whole trajectories of a batch, noise in and images out."""

    batch: int
    solver: str
    seconds: float
    trajectories: int
    images_per_second: float


class EndToEnd(Record, frozen=True):
    """`lutdeploy sample` as a command."""

    batch: int
    images: int
    seconds: float
    images_per_second: float


class Named(Record, frozen=True):
    """What a contender is."""

    path: str  # its name
    backend: str
    precision: str
    device: str
    export: str | None


class Row(Named, frozen=True):
    """A contender at one batch size; times in seconds of one step of the whole batch."""

    engine_sha256: str
    computes_on: str
    sample_options: list[str] | None
    batch: int
    step_seconds: float
    step_seconds_min: float
    step_seconds_max: float
    ratio_to_original: float | None  # times as fast; None: never in the original's rounds
    ratio_min: float | None
    ratio_max: float | None
    ratio_stable: bool  # the original, too, was within 10 % in those rounds
    stable: bool
    windows: int  # all that were measured
    images_per_second: float
    flops_per_second: float
    share_of_peak: float | None
    peak_bytes: int


class Participant(Named, frozen=True):
    """What became of a contender."""

    engine_sha256: str | None
    status: Literal["waiting", "measured", "refused", "absent", "failed"]
    reason: str | None
    startup: dict[str, float] | None  # seconds, whole and of its parts
    best_batch: int | None
    loop: Loop | None
    end_to_end: EndToEnd | None


class Result(Record, frozen=True):
    """bench.json."""

    format: Literal[1]
    lutdeploy: str
    created: str
    interrupted: bool
    model: Model
    machine: Machine
    fingerprint: dict[str, Any]
    peaks: dict[str, Peak]  # by device
    settings: Settings
    used_by_others: float | None  # of the processors' time in the rounds
    contenders: list[Participant]
    rows: list[Row]
    notes: list[str]


def best_row(rows: Sequence[Row]) -> Row | None:
    """The smallest batch that makes nearly the most images a second; more only costs memory."""
    most = max((row.images_per_second for row in rows), default=0.0)
    enough = [row for row in rows if row.images_per_second >= most / (1 + GAIN)]
    return min(enough, key=lambda row: row.batch, default=None)
