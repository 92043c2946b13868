"""The schedules that `lutdeploy tune-steps` fitted to one model, and the file that keeps them.

The file stands beside its model and names it by hash, so that schedules are never used with
weights they were not fitted to. Each stands beside the best formula of as many steps, and both
were measured on noise that no fit has seen.

A distilled model has one schedule, in its own metadata, and follows no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.metadata import read_metadata
from lutdeploy.artefacts.run import MODEL, locate, tuned_steps_file
from lutdeploy.errors import ArtefactError, ConfigError
from lutdeploy.sampling import Denoiser, check_schedule
from lutdeploy.schedule import (
    DISTILLED,
    FITTED,
    Schedule,
    ScheduleRequest,
    fitted_schedule,
)

FORMAT = 2  # 1 held solvers over searched times
REMEDY = "run `lutdeploy tune-steps` again"
AS_GOOD = 1.15  # times the least error: fewer steps are preferred up to there


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A schedule and its errors on unseen noise.

    ``rms`` is to the ends of the reference. The others are distances of `lutdeploy evaluate` to
    real images, sliced Wasserstein that of the finest level; None where there were no images.
    """

    schedule: Schedule
    rms: float
    frechet: float | None = None
    sliced_wasserstein: float | None = None

    @property
    def error(self) -> float:
        """What schedules are compared by."""
        return self.rms if self.frechet is None else self.frechet


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fitted schedule, and the best formula of as many steps, which it beats."""

    fitted: Measured
    formula: Measured

    def __post_init__(self) -> None:
        schedule = self.fitted.schedule
        if schedule != fitted_schedule(schedule.rows):
            raise ConfigError(f"{schedule.describe()} is no fitted schedule")
        if (self.fitted.frechet is None) != (self.formula.frechet is None):
            raise ConfigError(f"{schedule.describe()} and its formula were measured differently")
        if not self.fitted.error < self.formula.error < math.inf:
            raise ConfigError(
                f"{schedule.describe()} is not better than {self.formula.schedule.describe()}"
            )


class KnownDenoiser(Denoiser, Protocol):
    """A denoiser that knows which model it computes: ``identity["model_sha256"]``."""

    @property
    def identity(self) -> dict[str, Any]: ...


class TunedSteps(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one `tune-steps` found: at most one entry for a number of steps.

    Schedules were fitted on images 0 … fitted_on−1 of ``seed``, and measured on images of the
    next seed: as many for the RMS to ``reference``, ``pictures`` for the distances (0: none).
    """

    model_sha256: str
    seed: int
    fitted_on: int
    pictures: int
    reference: str
    entries: tuple[Entry, ...]
    format: int = FORMAT

    def __post_init__(self) -> None:
        steps = [entry.fitted.schedule.steps for entry in self.entries]
        if len(set(steps)) < len(steps):
            raise ConfigError("a number of steps stands there twice")

    @property
    def best(self) -> Schedule | None:
        """The fewest steps whose error is within AS_GOOD of the least."""
        least = min((entry.fitted.error for entry in self.entries), default=0.0)
        good = [e.fitted.schedule for e in self.entries if e.fitted.error <= AS_GOOD * least]
        return min(good, key=lambda schedule: schedule.steps, default=None)

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The best first, the others by their steps."""
        found = sorted((entry.fitted.schedule for entry in self.entries), key=lambda s: s.steps)
        return tuple(sorted(found, key=lambda schedule: schedule != self.best))

    def write(self, path: Path) -> None:
        files.write_json(path, self)


class _AnyFormat(msgspec.Struct):
    """What every version's file says."""

    format: int


def read_tuned_steps(path: Path) -> TunedSteps:
    """Read and check a file of :meth:`TunedSteps.write`.

    Raises:
        ArtefactError: damaged, or of an earlier version, whose schedules were searched otherwise.
    """
    version = files.read_record(path, _AnyFormat, REMEDY).format
    if version != FORMAT:
        raise ArtefactError(f"{path} has format {version}, this version reads {FORMAT}; {REMEDY}")
    return files.read_record(path, TunedSteps, REMEDY)


