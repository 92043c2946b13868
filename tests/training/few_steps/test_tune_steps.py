"""`lutdeploy tune-steps`, and the commands that use what it fits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

import lutdeploy
from lutdeploy import images
from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.checkpoint import load_model, save_model
from lutdeploy.artefacts.manifest import MANIFEST, read_manifest
from lutdeploy.artefacts.run import Run, tuned_steps_file
from lutdeploy.artefacts.target import find_run
from lutdeploy.artefacts.tuned_steps import read_tuned_steps
from lutdeploy.artefacts.verdicts import read_verdicts
from lutdeploy.reference import TorchDenoiser
from lutdeploy.schedule import FITTED, solver_schedule
from lutdeploy.training.data import draw_set
from lutdeploy.training.few_steps import fit, tune
from tests.command import fail, invoke, succeed

QUICK = ("--images", 1, "--backend", "torch")
PRESET = "static-tanh-64"


@pytest.fixture(scope="module")
def tuned(golden_runs: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an export, tuned for three and four steps."""
    run = Run(tmp_path_factory.mktemp("tuned") / "run")
    run.path.mkdir()
    shutil.copy(golden_runs(PRESET).model, run.model)
    succeed("export", run.path)
    result = succeed("tune-steps", run.path, "--steps", "4,3", *QUICK)
    assert result.stdout.strip() == str(run.tuned_steps)
    for name in ("fitted-3", "fitted-4", "euler-64"):
        assert name in result.stderr
    return run.path


