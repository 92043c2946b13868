"""Solvers and time grids side by side: how near each ends to the reference, at which cost.

A row is one schedule; what is measured of its ends is a mapping of names to functions. Distances of
distributions need more images than that; `lutdeploy tune-steps --data` adds them to the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lutdeploy.errors import BackendError, NonFiniteError
from lutdeploy.parity import difference
from lutdeploy.sampling import Images
from lutdeploy.schedule import Schedule, solver_schedule
from lutdeploy.training.few_steps.search import Problem, rms

Metric = Callable[[Images, Images], float]  # of images and reference, float32 [n, C, S, S]
METRICS: dict[str, Metric] = {
    "rms": rms,
    "psnr": lambda images, reference: difference(images, reference).psnr,
}
YARDSTICK = solver_schedule("euler", 64)  # what a smaller number of steps has to equal
STEPS = (4, 6, 8, 10, 16, 32, 64)


@dataclass(frozen=True)
class Row:
    """One schedule and its measures; NaN where a trajectory was not finite."""

    schedule: Schedule
    metrics: dict[str, float]

    @property
    def grid(self) -> str:
        """``uniform``, ``shift 0.5`` or ``tuned``."""
        warped = self.schedule.grid == "uniform" and self.schedule.shift != 1
        return f"shift {self.schedule.shift:.3g}" if warped else self.schedule.grid

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite becomes a string."""
        return {
            "steps": self.schedule.steps,
            "solver": self.schedule.solver,
            "grid": self.grid,
            "metrics": {
                name: value if math.isfinite(value) else str(value)
                for name, value in self.metrics.items()
            },
        }


def measure(
    problem: Problem, schedules: Iterable[Schedule], metrics: Mapping[str, Metric] = METRICS
) -> Iterator[Row]:
    """A row for each schedule, as its images are made.

    Args:
        problem: noise and reference.
        schedules: what to compare.
        metrics: what to measure.
    """
    for schedule in schedules:
        try:
            images = problem.end(schedule)
        except NonFiniteError:
            yield Row(schedule, dict.fromkeys(metrics, math.nan))
            continue
        yield Row(schedule, {name: f(images, problem.target) for name, f in metrics.items()})


def show(rows: Sequence[Row], title: str) -> None:
    """The rows as a table on stderr."""
    from rich.console import Console
    from rich.table import Table

    names = list(rows[0].metrics)
    table = Table("steps", "solver", "grid", *names, title=title)
    for row in rows:
        values = [f"{row.metrics[name]:.4g}" for name in names]
        table.add_row(str(row.schedule.steps), row.schedule.solver, row.grid, *values)
    Console(stderr=True).print(table)


def plot(rows: Sequence[Row], reference: str, width: float = 7.0) -> bytes:
    """A PNG: RMS over steps, a line for each solver and kind of grid, logarithmic both ways.

    Args:
        rows: with the metric "rms".
        reference: what the RMS is measured to.
        width: inches, of 100 pixels.

    Raises:
        BackendError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendError(
            f"matplotlib is not installed here ({error}); pip install 'lutdeploy[bench]'"
        ) from error
    import io

    figure = Figure(figsize=(width, 0.66 * width), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    colours = {
        name: f"C{k}" for k, name in enumerate(dict.fromkeys(r.schedule.solver for r in rows))
    }
    styles = {"uniform": ":", "shift": "--", "tuned": "-"}
    for solver, colour in colours.items():
        for kind, style in styles.items():
            points = sorted(
                (row.schedule.steps, row.metrics["rms"])
                for row in rows
                if row.schedule.solver == solver and row.grid.split()[0] == kind
            )
            if points:
                label = f"{solver}, {'best shift' if kind == 'shift' else kind}"
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, style, color=colour, marker=".", label=label)
    for row in rows:
        if row.schedule == YARDSTICK:
            axes.axhline(row.metrics["rms"], color="0.6", linewidth=1, zorder=0)
            axes.annotate(
                f"{YARDSTICK.steps} Euler steps", (0.01, row.metrics["rms"]),
                xycoords=("axes fraction", "data"), ha="left", va="bottom", color="0.4",
            )  # fmt: skip
    ticks = sorted({row.schedule.steps for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel=f"RMS to {reference}")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