def stored_tuned_steps(path: Path, model_sha256: str) -> TunedSteps | None:
    """What is stored for a run, a model file or an export folder; None: nothing is.

    Args:
        path: as :func:`lutdeploy.artefacts.run.locate` takes it.
        model_sha256: of the model in use.

    Raises:
        ArtefactError: damaged, of an earlier version, or fitted to other weights.
        UsageError: nothing there.
    """
    located = locate(path)
    stored = tuned_steps_file(located.model) if located.model else None
    if stored is None or not stored.is_file():
        return None
    known = read_tuned_steps(stored)
    if known.model_sha256 != model_sha256:
        raise ArtefactError(
            f"{stored} was fitted to another {MODEL} than the one in use (trained on since?); "
            f"{REMEDY}"
        )
    return known


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a distilled model learnt from: in its metadata, as ``distilled``."""

    teacher: str  # a name, for people
    teacher_sha256: str
    teacher_steps: int
    schedule: Schedule  # the student's
    guidance: float | None = None  # weight of what guided the teacher, if anything did


def distilled_from(about: Mapping[str, Any], path: Path) -> Origin | None:
    """The origin of a distilled model, from what the metadata of ``path`` say; None of others."""
    if "distilled" not in about:
        return None
    try:
        return msgspec.convert(about["distilled"], Origin)
    except (msgspec.ValidationError, ConfigError) as error:
        raise ArtefactError(f"{path}: unreadable metadata of a distilled model: {error}") from error


def distilled_schedule(path: Path) -> Schedule | None:
    """The only schedule of a distilled model; None of any other.

    ``path``: as :func:`lutdeploy.artefacts.run.locate` takes it. An export that belongs to no
    model file has it in its manifest.
    """
    located = locate(path)
    if located.model is not None:
        origin = distilled_from(read_metadata(located.model)[1], located.model)
        return origin.schedule if origin else None
    assert located.export is not None
    brought = read_manifest(located.export).tuned
    return next((schedule for schedule in brought if schedule.solver == DISTILLED), None)


def fitted_schedules(path: Path, model_sha256: str) -> Sequence[Schedule]:
    """The fitted schedules of a run, a model file or an export folder, the best first.

    An export that belongs to no model file brings those of its manifest. A distilled model has its
    own alone.
    """
    own = distilled_schedule(path)
    if own is not None:
        return (own,)
    known = stored_tuned_steps(path, model_sha256)
    if known is not None:
        return known.schedules
    export = locate(path).export
    brought = read_manifest(export).tuned if export else ()
    return [schedule for schedule in brought if schedule.solver == FITTED]


def usable_schedules(
    path: Path, model_sha256: str, note: Callable[[str], None]
) -> Sequence[Schedule]:
    """:func:`fitted_schedules`; none, and a note, where they are of no use."""
    try:
        return fitted_schedules(path, model_sha256)
    except ArtefactError as error:
        note(f"{error}; left out")
        return ()


def resolve_schedule(
    request: ScheduleRequest,
    path: Path,
    denoiser: KnownDenoiser,
    note: Callable[[str], None] | None = None,
) -> Schedule:
    """The schedule that a request means for a denoiser opened from ``path``.

    Args:
        request: what was asked for.
        path: whose fitted schedules count.
        denoiser: must be able to follow it.
        note: told of the choice where nothing was asked for, which then is the model's best
            fitted schedule, if it has one. None keeps to 64 Euler steps.

    A distilled model's own schedule is the only one.
    """
    model = denoiser.identity["model_sha256"]
    own = distilled_schedule(path)
    held = own or denoiser.schedule
    if note is not None and held is None and request == ScheduleRequest():
        best = _best(path, model, note)
        if best is not None:
            return best
    schedule = request.resolve(held, lambda: fitted_schedules(path, model))
    check_schedule(denoiser, schedule)
    if own is not None and note is not None:
        note(f"schedule: {own.describe()}, which this model was distilled to")
    return schedule


def _best(path: Path, model_sha256: str, note: Callable[[str], None]) -> Schedule | None:
    """The best fitted schedule, if there is one for these weights."""
    try:
        schedules = fitted_schedules(path, model_sha256)
    except ArtefactError as error:
        note(f"warning: {error}; until then it takes 64 Euler steps")
        return None
    if not schedules:
        return None
    note(
        f"schedule: {schedules[0].describe()}, the best that tune-steps fitted to this model; "
        "--solver euler --steps 64 is the reference"
    )
    return schedules[0]