@pytest.fixture
def run(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of the test's own; what is tuned there has a quicker reference."""
    for module in (fit, tune):
        monkeypatch.setattr(module, "REFERENCE", solver_schedule("euler", 16))
    shutil.copytree(tuned, tmp_path / "run")
    return Run(tmp_path / "run")


def test_what_is_stored_is_better_on_the_unseen_noise(tuned: Path) -> None:
    run = Run(tuned)
    known = read_tuned_steps(run.tuned_steps)
    assert known.model_sha256 == files.sha256(run.model)
    assert (known.seed, known.fitted_on, known.pictures) == (1, 1, 0)
    assert [entry.fitted.schedule.steps for entry in known.entries] == [3, 4]
    model = TorchDenoiser(load_model(run.model))
    expected = lutdeploy.sample(model, 1, seed=2, schedule=solver_schedule("euler", 256))
    for entry in known.entries:
        for measured in (entry.fitted, entry.formula):
            found = lutdeploy.sample(model, 1, seed=2, schedule=measured.schedule)
            error = np.sqrt(np.square(found - expected).mean())
            assert error == pytest.approx(measured.rms, rel=1e-3)


def test_exports_made_afterwards_carry_the_schedules(run: Run, tmp_path: Path) -> None:
    manifest = run.export_folder("step-fp32") / MANIFEST
    before = manifest.read_bytes()
    succeed("tune-steps", run.path, "--steps", "3", *QUICK)
    assert manifest.read_bytes() == before, "a finished export is never edited"
    (schedule,) = read_tuned_steps(run.tuned_steps).schedules
    fitted = ("--solver", FITTED, "--steps", 3)
    for graph in ("loop", "per-step"):
        succeed("export", run.path, "--graph", graph, *fitted)
        export = read_manifest(run.export_folder(f"{graph}-fp32-fitted-3"))
        assert export.schedule == schedule
        assert export.tuned == (schedule,)
    alone = tmp_path / "alone"
    succeed("export", run.path, "--fp16")
    shutil.copytree(run.export_folder("step-fp16"), alone)
    exports = [run.export_folder(f"{graph}-fp32-fitted-3") for graph in ("loop", "per-step")]
    pictures = []
    for k, source in enumerate((run.export_folder("step-fp32"), *exports, alone)):
        out = tmp_path / str(k)
        succeed("sample", source, "--out", out, "-n", 1, *(fitted if k == 1 else ()))
        assert json.loads((out / "manifest.jsonl").read_text())["solver"] == FITTED
        pictures.append(images.decode_png((out / "000000.png").read_bytes()).astype(int))
    for other in pictures[1:]:
        assert np.abs(pictures[0] - other).max() <= 1


def test_a_model_file_finds_them_too_and_folders_tell_them_apart(run: Run, tmp_path: Path) -> None:
    schedule = next(s for s in read_tuned_steps(run.tuned_steps).schedules if s.steps == 3)
    options = ("--solver", FITTED, "--steps", 3, "-n", 2, "--out", tmp_path / "s")
    succeed("sample", run.model, *options)
    expected = lutdeploy.sample(lutdeploy.load(run.model), 2, schedule=schedule)
    for index in range(2):
        picture = images.decode_png((tmp_path / "s" / f"{index:06d}.png").read_bytes())
        assert np.abs(picture.astype(int) - images.to_uint8(expected[index])).max() <= 1
    again = invoke("sample", run.model, *options[2:], "--solver", "euler")
    assert again.exit_code == 2
    assert "'fitted' → 'euler'" in again.stderr
    known = read_tuned_steps(run.tuned_steps)
    entry = next(entry for entry in known.entries if entry.fitted.schedule == schedule)
    first, *others = schedule.rows
    rows = (msgspec.structs.replace(first, b=first.b + 0.01), *others)
    other = msgspec.structs.replace(schedule, rows=rows)
    measured = msgspec.structs.replace(entry.fitted, schedule=other)
    entries = (msgspec.structs.replace(entry, fitted=measured),)
    msgspec.structs.replace(known, entries=entries).write(run.tuned_steps)
    again = invoke("sample", run.model, *options)
    assert again.exit_code == 2
    assert "times_sha256" in again.stderr


def test_parity_and_bench_of_a_fitted_schedule(run: Run) -> None:
    fitted = ("--solver", FITTED, "--steps", 3)
    succeed("parity", run.path, *fitted, "-n", 1)
    (verdict,) = [verdict for verdict in read_verdicts(run) if verdict.check == "parity"]
    assert verdict.solver == "fitted-3"
    quick = ("--quick", "--only", "onnxruntime-fp32", "--batch", 1, "--threads", 1)
    succeed("bench", run.path, *fitted, *quick, "--end-to-end", 0)
    assert json.loads(run.bench.read_text())["settings"]["table"] == "fitted-3"
    assert "this model has none" in fail(2, "bench", "--size", "tiny", "--solver", FITTED)


def test_inspect_lists_them(run: Run) -> None:
    known = read_tuned_steps(run.tuned_steps)
    names = ", ".join(schedule.describe() for schedule in known.schedules)
    assert f"fitted schedules: {names}" in succeed("inspect", run.path).stdout
    msgspec.structs.replace(known, model_sha256="other").write(run.tuned_steps)
    assert "was fitted to another model.safetensors" in succeed("inspect", run.path).stdout


def test_schedules_that_are_not_there(run: Run, tmp_path: Path) -> None:
    line = fail(2, "sample", run.path, "--solver", FITTED, "--steps", 9, "--out", tmp_path / "s")
    assert "no fitted schedule of 9 steps; there are some of 3, 4 steps" in line
    assert "`lutdeploy tune-steps --steps 9` fits one" in line
    line = fail(2, "export", run.path, "--solver", FITTED)
    assert "belong to --graph per-step and loop" in line
    run.tuned_steps.unlink()
    line = fail(2, "export", run.path, "--graph", "loop", "--solver", FITTED)
    assert "this model has none" in line


def test_a_model_that_was_trained_on_makes_them_stale(run: Run, tmp_path: Path) -> None:
    model = load_model(run.model)
    model.head.bias.data += 0.01
    save_model(model, run.model)
    options = ("--backend", "torch", "-n", 1, "--no-grid", "--out", tmp_path / "s")
    line = fail(1, "sample", run.path, "--solver", FITTED, *options)
    assert "steps.json was fitted to another model.safetensors" in line
    assert "run `lutdeploy tune-steps` again" in line
    result = succeed("sample", run.path, "--steps", 1, *options)
    result = succeed("export", run.path)
    assert "; left out" in result.stderr
    assert read_manifest(run.export_folder("step-fp32")).tuned == ()
    succeed("tune-steps", run.path, "--steps", "3", *QUICK)
    assert read_tuned_steps(run.tuned_steps).model_sha256 == files.sha256(run.model)


def test_sample_follows_the_best_unless_told(run: Run, tmp_path: Path) -> None:
    best = read_tuned_steps(run.tuned_steps).best
    assert best is not None

    def made(*options: object) -> tuple[str, int, str]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        options = (*options, "--backend", "torch", "-n", 1, "--no-grid", "--out", out)
        said = succeed("sample", run.path, *options).stderr
        line = json.loads((out / "manifest.jsonl").read_text())
        return line["solver"], line["steps"], said

    solver, steps, said = made()
    assert (solver, steps) == (FITTED, best.steps)
    assert f"schedule: {best.describe()}, the best that tune-steps fitted" in said
    assert made("--solver", "euler")[:2] == ("euler", 64)
    assert made("--steps", 2)[:2] == ("euler", 2)
    run.tuned_steps.write_text('{"format": 1, "entries": []}')  # of an earlier version
    solver, steps, said = made()
    assert (solver, steps) == ("euler", 64)
    assert "warning: " in said and "has format 1, this version reads 2; run `lutdeploy tune" in said


def test_what_is_not_better_is_told_and_not_stored(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (good,) = [s for s in read_tuned_steps(run.tuned_steps).schedules if s.steps == 3]
    rows = tuple(msgspec.structs.replace(row, b=3.0) for row in good.rows)
    worse = msgspec.structs.replace(good, rows=rows)
    monkeypatch.setattr(tune, "fit", lambda problem, steps: worse)
    result = succeed("tune-steps", run.path, "--steps", "3", *QUICK)
    assert "3 steps, not stored: fitted-3 is not better than " in result.stderr
    assert read_tuned_steps(run.tuned_steps).entries == ()


@pytest.mark.parametrize("before", ["", '{"format": 1, "entries": []}'])
def test_a_file_of_no_use_is_replaced(run: Run, before: str) -> None:
    run.tuned_steps.write_text(before)
    succeed("tune-steps", run.path, "--steps", "3", *QUICK)
    assert [s.steps for s in read_tuned_steps(run.tuned_steps).schedules] == [3]


def test_an_interruption_keeps_what_was_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run.tuned_steps.read_bytes()

    def press(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "fit", press)
    assert invoke("tune-steps", run.path, "--steps", "3", *QUICK).exit_code == 130
    assert run.tuned_steps.read_bytes() == before
    assert [p.name for p in run.path.glob(".*")] == []


def test_a_model_that_changes_meanwhile(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run.tuned_steps.read_bytes()

    def train_on(problem: fit.Problem, steps: int) -> lutdeploy.schedule.Schedule:
        run.model.write_bytes(run.model.read_bytes() + b" ")
        return fit.fit(problem, steps)

    monkeypatch.setattr(tune, "fit", train_on)
    line = fail(1, "tune-steps", run.path, "--steps", "3", *QUICK)
    assert "changed while it was tuned for; run again" in line
    assert run.tuned_steps.read_bytes() == before


def test_an_export_with_steps_of_its_own_cannot_be_tuned(run: Run) -> None:
    succeed("export", run.path, "--graph", "loop", "--steps", 2)
    line = fail(2, "tune-steps", run.path, "--steps", "3", "--export", "loop-fp32-euler-2")
    assert "holds euler-2 alone; name a step export" in line


def test_auto_takes_what_is_precise(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    succeed("export", run.path, "--graph", "loop", "--steps", 2)  # newer, and of no use here
    quick = ("--steps", "3", "--images", 1)
    found = succeed("tune-steps", run.path, *quick).stderr
    assert "backend: openvino on CPU fp32, export step-fp32" in found
    monkeypatch.setattr("lutdeploy.cli.tune_steps.find_spec", lambda name: None)
    found = succeed("tune-steps", run.path, *quick).stderr
    assert "backend: onnxruntime on CPUExecutionProvider, export step-fp32" in found
    shutil.rmtree(run.export_folder("step-fp32"))
    assert "backend: torch on cpu" in succeed("tune-steps", run.path, *quick).stderr


@pytest.mark.parametrize("steps", ["", "8,", "0", "8;10", "-3", "3,2000", "many"])
def test_steps_that_are_no_list(run: Run, steps: str) -> None:
    line = fail(2, "tune-steps", run.path, f"--steps={steps}")
    assert "is no list of steps from 1 to 1000 such as 8,10,16" in line


def test_seeds_and_runs_that_do_not_do(tmp_path: Path, run: Run) -> None:
    line = fail(2, "tune-steps", run.path, "--seed", 2**64 - 1)
    assert "Invalid value for '--seed'" in line
    assert "no such run" in fail(2, "tune-steps", tmp_path / "none", "--steps", 2)


def test_the_embedded_model_brings_its_schedules(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go with it into the run that is made for it."""
    model = tmp_path / shipped.DEFAULT / f"{shipped.DEFAULT}.safetensors"
    model.parent.mkdir()
    shutil.copy(run.model, model)
    shutil.copy(run.tuned_steps, tuned_steps_file(model))
    known = read_tuned_steps(run.tuned_steps)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.chdir(tmp_path)
    made = find_run(model, print)
    assert read_tuned_steps(made.tuned_steps) == known
    succeed("tune-steps", "--steps", "3", *QUICK)
    found = read_tuned_steps(made.tuned_steps)
    assert [s.steps for s in found.schedules] == [3]
    find_run(model, print)
    assert read_tuned_steps(made.tuned_steps) == found, "what was fitted since stays"
    made.model.write_bytes(b"of the release before")
    find_run(model, print)
    assert read_tuned_steps(made.tuned_steps) == known, "what is of other weights goes"


def test_shipped_schedules_belong_to_the_shipped_models() -> None:
    """Those that there are; the default has one of four steps."""
    found = {}
    for name in shipped.names():
        path = tuned_steps_file(shipped.model_path(name))
        if path.is_file():
            known = found[name] = read_tuned_steps(path)
            assert known.model_sha256 == files.sha256(shipped.model_path(name))
    assert 4 in {schedule.steps for schedule in found[shipped.DEFAULT].schedules}


def test_real_images_decide_where_they_are_given(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "faces"
    data.mkdir()
    for index, picture in enumerate(np.moveaxis(draw_set(64, count=20).images, 1, -1)):
        (data / f"{index}.png").write_bytes(images.encode_png(picture))
    (data / "notes.txt").write_text("no picture")
    options = ("--steps", 3, "--data", data, *QUICK)
    result = succeed("tune-steps", run.path, *options, "--pictures", 16)
    known = read_tuned_steps(run.tuned_steps)
    assert known.pictures == 16
    for entry in known.entries:
        assert entry.fitted.error == entry.fitted.frechet
        assert entry.fitted.sliced_wasserstein is not None
    assert "16 pictures" in result.stderr
    assert "1 file of other kinds left out (.txt 1)" in result.stderr
    line = fail(2, "tune-steps", run.path, *options, "--pictures", 10**6)
    assert "--pictures 1000000 needs as many" in line
