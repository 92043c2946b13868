"""How times become figures: windows, rounds, the sweep over batch sizes. Pure.

A *window* is some steps of one contender in a row; its figure is the median step. In a *round*
every contender has one window, so that a ratio compares what was measured side by side: the
clock of a shared machine drifts. A contender has *settled* once the medians of three windows in
a row lie within 10 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

WINDOWS = 3  # in a row
TOLERANCE = 0.10  # of the smallest of them
GAIN = 0.05  # in images/s; a larger batch that brings less ends the sweep


@dataclass(frozen=True)
class Window:
    """What one contender did in one round: seconds of each step, at least one."""

    round: int
    steps: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.steps)


def settled(windows: Sequence[Window]) -> Sequence[Window] | None:
    """The last three windows in a row whose medians lie within 10 %; None: there are none."""
    for end in range(len(windows), WINDOWS - 1, -1):
        last = windows[end - WINDOWS : end]
        medians = [window.median for window in last]
        if _alike(medians):
            return last
    return None


def _alike(medians: Sequence[float]) -> bool:
    return max(medians) <= (1 + TOLERANCE) * min(medians)


@dataclass(frozen=True)
class Speed:
    """A contender at one batch size; times in seconds of one step of the whole batch."""

    step_seconds: float
    step_seconds_min: float
    step_seconds_max: float
    ratio_to_original: float | None  # times as fast; None: never in the original's rounds
    ratio_min: float | None
    ratio_max: float | None
    ratio_stable: bool  # the original, too, was within 10 % in those rounds
    stable: bool
    windows: int  # all that were measured


def speed(windows: Sequence[Window], original: Sequence[Window]) -> Speed:
    """The figure of a contender: of its settled windows, or of all where it never settled.

    Args:
        windows: of the contender, in the order of the rounds; at least one.
        original: of the original, at the same batch size.
    """
    last = settled(windows)
    counted = windows if last is None else last
    theirs = {window.round: window.median for window in original}
    pairs = [(theirs[w.round], w.median) for w in counted if w.round in theirs]
    ratios = [their / our for their, our in pairs]
    times = [seconds for window in counted for seconds in window.steps]
    return Speed(
        step_seconds=median(window.median for window in counted),
        step_seconds_min=min(times),
        step_seconds_max=max(times),
        ratio_to_original=median(ratios) if ratios else None,
        ratio_min=min(ratios, default=None),
        ratio_max=max(ratios, default=None),
        ratio_stable=last is not None
        and len(pairs) == len(last)
        and _alike([their for their, _ in pairs]),
        stable=last is not None,
        windows=len(windows),
    )


def gains(rates: Sequence[float]) -> bool:
    """Whether a larger batch is worth a try: images/s at the batch sizes so far, ascending."""
    return len(rates) < 2 or rates[-1] >= (1 + GAIN) * rates[-2]


def sweep_sizes(largest: int) -> list[int]:
    """1, 2, 4, … up to ``largest``."""
    return [2**k for k in range(largest.bit_length())]


def block_seconds(steps: Mapping[str, float], window: float, least: int, pause: float) -> float:
    """What three rounds will take at least.

    Args:
        steps: the seconds of one step that each contender is expected to need.
        window: seconds that a window should last.
        least: steps that it must have; there is an untimed one before them.
        pause: before each window.
    """
    turns = (pause + step + max(window, least * step) for step in steps.values())
    return WINDOWS * sum(turns)


def images_per_second(batch: int, step_seconds: float, steps: int) -> float:
    """Whole images: a batch needs ``steps`` steps."""
    return batch / (step_seconds * steps)


def share_of_peak(flop: int, step_seconds: float, peak: float | None) -> float | None:
    """Of the peak in FLOP/s, for ``flop`` operations a step; None where it is not known."""
    return None if peak is None else flop / step_seconds / peak


def best_row(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The smallest batch that makes nearly the most images a second; more only costs memory."""
    most = max((row["images_per_second"] for row in rows), default=0.0)
    enough = [row for row in rows if row["images_per_second"] >= most / (1 + GAIN)]
    return min(enough, key=lambda row: row["batch"], default=None)
