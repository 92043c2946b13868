"""What `--backend auto` takes: the fastest engine that passed parity on this machine.

Speeds are those that `lutdeploy bench` wrote into the run, verdicts those of `lutdeploy parity`.
Both count for the very files that they were found on, on this machine with these versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.engines.benchmark.result import REMEDY, Result, Row
from lutdeploy.machine import this_machine

# Judged elsewhere: PyTorch is what the others are compared with, and TensorRT's engines carry
# the verdict of their build, without which they do not open.
JUDGED = ("torch", "tensorrt")


@dataclass(frozen=True)
class Choice:
    """An engine to open, in the words of :func:`engines.open_engine`, and why this one."""

    name: str  # such as "openvino-bf16"
    backend: str
    device: str | None
    export: str | None
    precision: str | None
    engine_sha256: str  # of what was measured
    why: str


def measured_choices(run: Run, batch: int, device: str | None, export: str | None) -> list[Choice]:
    """What could be opened, the fastest first; empty when nothing was measured here.

    Args:
        run: with its bench.json and parity.json.
        batch: images per pass.
        device, export: only engines on this device, of this export.

    Raises:
        ArtefactError: a damaged bench.json or parity.json.
    """
    if not run.bench.is_file():
        return []
    machine = this_machine().fingerprint()
    result = files.read_record(run.bench, Result, REMEDY)
    if result.model.sha256 != files.sha256(run.model) or result.fingerprint != machine:
        return []
    rows = [
        row
        for row in result.rows
        if row.sample_options is not None
        and device in (None, row.device)
        and (export is None or row.export == export)
        and (row.export is None or run.export_folder(row.export).is_dir())
    ]
    verdicts = [v for v in run.verdicts().values() if v.get("machine") == machine]
    return rank(rows, verdicts, batch)


def rank(rows: Iterable[Row], verdicts: Sequence[Mapping[str, Any]], batch: int) -> list[Choice]:
    """The engines that passed, the fastest first.

    Args:
        rows: of bench.json; of each engine the one that tells most about ``batch`` counts.
        verdicts: of parity.json.
        batch: images per pass.
    """
    ordered = sorted(rows, key=lambda row: row.path)
    telling = [nearest(list(own), batch) for _, own in groupby(ordered, lambda row: row.path)]
    telling.sort(key=seconds_per_image)
    passed = [row for row in telling if has_passed(row, verdicts)]
    return [_choice(row, telling, passed) for row in passed]


def nearest(rows: Sequence[Row], batch: int) -> Row:
    """The row of the largest batch that is not above ``batch``; else of the smallest."""
    below = [row for row in rows if row.batch <= batch]
    if below:
        return max(below, key=lambda row: row.batch)
    return min(rows, key=lambda row: row.batch)


def seconds_per_image(row: Row) -> float:
    """Of one step."""
    return row.step_seconds / row.batch


def has_passed(row: Row, verdicts: Iterable[Mapping[str, Any]]) -> bool:
    """Whether just what the row measured has passed parity."""
    told = (row.backend, row.export, row.computes_on, row.engine_sha256)
    return row.backend in JUDGED or any(
        verdict.get("passed") is True
        and tuple(verdict.get(k) for k in ("backend", "export", "device", "engine_sha256")) == told
        for verdict in verdicts
    )


def _choice(row: Row, telling: Sequence[Row], passed: Sequence[Row]) -> Choice:
    speed = f"{1000 * seconds_per_image(row):.3g} ms an image and step at batch {row.batch}"
    speed += "" if row.stable else " in an unstable measurement"
    why = f"{row.path}, {speed}"
    if row is passed[0]:
        why = f"{row.path}, the fastest of {len(passed)} that passed parity here: {speed}"
    faster = [r.path for r in telling[: telling.index(row)] if r not in passed]
    if faster:
        why += f"; faster, but not passed: {', '.join(faster)} (`lutdeploy parity --all` judges)"
    return Choice(
        name=row.path,
        backend=row.backend,
        device=row.device,
        export=row.export,
        precision="bf16" if "--precision" in (row.sample_options or ()) else None,
        engine_sha256=row.engine_sha256,
        why=why,
    )
