"""What `lutdeploy bench` has found, for people: tables, Markdown, a plot. Reads the JSON alone."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lutdeploy.engines.benchmark.limits import limit_of
from lutdeploy.machine import Machine

Result = dict[str, Any]
UNSTABLE = "~"
MISSING = "–"
DISTURBED = 0.1


@dataclass(frozen=True)
class Table:
    """A title, a header and rows of text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def rows_of(result: Result, path: str) -> list[dict[str, Any]]:
    """The rows of one contender, by batch size."""
    rows = [row for row in result["rows"] if row["path"] == path]
    return sorted(rows, key=lambda row: row["batch"])


def _measured(result: Result) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each contender that has rows, and its best row; in the order of the contenders."""
    best = []
    for contender in result["contenders"]:
        for row in rows_of(result, contender["path"]):
            if row["batch"] == contender["best_batch"]:
                best.append((contender, row))
    return best


def tables(result: Result) -> list[Table]:
    """Each contender at its best batch size, what else a user waits for, and all batch sizes."""
    shown = _measured(result)
    best = [
        (
            row["path"],
            str(row["batch"]),
            _mark(row) + _milliseconds(row["step_seconds"]),
            "{} … {}".format(*(_milliseconds(row[f"step_seconds_{k}"]) for k in ("min", "max"))),
            _number(row["images_per_second"]),
            _ratio(row),
            _share(row["share_of_peak"]),
        )
        for _, row in shown
    ]
    around = [
        (
            row["path"],
            _rate(contender["loop"]),
            _rate(contender["end_to_end"]),
            f"{contender['startup']['seconds']:.1f}" if contender["startup"] else MISSING,
            f"{row['peak_bytes'] / 2**20:.0f}",
        )
        for contender, row in shown
    ]
    steps = result["settings"]["steps"]
    header = ("", "batch", "ms per step", "min … max", "images/s", "× original", "of peak")
    found = [
        Table(f"Best batch size; images/s of {steps} steps", header, tuple(best)),
        Table(
            "At that size: whole loop and `sample` in images/s, start-up in s, memory in MiB",
            ("", "whole loop", "sample", "start-up", "memory"),
            tuple(around),
        ),
    ]
    batches = sorted({row["batch"] for row in result["rows"]})
    for title, cell in (
        ("images/s by batch size", lambda row: _mark(row) + _number(row["images_per_second"])),
        ("Times as fast as the original by batch size", _ratio),
    ):
        rows = []
        for contender, _ in shown:
            at = {row["batch"]: row for row in rows_of(result, contender["path"])}
            cells = (cell(at[batch]) if batch in at else MISSING for batch in batches)
            rows.append((contender["path"], *cells))
        if len(batches) > 1:
            found.append(Table(title, ("", *map(str, batches)), tuple(rows)))
    return [table for table in found if table.rows]


def _milliseconds(seconds: float) -> str:
    return _number(1000 * seconds)


def _mark(row: dict[str, Any]) -> str:
    return "" if row["stable"] else UNSTABLE


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(row: dict[str, Any]) -> str:
    ratio = row["ratio_to_original"]
    mark = "" if row["ratio_stable"] else UNSTABLE
    return MISSING if ratio is None else f"{mark}{ratio:.2f}×"


def _share(share: float | None) -> str:
    return MISSING if share is None else f"{share:.0%}"


def _rate(part: dict[str, Any] | None) -> str:
    return MISSING if part is None else _number(part["images_per_second"])


def remarks(result: Result) -> Iterator[str]:
    """What was measured on what, and what the tables do not say."""
    machine = Machine.from_dict(result["machine"])
    model, settings = result["model"], result["settings"]
    config = model["config"]
    yield machine.describe()
    yield machine.describe_versions()
    yield (
        f"Model {model['name']}: {model['preset']}, width {config['width']}, depth "
        f"{config['depth']}, {model['flop_per_image_and_step'] / 1e9:.3g} GFLOP per image and step."
    )
    others = result["used_by_others"]
    yield (
        f"Steps: {settings['table']}. Threads: {settings['threads'] or 'as each library chooses'}."
        + (f" Processor time that others used meanwhile: {others:.1%}." if others else "")
    )
    for device, peaks in result["peaks"].items():
        rates = [f"{name} {r / 1e9:.0f} GFLOP/s" for name, r in peaks["flops_per_second"].items()]
        if peaks["bytes_per_second"]:
            rates.append(f"memory copy {peaks['bytes_per_second'] / 1e9:.1f} GB/s")
        yield f"Limits of {device} ({peaks['matrix']}×{peaks['matrix']}): {', '.join(rates)}."
        precisions = {limit_of(row["precision"]) for row in result["rows"] if _place(row) == device}
        if missing := sorted(precisions - set(peaks["flops_per_second"])):
            yield (
                f"No limit in {', '.join(missing)}: {device} has no fast matrix product of its own "
                "in it."
            )
    if others and others > DISTURBED:
        yield (
            f"Others used more than {DISTURBED:.0%} of the processors meanwhile: these figures say "
            "little; measure again when the machine is quiet."
        )
    if not all(row["stable"] and row["ratio_stable"] for row in result["rows"]):
        yield (
            f"{UNSTABLE} unstable: no three windows in a row lay within 10 %, of the contender or, "
            "in a ratio, of the original beside it."
        )
    for contender in result["contenders"]:
        if contender["reason"]:
            state = "stopped" if contender["status"] == "measured" else contender["status"]
            yield f"{contender['path']}: {state}: {contender['reason']}"
    yield from result["notes"]
    if result["interrupted"]:
        yield "Interrupted: not everything was measured."


def _place(row: dict[str, Any]) -> str:
    return "cpu" if row["device"] == "cpu" else "cuda"


def markdown(result: Result) -> str:
    """Tables and remarks."""
    parts = []
    for table in tables(result):
        lines = [f"**{table.title}**", "", _line(table.header)]
        lines.append(_line(["---"] + ["---:"] * (len(table.header) - 1)))
        parts.append("\n".join([*lines, *map(_line, table.rows)]))
    parts.append("\n".join(f"- {remark.replace('|', '/')}" for remark in remarks(result)))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def plot(result: Result) -> bytes:
    """A PNG: images/s over the batch size, a line for each contender, and the limits.

    Raises:
        ImportError: matplotlib is not there.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    axes = figure.subplots()
    batches = sorted({row["batch"] for row in result["rows"]})
    shown = _measured(result)
    circle: Any = {"markersize": 13, "markerfacecolor": "none", "color": "grey"}
    precisions = []
    for k, (contender, _) in enumerate(shown):
        rows = rows_of(result, contender["path"])
        original = contender["path"] == shown[0][0]["path"]
        axes.plot(
            [row["batch"] for row in rows],
            [row["images_per_second"] for row in rows],
            marker="os^Dv<>"[k % 7],
            color="black" if original else f"C{k % 10}",
            label=contender["path"],
        )
        if unstable := [row for row in rows if not row["stable"]]:
            axes.plot(
                [row["batch"] for row in unstable],
                [row["images_per_second"] for row in unstable],
                "o",
                **circle,
            )
        precisions.append((_place(contender), limit_of(contender["precision"])))
    per_image = result["model"]["flop_per_image_and_step"] * result["settings"]["steps"]
    for style, (device, precision) in enumerate(dict.fromkeys(precisions)):
        peak = result["peaks"].get(device, {}).get("flops_per_second", {}).get(precision)
        if peak is None:
            continue
        limit = peak / per_image
        label = f"limit of {device}, {precision}: {_number(limit)}"
        axes.axhline(limit, linestyle=("--", ":", "-.")[style % 3], color="grey", label=label)
    if not all(row["stable"] for row in result["rows"]):
        axes.plot([], [], "o", **circle, label="unstable")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xlabel("batch size")
    axes.set_ylabel(f"images/s of {result['settings']['steps']} steps")
    axes.set_title(f"{result['model']['name']} on {result['machine']['cpu']}", fontsize=10)
    axes.grid(which="both", alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
