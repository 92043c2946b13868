"""What `lutdeploy bench` has found, for people: tables, remarks, Markdown, a plot."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lutdeploy.artefacts import files
from lutdeploy.engines.benchmark.limits import limit_of, place
from lutdeploy.engines.benchmark.result import EndToEnd, Loop, Participant, Result, Row
from lutdeploy.errors import UsageError

UNSTABLE = "~"
MISSING = "–"
DISTURBED = 0.1


@dataclass(frozen=True)
class Table:
    """A title, a header and rows of text."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def rows_of(result: Result, path: str) -> dict[int, Row]:
    """The rows of one contender, by batch size."""
    rows = [row for row in result.rows if row.path == path]
    return {row.batch: row for row in sorted(rows, key=lambda row: row.batch)}


def _measured(result: Result) -> list[tuple[Participant, Row]]:
    """Each contender that has rows, and its best row."""
    return [
        (contender, rows_of(result, contender.path)[contender.best_batch])
        for contender in result.contenders
        if contender.best_batch is not None
    ]


def tables(result: Result) -> list[Table]:
    """Each contender at its best batch size, what else a user waits for, and all batch sizes."""
    shown = _measured(result)
    best = [
        (
            row.path,
            str(row.batch),
            _mark(row.stable) + _number(1000 * row.step_seconds),
            f"{_number(1000 * row.step_seconds_min)} … {_number(1000 * row.step_seconds_max)}",
            _number(row.images_per_second),
            _ratio(row),
            MISSING if row.share_of_peak is None else f"{row.share_of_peak:.0%}",
        )
        for _, row in shown
    ]
    around = [
        (
            row.path,
            _rate(contender.loop),
            _rate(contender.end_to_end),
            f"{contender.startup['seconds']:.1f}" if contender.startup else MISSING,
            f"{row.peak_bytes / 2**20:.0f}",
        )
        for contender, row in shown
    ]
    best_header = ("", "batch", "ms per step", "min … max", "images/s", "× original", "of peak")
    around_title = "At that size: whole loop and `sample` in images/s, start-up in s, memory in MiB"
    around_header = ("", "whole loop", "sample", "start-up", "memory")
    found = [
        Table(f"Best batch size; images/s of {result.settings.steps} steps", best_header, best),
        Table(around_title, around_header, around),
    ]
    batches = sorted({row.batch for row in result.rows})
    if len(batches) > 1:
        header = ("", *map(str, batches))
        for title, cell in (
            ("images/s by batch size", lambda r: _mark(r.stable) + _number(r.images_per_second)),
            ("Times as fast as the original by batch size", _ratio),
        ):
            lines = []
            for contender, _ in shown:
                at = rows_of(result, contender.path)
                cells = (cell(at[batch]) if batch in at else MISSING for batch in batches)
                lines.append((contender.path, *cells))
            found.append(Table(title, header, lines))
    return [table for table in found if table.rows]


def _mark(stable: bool) -> str:
    return "" if stable else UNSTABLE


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(row: Row) -> str:
    ratio = row.ratio_to_original
    return MISSING if ratio is None else f"{_mark(row.ratio_stable)}{ratio:.2f}×"


def _rate(timed: Loop | EndToEnd | None) -> str:
    return MISSING if timed is None else _number(timed.images_per_second)


def remarks(result: Result) -> Iterator[str]:
    """What was measured on what, and what the tables do not say."""
    model, settings, others = result.model, result.settings, result.used_by_others
    yield result.machine.describe()
    yield result.machine.describe_versions()
    yield (
        f"Model {model.name}: {model.preset}, width {model.config.width}, depth "
        f"{model.config.depth}, {model.flop_per_image_and_step / 1e9:.3g} GFLOP per image and step."
    )
    yield (
        f"Steps: {settings.table}. Threads: {settings.threads or 'as each library chooses'}."
        + (f" Processor time that others used meanwhile: {others:.1%}." if others else "")
    )
    for device, peak in result.peaks.items():
        rates = [f"{name} {r / 1e9:.0f} GFLOP/s" for name, r in peak.flops_per_second.items()]
        if peak.bytes_per_second:
            rates.append(f"memory copy {peak.bytes_per_second / 1e9:.1f} GB/s")
        yield f"Limits of {device} ({peak.matrix}×{peak.matrix}): {', '.join(rates)}."
        precisions = {limit_of(row.precision) for row in result.rows if place(row.device) == device}
        if missing := sorted(precisions - set(peak.flops_per_second)):
            yield (
                f"No limit in {', '.join(missing)}: {device} has no fast matrix product of its own "
                "in it."
            )
    if others and others > DISTURBED:
        yield (
            f"Others used more than {DISTURBED:.0%} of the processors meanwhile: these figures say "
            "little; measure again when the machine is quiet."
        )
    if not all(row.stable and row.ratio_stable for row in result.rows):
        yield (
            f"{UNSTABLE} unstable: no three windows in a row lay within 10 %, of the contender or, "
            "in a ratio, of the original beside it."
        )
    for contender in result.contenders:
        if contender.reason:
            state = "stopped" if contender.status == "measured" else contender.status
            yield f"{contender.path}: {state}: {contender.reason}"
    yield from result.notes
    if result.interrupted:
        yield "Interrupted: not everything was measured."


