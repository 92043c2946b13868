"""The schedules that `lutdeploy tune-steps` found for one model, and the file that keeps them.

The file stands beside its model and names it by hash, so that schedules are never used with
weights they were not searched for. Each entry says on which noise it was searched and on
which other noise its error was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.run import MODEL, locate, tuned_steps_file
from lutdeploy.errors import ArtefactError, ConfigError
from lutdeploy.sampling import Denoiser, check_schedule
from lutdeploy.schedule import Schedule, ScheduleRequest, tuned_schedule

FORMAT = 1


class Noise(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Images 0 … images−1 of a seed (:func:`lutdeploy.sampling.image_noise`)."""

    seed: int
    images: int


class Entry(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    rename={"schedule": "table"},  # the name it has in the JSON
):
    """One tuned schedule, and the errors that speak for it.

    Errors are the RMS between endpoints and the reference's, over the held-out noise: of this
    schedule, of the uniform grid, and of the best shifted one, whose shift was chosen on the
    noise that the schedule was tuned on. ``reference`` is a schedule's description.
    """

    schedule: Schedule
    tuned_on: Noise
    held_out: Noise
    reference: str
    rms: float
    rms_uniform: float
    rms_shifted: float
    shift: float

    def __post_init__(self) -> None:
        again = tuned_schedule(self.schedule.solver, self.schedule.times)
        for row, expected in zip(self.schedule.rows, again.rows, strict=True):
            pairs = zip(
                msgspec.structs.astuple(row), msgspec.structs.astuple(expected), strict=True
            )
            if not all(math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12) for x, y in pairs):
                raise ConfigError(f"the row at t = {row.t:g} is no step of {self.schedule.solver}")
        if self.schedule.grid != "tuned":
            raise ConfigError(f"{self.schedule.describe()} is no tuned table")
        if not math.isfinite(self.rms) or self.rms >= min(self.rms_uniform, self.rms_shifted):
            raise ConfigError(f"{self.schedule.describe()} is not better than an untuned grid")


class KnownDenoiser(Denoiser, Protocol):
    """A denoiser that knows which model it computes: ``identity["model_sha256"]``."""

    @property
    def identity(self) -> dict[str, Any]: ...


class TunedSteps(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All entries of a model, at most one for a solver and a number of steps.

    ``comparison`` is what training.few_steps.comparison measured last, as plain JSON values.
    """

    model_sha256: str
    entries: tuple[Entry, ...]
    comparison: dict[str, Any] | None
    format: int = FORMAT

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """By steps, and among those of one number the one with the least error first."""
        ordered = sorted(self.entries, key=lambda entry: (entry.schedule.steps, entry.rms))
        return tuple(entry.schedule for entry in ordered)

    @property
    def best(self) -> Schedule | None:
        """The one with the least error of all."""
        entry = min(self.entries, key=lambda entry: entry.rms, default=None)
        return entry.schedule if entry else None

    def without(self, solver: str, steps: int) -> TunedSteps:
        """The same without an entry, if there is one."""
        kept = [e for e in self.entries if (e.schedule.solver, e.schedule.steps) != (solver, steps)]
        return msgspec.structs.replace(self, entries=tuple(kept))

    def updated(self, entries: Iterable[Entry]) -> TunedSteps:
        """With ``entries`` in the place of those of the same solver and steps."""
        result = self
        for entry in entries:
            kept = result.without(entry.schedule.solver, entry.schedule.steps)
            result = msgspec.structs.replace(kept, entries=(*kept.entries, entry))
        return result

    def write(self, path: Path) -> None:
        files.write_json(path, self)


def read_tuned_steps(path: Path) -> TunedSteps:
    """Read and check a file of :meth:`TunedSteps.write`."""
    remedy = "delete it and run `lutdeploy tune-steps`"
    found = files.read_record(path, TunedSteps, remedy)
    if found.format != FORMAT:
        raise ArtefactError(
            f"{path} has format {found.format!r}, this version reads {FORMAT}; {remedy}"
        )
    names = [schedule.describe() for schedule in found.schedules]
    if len(set(names)) < len(names):
        raise ArtefactError(f"{path} is damaged (an entry stands there twice); {remedy}")
    return found


def stored_tuned_steps(path: Path, model_sha256: str) -> TunedSteps | None:
    """What is stored for a run, a model file or an export folder; None: nothing is.

    An export that belongs to no model file brings the schedules of its manifest, which have
    no errors; see :func:`tuned_schedules`.

    Args:
        path: as :func:`lutdeploy.artefacts.run.locate` takes it.
        model_sha256: of the model in use.

    Raises:
        ArtefactError: damaged, or tuned for other weights.
        UsageError: nothing there.
    """
    located = locate(path)
    stored = tuned_steps_file(located.model) if located.model else None
    if stored is None or not stored.is_file():
        return None
    known = read_tuned_steps(stored)
    if known.model_sha256 != model_sha256:
        raise ArtefactError(
            f"{stored} was tuned for another {MODEL} than the one in use (trained on since?); "
            "run `lutdeploy tune-steps` again"
        )
    return known


def tuned_schedules(path: Path, model_sha256: str) -> Sequence[Schedule]:
    """The tuned schedules of a run, a model file or an export folder, the best first."""
    known = stored_tuned_steps(path, model_sha256)
    if known is not None:
        return known.schedules
    export = locate(path).export
    return read_manifest(export).tuned if export else ()


def resolve_schedule(
    request: ScheduleRequest,
    path: Path,
    denoiser: KnownDenoiser,
    note: Callable[[str], None] | None = None,
) -> Schedule:
    """The schedule that a request means for a denoiser opened from ``path``.

    Args:
        request: what was asked for.
        path: whose tuned schedules count.
        denoiser: must be able to follow it.
        note: told of the choice where nothing was asked for, which then is the model's best
            tuned schedule, if it has one. None keeps to 64 Euler steps.
    """
    model = denoiser.identity["model_sha256"]
    held = denoiser.schedule
    if note is not None and held is None and request == ScheduleRequest():
        best = _best(path, model, note)
        if best is not None:
            return best
    schedule = request.resolve(held, lambda: tuned_schedules(path, model))
    check_schedule(denoiser, schedule)
    return schedule


def _best(path: Path, model_sha256: str, note: Callable[[str], None]) -> Schedule | None:
    """The tuned schedule of the least error, if there is one for these weights."""
    try:
        known = stored_tuned_steps(path, model_sha256)
    except ArtefactError as error:
        note(f"warning: {error}; until then it takes 64 Euler steps")
        return None
    if known is None or known.best is None:
        return None
    note(
        f"schedule: {known.best.describe()}, the best that tune-steps found for this model; "
        "--solver euler --steps 64 is the reference"
    )
    return known.best
