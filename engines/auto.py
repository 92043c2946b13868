"""What `--backend auto` takes: the fastest engine that passed parity on this machine.

Speeds are those that `lutdeploy bench` wrote into the run, verdicts those of `lutdeploy parity`.
Both count for the very files that they were found on, on this machine with these versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.verdicts import Verdict, is_reference, read_verdicts
from lutdeploy.device import parse_device
from lutdeploy.engines import EngineRequest
from lutdeploy.engines.benchmark.result import REMEDY, Result, Row
from lutdeploy.machine import this_machine

AUTO_BATCH = 64  # images per pass that "auto" chooses for, where nobody says how many


@dataclass(frozen=True)
class Choice:
    """An engine to open, and why this one."""

    name: str  # such as "openvino-bf16"
    request: EngineRequest
    engine_sha256: str  # of what was measured
    why: str


def measured_choices(run: Run, request: EngineRequest) -> list[Choice]:
    """What could be opened, the fastest first; empty when nothing was measured here.

    Only engines on the request's device and of its export, where it names them.
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
        and (request.device is None or parse_device(request.device) == parse_device(row.device))
        and request.export in (None, row.export)
        and (row.export is None or run.export_folder(row.export).is_dir())
    ]
    verdicts = [v for v in read_verdicts(run) if v.machine == machine]
    return rank(run, rows, verdicts, request)


def rank(
    run: Run, rows: Iterable[Row], verdicts: Sequence[Verdict], request: EngineRequest
) -> list[Choice]:
    """The engines that passed, the fastest first, at the request's batch or else 64 images.

    ``rows`` are those of bench.json, of which each engine's nearest to the batch counts, and
    ``verdicts`` those found on this machine.
    """
    batch = request.batch or AUTO_BATCH
    ordered = sorted(rows, key=lambda row: row.path)
    telling = [nearest(list(own), batch) for _, own in groupby(ordered, lambda row: row.path)]
    telling.sort(key=seconds_per_image)
    passed = [row for row in telling if has_passed(row, verdicts)]
    return [_choice(run, row, telling, passed, request) for row in passed]


def nearest(rows: Sequence[Row], batch: int) -> Row:
    """The row of the largest batch that is not above ``batch``; else of the smallest."""
    ascending = sorted(rows, key=lambda row: row.batch)
    below = [row for row in ascending if row.batch <= batch]
    return below[-1] if below else ascending[0]


def seconds_per_image(row: Row) -> float:
    """Of one step."""
    return row.step_seconds / row.batch


def has_passed(row: Row, verdicts: Iterable[Verdict]) -> bool:
    """Whether just what the row measured has passed parity.

    The check after an export looks at single steps alone and does not count.
    """
    told = (row.backend, row.export, row.computes_on, row.engine_sha256)
    if row.backend.startswith("tensorrt") or is_reference(row.backend, row.computes_on):
        return True  # an engine of TensorRT carries the verdict of its build, or does not open
    return any(
        verdict.passed
        and verdict.check != "export"
        and (verdict.backend, verdict.export, verdict.device, verdict.engine_sha256) == told
        for verdict in verdicts
    )


def _choice(
    run: Run, row: Row, telling: Sequence[Row], passed: Sequence[Row], request: EngineRequest
) -> Choice:
    speed = f"{1000 * seconds_per_image(row):.3g} ms an image and step at batch {row.batch}"
    speed += "" if row.stable else " in an unstable measurement"
    why = f"{row.path}, {speed}"
    if row is passed[0]:
        why = f"{row.path}, the fastest of {len(passed)} that passed parity here: {speed}"
    faster = [r.path for r in telling[: telling.index(row)] if r not in passed]
    if faster:
        why += f"; faster, but not passed: {', '.join(faster)} (`lutdeploy parity --all` judges)"
    options = dict(pairwise(row.sample_options or ()))
    chosen = replace(
        request,
        path=run.path,
        backend=row.backend,
        device=row.device,
        export=row.export,
        precision=options.get("--precision"),
        batch=row.batch,  # with another one TensorRT may open another engine than was measured
    )
    return Choice(row.path, chosen, row.engine_sha256, why)
