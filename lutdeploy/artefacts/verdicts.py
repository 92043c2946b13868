"""Verdicts: whether an engine paints what the PyTorch model paints, kept by what was judged.

The check after an export, the check after a build and `lutdeploy parity` write the same kind of
record, one file each, into the run's folder ``verdicts``. A verdict holds for the very bytes that
were judged: its key has their hash, so that a new export or engine has none. A later check of
the same engine takes the place of an earlier one.
"""

from __future__ import annotations

import errno
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import lutdeploy
from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run, locate
from lutdeploy.errors import ArtefactError, ParityError
from lutdeploy.machine import this_machine

if TYPE_CHECKING:  # the command line reads verdicts and should not wait for torch
    from lutdeploy.parity import Report

REMEDY = "delete it and run `lutdeploy parity`"
Number = float | str  # an infinity is a string: JSON has none


class CheckRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A :class:`lutdeploy.parity.Check` with its outcome."""

    level: str
    what: str
    measure: str
    value: Number
    limit: Number
    passed: bool


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a check found of one engine, on one machine."""

    backend: str
    device: str
    export: str | None
    engine_sha256: str
    model_sha256: str
    lutdeploy: str  # version
    machine: dict[str, Any]  # lutdeploy.machine.Machine.fingerprint()
    passed: bool
    precision: str  # whose limits were applied: "fp16", "int8-bf16", …
    solver: str  # the schedule's description
    images: int
    final: dict[str, Number]  # lutdeploy.parity.Difference
    drift_rms: tuple[Number, ...]
    checks: tuple[CheckRecord, ...]
    check: str = "parity"  # "export", "build" or "parity"
    failures: tuple[str, ...] = ()
    layers: dict[str, Any] | None = None  # what TensorRT's engine inspector showed

    @property
    def key(self) -> str:
        """The file's name without its ending."""
        text = "\n".join((self.engine_sha256, self.backend, self.device))
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def judged(self, identity: dict[str, Any]) -> bool:
        """Whether it is about the engine of this identity."""
        names = ("engine_sha256", "backend", "device")
        return all(getattr(self, name) == identity[name] for name in names)


def verdict_of(
    report: Report,
    identity: dict[str, Any],
    check: str,
    failures: Sequence[str] = (),
    layers: dict[str, Any] | None = None,
) -> Verdict:
    """The record of a comparison that ran here.

    Args:
        report: what the comparison found.
        identity: of the engine: backend, device, export, engine_sha256, model_sha256.
        check: "export", "build" or "parity".
        failures: what the check found beside the report.
        layers: see :class:`Verdict`.
    """

    def plain(value: float) -> Number:
        return value if math.isfinite(value) else str(value)

    return Verdict(
        **identity,
        lutdeploy=lutdeploy.__version__,
        machine=this_machine().fingerprint(),
        passed=report.passed and not failures,
        precision=report.precision,
        solver=report.schedule.describe(),
        images=report.images,
        final={name: plain(value) for name, value in vars(report.final).items()},
        drift_rms=tuple(plain(value) for value in report.drift),
        checks=tuple(
            CheckRecord(c.level, c.what, c.measure, plain(c.value), plain(c.limit), c.passed)
            for c in report.checks
        ),
        check=check,
        failures=(*failures, *report.failures()),
        layers=layers,
    )


def store_verdict(run: Run, verdict: Verdict) -> None:
    """Keep a verdict, in the place of an earlier one on the same engine."""
    files.write_json(run.verdicts / f"{verdict.key}.json", verdict)


def keep_verdict(run: Run, verdict: Verdict, note: Callable[[str], None]) -> None:
    """Store a verdict; of a run that is not ours to write into, say so and go on."""
    try:
        store_verdict(run, verdict)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        note(f"warning: this verdict is not kept: {run.verdicts}: {error.strerror}")


def read_verdicts(run: Run) -> list[Verdict]:
    """All verdicts of a run, also those that an earlier version kept in parity.json."""
    found = {}
    if run.old_verdicts.is_file():
        old = files.read_record(run.old_verdicts, dict[str, Verdict], REMEDY)
        found = {verdict.key: verdict for verdict in old.values()}
    for path in sorted(run.verdicts.glob("[0-9a-f]*.json")):
        verdict = files.read_record(path, Verdict, REMEDY)
        if path.stem != verdict.key:
            raise ArtefactError(f"{path} is the verdict on another engine; {REMEDY}")
        found[verdict.key] = verdict
    return list(found.values())


def is_reference(backend: str, device: str) -> bool:
    """Whether an engine is what others are compared with: float32 PyTorch on the CPU."""
    return (backend, device) == ("torch", "cpu")


def require_passed(path: Path, identity: dict[str, Any], note: Callable[[str], None]) -> None:
    """Refuse an engine whose last check failed; note where `parity` has not judged it.

    Args:
        path: where it was opened from.
        identity: of the engine.
        note: told what has not been judged.
    """
    if is_reference(identity["backend"], identity["device"]):
        return
    located = locate(path)
    # An export that belongs to no run may bring its verdicts: that of the package's model does.
    run = located.run or next(map(Run, located.exports()), None)
    export = identity["export"]
    name = f"export {export}" if export else f"{identity['backend']} on {identity['device']}"
    verdict = next((v for v in read_verdicts(run) if v.judged(identity)), None) if run else None
    if verdict is not None and not verdict.passed:
        raise ParityError(
            f"{name} failed parity; `lutdeploy parity` shows where, "
            "--unverified samples all the same"
        )
    if identity["backend"].startswith("tensorrt"):
        return  # each engine has the verdict of its build, without which it does not open
    if verdict is None or verdict.check == "export":
        passed = "this export has passed the check at export; " if export else ""
        note(f"{passed}`lutdeploy parity` has not judged {'it' if export else name} yet")
