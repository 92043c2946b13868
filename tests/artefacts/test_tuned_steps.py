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
    Noise,
    TunedSteps,
    read_tuned_steps,
    tuned_schedules,
)
from lutdeploy.errors import ArtefactError, ConfigError
from lutdeploy.schedule import solver_schedule, tuned_schedule


def entry(
    solver: str = "dpmpp-2m", inner: tuple[float, ...] = (0.1, 0.3), rms: float = 0.1
) -> Entry:
    schedule = tuned_schedule(solver, [0, *inner, 1])
    return Entry(schedule, Noise(0, 8), Noise(1, 16), "euler-256", rms, 0.5, 0.4, 1.5)


def test_round_trip(tmp_path: Path) -> None:
    known = TunedSteps("abc", (entry(), entry("dpmpp-3m", (0.1, 0.2, 0.3, 0.6))), {"rows": []})
    known.write(tmp_path / "steps.json")
    assert read_tuned_steps(tmp_path / "steps.json") == known


def test_tables_come_by_steps_and_better_ones_first() -> None:
    entries = (entry("euler", rms=0.3), entry("dpmpp-2m", rms=0.1), entry("euler", (0.5,), 0.35))
    names = [schedule.describe() for schedule in TunedSteps("abc", entries, None).schedules]
    assert names == ["euler-2-tuned", "dpmpp-2m-3-tuned", "euler-3-tuned"]


def test_an_entry_takes_the_place_of_its_like() -> None:
    known = TunedSteps("abc", (entry(rms=0.2), entry("euler")), None).updated([entry(rms=0.1)])
    assert [(e.schedule.solver, e.rms) for e in known.entries] == [
        ("euler", 0.1),
        ("dpmpp-2m", 0.1),
    ]
    assert [e.schedule.solver for e in known.without("euler", 3).entries] == ["dpmpp-2m"]
    assert known.without("euler", 4) == known


@pytest.mark.parametrize("rms", [0.4, 0.45, 0.5, float("nan"), float("inf")])
def test_what_is_not_better_is_no_entry(rms: float) -> None:
    with pytest.raises(ConfigError, match="not better than an untuned grid"):
        entry(rms=rms)


def test_only_tuned_tables_are_entries() -> None:
    with pytest.raises(ConfigError, match="euler-3 is no tuned table"):
        msgspec.structs.replace(entry(), schedule=solver_schedule("euler", 3))


def _set(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(values: Any) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_set("format", value=2), "has format 2, this version reads 1"),
        (lambda values: values.pop("entries"), "required field `entries`"),
        (lambda values: values.pop("model_sha256"), "required field `model_sha256`"),
        (
            _set("comparison", value=[]),
            r"Expected `object \| null`, got `array` - at `\$.comparison`",
        ),
        (_set("entries", 0, "table", "rows", 1, 2, value=0.4), r"t = 0.1 is no step of dpmpp-2m"),
        (_set("entries", 0, "table", "rows", 1, 0, value=0.5), "rise from 0 to 1"),
        (_set("entries", 0, "table", "rows", 0, 0, value=0.01), "rise from 0 to 1"),
        (_set("entries", 0, "table", "solver", value="heun"), "no solver 'heun'"),
        (_set("entries", 0, "table", "grid", value="uniform"), "is no tuned table"),
        (_set("entries", 0, "rms", value="much"), "Expected `float`, got `str`"),
        (_set("entries", 0, "rms", value=9), "not better"),
        (_set("entries", 0, "tuned_on", value=3), "Expected `object`, got `int`"),
        (lambda values: values["entries"].append(values["entries"][0]), "stands there twice"),
    ],
)
def test_damage_is_told_in_one_line(
    tmp_path: Path, change: Callable[[Any], None], told: str
) -> None:
    path = tmp_path / "steps.json"
    TunedSteps("abc", (entry(),), None).write(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ArtefactError, match=told) as caught:
        read_tuned_steps(path)
    assert str(path) in str(caught.value)
    assert "delete it" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"format": 1', "\x00"])
def test_no_such_file_at_all(tmp_path: Path, text: str) -> None:
    path = tmp_path / "steps.json"
    path.write_text(text)
    with pytest.raises(ArtefactError, match=r"steps\.json is (damaged|unreadable).*; delete it"):
        read_tuned_steps(path)


def test_grids_of_other_weights_are_refused(
    exported: Callable[..., Path], exported_run: Callable[..., Run]
) -> None:
    run = exported_run("step", precision="fp32")
    model = files.sha256(run.model)
    assert tuned_schedules(run.path, model) == ()
    TunedSteps(model, (entry(),), None).write(run.tuned_steps)
    for path in (run.path, run.model, run.export_folder("step-fp32")):
        assert tuned_schedules(path, model) == (entry().schedule,)
        with pytest.raises(ArtefactError, match=r"another model\.safetensors .*tune-steps` again"):
            tuned_schedules(path, "other")


def test_an_export_alone_brings_its_own(exported_run: Callable[..., Run]) -> None:
    run = exported_run("step", precision="fp32")
    folder = run.export_folder("step-fp32")
    manifest = read_manifest(folder)
    assert "tuned" not in files.read_json(folder / MANIFEST)
    written = msgspec.structs.replace(manifest, tuned=(entry().schedule,))
    written.write()
    assert read_manifest(folder) == written
    assert written.weights_sha256 == manifest.weights_sha256
    run.model.unlink()
    assert tuned_schedules(folder, manifest.source_sha256) == (entry().schedule,)


def test_a_model_file_has_its_grids_beside_it() -> None:
    assert tuned_steps_file(Path("a/model.safetensors")) == Path("a/steps.json")
    assert tuned_steps_file(Path("a/cats.safetensors")) == Path("a/cats.steps.json")
