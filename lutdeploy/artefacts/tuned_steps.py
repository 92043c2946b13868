"""The time grids that `lutdeploy tune-steps` found for one model, and the file that keeps them.

The file stands beside its model and names it by hash, so that grids are never used with
weights they were not searched for. Each entry says on which noise it was searched and on
which other noise its error was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.run import MODEL, locate, tuned_steps_file
from lutdeploy.errors import ArtefactError, ConfigError
from lutdeploy.schedule import Schedule, tuned_schedule

FORMAT = 1


@dataclass(frozen=True)
class Noise:
    """Images 0 … images−1 of a seed (:func:`lutdeploy.sampling.image_noise`)."""

    seed: int
    images: int


@dataclass(frozen=True)
class Entry:
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
            pairs = zip(_numbers(row), _numbers(expected), strict=True)
            if not all(math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12) for x, y in pairs):
                raise ConfigError(f"the row at t = {row.t:g} is no step of {self.schedule.solver}")
        if self.schedule.grid != "tuned":
            raise ConfigError(f"{self.schedule.describe()} is no tuned table")
        if not math.isfinite(self.rms) or self.rms >= min(self.rms_uniform, self.rms_shifted):
            raise ConfigError(f"{self.schedule.describe()} is not better than an untuned grid")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "table": self.schedule.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Entry:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError, KeyError, TypeError, ValueError: no such entry.
        """

        def noise(name: str) -> Noise:
            return Noise(int(values[name]["seed"]), int(values[name]["images"]))

        return cls(
            schedule=Schedule.from_dict(values["table"]),
            tuned_on=noise("tuned_on"),
            held_out=noise("held_out"),
            reference=str(values["reference"]),
            rms=float(values["rms"]),
            rms_uniform=float(values["rms_uniform"]),
            rms_shifted=float(values["rms_shifted"]),
            shift=float(values["shift"]),
        )


def _numbers(row: Any) -> tuple[float, ...]:
    return row.t, row.a, row.b, row.c, row.d


@dataclass(frozen=True)
class TunedSteps:
    """All entries of a model, at most one for a solver and a number of steps.

    ``comparison`` is what training.few_steps.comparison measured last, as plain JSON values.
    """

    model_sha256: str
    entries: tuple[Entry, ...] = ()
    comparison: dict[str, Any] | None = None

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """By steps, and among those of one number the one with the least error first."""
        ordered = sorted(self.entries, key=lambda entry: (entry.schedule.steps, entry.rms))
        return tuple(entry.schedule for entry in ordered)

    def without(self, solver: str, steps: int) -> TunedSteps:
        """The same without an entry, if there is one."""
        kept = [e for e in self.entries if (e.schedule.solver, e.schedule.steps) != (solver, steps)]
        return replace(self, entries=tuple(kept))

    def updated(self, entries: Iterable[Entry]) -> TunedSteps:
        """With ``entries`` in the place of those of the same solver and steps."""
        result = self
        for entry in entries:
            kept = result.without(entry.schedule.solver, entry.schedule.steps)
            result = replace(kept, entries=(*kept.entries, entry))
        return result

    def write(self, path: Path) -> None:
        """Write atomically."""
        values = {
            "format": FORMAT,
            "model_sha256": self.model_sha256,
            "entries": [entry.to_dict() for entry in self.entries],
            "comparison": self.comparison,
        }
        files.write_json(path, values)


def read_tuned_steps(path: Path) -> TunedSteps:
    """Read and check a file of :meth:`TunedSteps.write`.

    Raises:
        ArtefactError: missing, of another format, or damaged.
    """
    try:
        values = files.read_json(path)
    except ArtefactError as error:
        raise ArtefactError(f"{error}; delete it and run `lutdeploy tune-steps`") from error
    try:
        if values["format"] != FORMAT:
            raise ArtefactError(
                f"{path} has format {values['format']!r}, this version reads {FORMAT}; delete it "
                "and run `lutdeploy tune-steps`"
            )
        comparison = values["comparison"]
        if comparison is not None and not isinstance(comparison, dict):
            raise ConfigError("its comparison is no table")
        entries = tuple(Entry.from_dict(entry) for entry in values["entries"])
        found = TunedSteps(str(values["model_sha256"]), entries, comparison)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(
            f"{path} is damaged ({error}); delete it and run `lutdeploy tune-steps`"
        ) from error
    names = [schedule.describe() for schedule in found.schedules]
    if len(set(names)) < len(names):
        raise ArtefactError(f"{path} is damaged (an entry stands there twice); delete it")
    return found


def require_fresh(known: TunedSteps, path: Path, model_sha256: str) -> None:
    """Refuse grids that were searched for other weights.

    Raises:
        ArtefactError: says what to do.
    """
    if known.model_sha256 != model_sha256:
        raise ArtefactError(
            f"{path} was tuned for another {MODEL} than the one in use (trained on since?); "
            "run `lutdeploy tune-steps` again"
        )


def tuned_schedules(path: Path, model_sha256: str) -> Sequence[Schedule]:
    """The tuned schedules of a run, a model file or an export folder, the best first.

    Args:
        path: as :func:`lutdeploy.artefacts.run.locate` takes it.
        model_sha256: of the model in use.

    Raises:
        ArtefactError: damaged, or tuned for other weights.
        UsageError: nothing there.
    """
    located = locate(path)
    stored = tuned_steps_file(located.model) if located.model else None
    if stored is not None and stored.is_file():
        known = read_tuned_steps(stored)
        require_fresh(known, stored, model_sha256)
        return known.schedules
    return read_manifest(located.export).tuned if located.export else ()
