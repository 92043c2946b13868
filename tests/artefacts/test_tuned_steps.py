"""steps.json: whole, of its model, and of nothing that is not better."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import MANIFEST, read_manifest
from lutdeploy.artefacts.run import Run, tuned_steps_file
from lutdeploy.artefacts.tuned_steps import (
    Entry,
    Measured,
    TunedSteps,
    fitted_schedules,
    read_tuned_steps,
)
from lutdeploy.errors import ArtefactError, ConfigError
from lutdeploy.schedule import Schedule, Step, fitted_schedule, solver_schedule


def schedule(steps: int) -> Schedule:
    return fitted_schedule([Step(k / steps, 0.5, 0.6, -0.1 * (k > 0)) for k in range(steps)])


def entry(steps: int = 3, rms: float = 0.1, frechet: float | None = None) -> Entry:
    formula = Measured(
        solver_schedule("dpmpp-2m", steps, 0.5), 0.4, None if frechet is None else 99
    )
    return Entry(Measured(schedule(steps), rms, frechet), formula)


def known(*entries: Entry, model: str = "abc") -> TunedSteps:
    return TunedSteps(model, 1, 24, 0, "euler-256", entries)


def test_round_trip(tmp_path: Path) -> None:
    found = known(entry(4, frechet=30), entry(2))
    found.write(tmp_path / "steps.json")
    assert read_tuned_steps(tmp_path / "steps.json") == found


@pytest.mark.parametrize(
    ("errors", "best"),
    [
        ({2: 0.3, 4: 0.2, 8: 0.1}, 8),
        ({2: 0.3, 8: 0.1, 4: 0.114}, 4),  # as good, and of fewer steps
        ({2: 0.05, 4: 0.2, 8: 0.1}, 2),
    ],
)
def test_the_best_are_the_fewest_steps_that_are_as_good(
    errors: dict[int, float], best: int
) -> None:
    by_rms = known(*(entry(steps, rms) for steps, rms in errors.items()))
    by_distance = known(*(entry(s, 0.3 / s, 100 * error) for s, error in errors.items()))
    for found in (by_rms, by_distance):
        assert found.best == schedule(best)
        others = sorted(set(errors) - {best})
        assert [s.steps for s in found.schedules] == [best, *others]
    assert known().best is None


@pytest.mark.parametrize("rms", [0.4, 0.45, float("nan"), float("inf")])
def test_what_is_not_better_is_no_entry(rms: float) -> None:
    with pytest.raises(ConfigError, match=r"fitted-3 is not better than dpmpp-2m-3-shift0\.5"):
        entry(rms=rms)
    with pytest.raises(ConfigError, match="not better"):
        entry(rms=0.1, frechet=99)
    assert entry(rms=rms, frechet=50).fitted.error == 50, "distances decide where there are some"


def test_only_fitted_schedules_are_entries() -> None:
    formula = Measured(solver_schedule("euler", 3), 0.4)
    with pytest.raises(ConfigError, match="dpmpp-2m-3 is no fitted schedule"):
        Entry(Measured(solver_schedule("dpmpp-2m", 3), 0.1), formula)
    with pytest.raises(ConfigError, match="measured differently"):
        Entry(Measured(schedule(3), 0.1, 5.0), formula)


def _set(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(values: Any) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return change


ROWS = ("entries", 0, "fitted", "schedule", "rows")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_set("format", value=1), "has format 1, this version reads 2"),
        (lambda values: values.pop("entries"), "required field `entries`"),
        (lambda values: values.pop("model_sha256"), "required field `model_sha256`"),
        (_set(*ROWS, 1, 0, value=0.9), "rise from 0 to 1"),
        (_set(*ROWS, 1, 2, value="much"), "Expected `float`, got `str`"),
        (_set(*ROWS[:-1], "solver", value="heun"), "is no fitted schedule"),
        (_set("entries", 0, "fitted", "rms", value=9), "not better"),
        (lambda values: values["entries"].append(values["entries"][0]), "stands there twice"),
    ],
)
def test_damage_is_told_in_one_line(
    tmp_path: Path, change: Callable[[Any], None], told: str
) -> None:
    path = tmp_path / "steps.json"
    known(entry()).write(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ArtefactError, match=told) as caught:
        read_tuned_steps(path)
    assert str(path) in str(caught.value)
    assert "run `lutdeploy tune-steps` again" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"format": 2', "\x00"])
def test_no_such_file_at_all(tmp_path: Path, text: str) -> None:
    path = tmp_path / "steps.json"
    path.write_text(text)
    with pytest.raises(
        ArtefactError, match=r"steps\.json is damaged.*; run `lutdeploy tune-steps`"
    ):
        read_tuned_steps(path)


def test_schedules_of_other_weights_are_refused(exported_run: Callable[..., Run]) -> None:
    run = exported_run("step", precision="fp32")
    model = files.sha256(run.model)
    assert fitted_schedules(run.path, model) == []
    known(entry(), model=model).write(run.tuned_steps)
    for path in (run.path, run.model, run.export_folder("step-fp32")):
        assert fitted_schedules(path, model) == (schedule(3),)
        with pytest.raises(ArtefactError, match=r"another model\.safetensors .*tune-steps` again"):
            fitted_schedules(path, "other")


def test_an_export_alone_brings_its_own(exported_run: Callable[..., Run]) -> None:
    """What it brings of an earlier version, a solver over searched times, is left alone."""
    run = exported_run("step", precision="fp32")
    folder = run.export_folder("step-fp32")
    manifest = read_manifest(folder)
    assert "tuned" not in files.read_json(folder / MANIFEST)
    old = Schedule("dpmpp-2m", 1.0, schedule(3).rows, "tuned")
    written = msgspec.structs.replace(manifest, tuned=(old, schedule(4)))
    written.write()
    assert read_manifest(folder) == written
    assert written.weights_sha256 == manifest.weights_sha256
    run.model.unlink()
    assert fitted_schedules(folder, manifest.source_sha256) == [schedule(4)]


def test_a_model_file_has_its_schedules_beside_it() -> None:
    assert tuned_steps_file(Path("a/model.safetensors")) == Path("a/steps.json")
    assert tuned_steps_file(Path("a/cats.safetensors")) == Path("a/cats.steps.json")