def markdown(result: Result) -> str:
    """Tables and remarks."""
    parts = []
    for table in tables(result):
        rule = ["---"] + ["---:"] * (len(table.header) - 1)
        lines = [f"**{table.title}**", "", *map(_line, (table.header, rule, *table.rows))]
        parts.append("\n".join(lines))
    parts.append("\n".join(f"- {remark.replace('|', '/')}" for remark in remarks(result)))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def draw(result: Result) -> Any:
    """A matplotlib figure: images/s over the batch size, a line each contender, and the limits.

    Raises:
        ImportError: matplotlib is not there.
    """
    # Without a home it says at length where else it keeps its fonts.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    axes = figure.subplots()
    circle: Any = {"markersize": 13, "markerfacecolor": "none", "color": "grey"}
    shown = [contender for contender, _ in _measured(result)]
    for k, contender in enumerate(shown):
        rows = rows_of(result, contender.path)
        axes.plot(
            list(rows),
            [row.images_per_second for row in rows.values()],
            marker="os^Dv<>"[k % 7],
            color=f"C{k % 10}" if k else "black",  # the original is the first
            label=contender.path,
        )
        unstable = {row.batch: row.images_per_second for row in rows.values() if not row.stable}
        axes.plot(list(unstable), list(unstable.values()), "o", **circle)
    limits = dict.fromkeys((place(c.device), limit_of(c.precision)) for c in shown)
    per_image = result.model.flop_per_image_and_step * result.settings.steps
    for style, (device, precision) in enumerate(limits):
        peak = result.peaks.get(device)
        if peak and precision in peak.flops_per_second:
            limit = peak.flops_per_second[precision] / per_image
            label = f"limit of {device}, {precision}: {_number(limit)}"
            axes.axhline(limit, linestyle=("--", ":", "-.")[style % 3], color="grey", label=label)
    if not all(row.stable for row in result.rows):
        axes.plot([], [], "o", **circle, label="unstable")
    batches = sorted({row.batch for row in result.rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xlabel("batch size")
    axes.set_ylabel(f"images/s of {result.settings.steps} steps")
    axes.set_title(f"{result.model.name} on {result.machine.cpu}", fontsize=10)
    axes.grid(which="both", alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    return figure


def require_writable(json: Path | None, plot: Path | None, markdown: Path | None) -> None:
    """Refuse now what could not be written after minutes of measuring."""
    for option, file in (("--json", json), ("--plot", plot), ("--markdown", markdown)):
        if file is None:
            continue
        folder = file.absolute().parent
        if file.is_dir():
            raise UsageError(f"{file} is a folder; {option} names a file")
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder; {option} writes into one that is there")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"{folder} is not writable; choose another {option}")
    if plot is not None and plot.suffix.lower() != ".png":
        raise UsageError(f"--plot writes PNG; {plot} does not end in .png")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'lutdeploy[bench]'")


def write(
    result: Result,
    json: Path | None,
    plot_file: Path | None,
    markdown_file: Path | None,
    note: Callable[[str], None],
) -> list[Path]:
    """Write what was asked for, and the plot beside the JSON; return the files."""
    written = []
    if json is not None:
        files.write_json(json, result)
        written.append(json)
        plot_file = plot_file or json.with_suffix(".png")
    if markdown_file is not None:
        files.write_atomic(markdown_file, markdown(result).encode())
        written.append(markdown_file)
    if plot_file is not None and result.rows:
        picture = io.BytesIO()
        try:
            draw(result).savefig(picture, format="png")
        except ImportError:
            note("no plot: it needs matplotlib; pip install 'lutdeploy[bench]'")
        else:
            files.write_atomic(plot_file, picture.getvalue())
            written.append(plot_file)
    return written
