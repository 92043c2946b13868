"""`lutdeploy tune-steps`, and `--time-grid tuned` of the commands that use what it finds."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lutdeploy
from lutdeploy import images
from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.checkpoint import load_model, save_model
from lutdeploy.artefacts.manifest import MANIFEST, read_manifest
from lutdeploy.artefacts.run import Run, tuned_steps_file
from lutdeploy.artefacts.target import find_run
from lutdeploy.artefacts.tuned_steps import Entry, Noise, TunedSteps, read_tuned_steps
from lutdeploy.artefacts.verdicts import read_verdicts
from lutdeploy.reference import TorchDenoiser
from lutdeploy.schedule import solver_schedule, tuned_schedule
from lutdeploy.training.few_steps import search, tune
from lutdeploy.training.few_steps.comparison import METRICS, Row, measure, plot
from lutdeploy.training.few_steps.search import Problem
from tests.command import fail, invoke, succeed
from tests.training.few_steps.test_search import SHAPE, Gaussian

QUICK = ("--images", 1, "--held-out", 1, "--table", "3", "--backend", "torch")
PRESET = "static-tanh-64"


@pytest.fixture(scope="module")
def tuned(golden_runs: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an export, tuned for three and four steps."""
    run = Run(tmp_path_factory.mktemp("tuned") / "run")
    run.path.mkdir()
    shutil.copy(golden_runs(PRESET).model, run.model)
    succeed("export", run.path)
    solvers = ("--solver", "euler", "--solver", "dpmpp-2m")
    result = succeed("tune-steps", run.path, "--steps", "3,4", *solvers, *QUICK)
    assert result.stdout.strip() == str(run.tuned_steps)
    return run.path


@pytest.fixture
def run(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of the test's own; what is tuned there has a quicker reference."""
    monkeypatch.setattr(
        "lutdeploy.training.few_steps.search.REFERENCE", solver_schedule("euler", 16)
    )
    shutil.copytree(tuned, tmp_path / "run")
    return Run(tmp_path / "run")


def test_what_is_stored_is_better_on_the_held_out_noise(tuned: Path) -> None:
    run = Run(tuned)
    known = read_tuned_steps(run.tuned_steps)
    assert known.model_sha256 == files.sha256(run.model)
    assert known.entries
    model = TorchDenoiser(load_model(run.model))
    for entry in known.entries:
        assert (entry.tuned_on, entry.held_out) == (Noise(0, 1), Noise(1, 1))
        found, uniform, reference = (
            lutdeploy.sample(model, 1, seed=1, schedule=schedule)
            for schedule in (
                entry.schedule,
                solver_schedule(entry.schedule.solver, entry.schedule.steps),
                solver_schedule("euler", 256),
            )
        )
        error = np.sqrt(np.square(found - reference).mean())
        assert error == pytest.approx(entry.rms, rel=1e-3)
        assert error < np.sqrt(np.square(uniform - reference).mean())


def test_the_table_is_stored_and_drawn(tuned: Path) -> None:
    run = Run(tuned)
    known = read_tuned_steps(run.tuned_steps)
    assert known.comparison is not None
    assert known.comparison["reference"] == "euler-256"
    rows = known.comparison["rows"]
    assert all(set(row["metrics"]) == {"rms", "psnr"} for row in rows)
    there = {(row["steps"], row["solver"], row["grid"].split()[0]) for row in rows}
    assert {(3, s, "uniform") for s in ("euler", "dpmpp-2m", "dpmpp-3m")} <= there
    assert {(t.steps, t.solver, "tuned") for t in known.schedules if t.steps == 3} <= there
    assert (64, "euler", "uniform") in there, "the yardstick is always there"
    assert images.decode_png(run.steps_plot.read_bytes()).shape[2] in (3, 4)


def test_exports_made_afterwards_carry_the_schedules(run: Run, tmp_path: Path) -> None:
    schedules = read_tuned_steps(run.tuned_steps).schedules
    before = (run.export_folder("step-fp32") / MANIFEST).read_bytes()
    succeed("tune-steps", run.path, "--steps", "2", "--solver", "euler", *QUICK)
    manifest = run.export_folder("step-fp32") / MANIFEST
    assert manifest.read_bytes() == before, "a finished export is never edited"
    schedules = read_tuned_steps(run.tuned_steps).schedules
    schedule = schedules[0]
    succeed(
        "export", run.path, "--graph", "loop", "--steps", schedule.steps, "--time-grid", "tuned"
    )
    loop = read_manifest(run.export_folder(f"loop-fp32-{schedule.describe()}"))
    assert loop.schedule == schedule
    assert loop.tuned == schedules
    alone = tmp_path / "alone"
    succeed("export", run.path, "--fp16")
    shutil.copytree(run.export_folder("step-fp16"), alone)
    sampled = ("--steps", schedule.steps, "--time-grid", "tuned", "-n", 1)
    for name, source in (("a", run.path), ("b", alone), ("c", loop.folder)):
        succeed("sample", source, "--out", tmp_path / name, *sampled)
    one, *others = (
        images.decode_png((tmp_path / name / "000000.png").read_bytes()) for name in "abc"
    )
    for other in others:
        assert np.abs(one.astype(int) - other).max() <= 1


def test_a_model_file_finds_its_grids_too(run: Run, tmp_path: Path) -> None:
    schedule = read_tuned_steps(run.tuned_steps).schedules[0]
    options = (
        "--steps",
        schedule.steps,
        "--solver",
        schedule.solver,
        "--time-grid",
        "tuned",
        "-n",
        2,
    )
    succeed("sample", run.model, "--out", tmp_path / "s", *options)
    expected = lutdeploy.sample(lutdeploy.load(run.model), 2, schedule=schedule)
    for index in range(2):
        picture = images.decode_png((tmp_path / "s" / f"{index:06d}.png").read_bytes())
        assert np.abs(picture.astype(int) - images.to_uint8(expected[index])).max() <= 1
    lines = (tmp_path / "s" / "manifest.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["grid"] == "tuned"
    again = invoke("sample", run.model, "--out", tmp_path / "s", *options[:4], "-n", 2)
    assert again.exit_code == 2
    assert "'tuned' → None" in again.stderr


def test_parity_of_a_tuned_grid(run: Run) -> None:
    schedule = read_tuned_steps(run.tuned_steps).schedules[0]
    succeed("parity", run.path, "--steps", schedule.steps, "--time-grid", "tuned", "-n", 1)
    (verdict,) = [verdict for verdict in read_verdicts(run) if verdict.check == "parity"]
    assert verdict.solver == schedule.describe()


def test_inspect_lists_them(run: Run) -> None:
    name = read_tuned_steps(run.tuned_steps).schedules[0].describe()
    assert f"tuned steps: {name}" in succeed("inspect", run.path).stdout
    known = read_tuned_steps(run.tuned_steps)
    TunedSteps("other", known.entries, None).write(run.tuned_steps)
    assert "STALE: the model has changed since" in succeed("inspect", run.path).stdout


def test_grids_that_are_not_there(run: Run, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "s", "--time-grid", "tuned")
    line = fail(2, "sample", run.path, *out, "--steps", 9)
    assert "no tuned grid of 9 steps; there are some of " in line
    assert "`lutdeploy tune-steps --steps 9` searches one" in line
    line = fail(2, "sample", run.path, *out, "--steps", 3, "--shift", 2)
    assert "--shift warps a uniform grid" in line
    line = fail(2, "export", run.path, "--time-grid", "tuned")
    assert "belong to --graph per-step and loop" in line
    run.tuned_steps.unlink()
    assert "this model has none" in fail(2, "export", run.path, "--graph", "loop", *out[2:])


def test_a_model_that_was_trained_on_makes_them_stale(run: Run, tmp_path: Path) -> None:
    known = read_tuned_steps(run.tuned_steps)
    model = load_model(run.model)
    model.head.bias.data += 0.01
    save_model(model, run.model)
    options = ("--backend", "torch", "--steps", 3, "--time-grid", "tuned", "--out", tmp_path / "s")
    line = fail(1, "sample", run.path, *options)
    assert "steps.json was tuned for another model.safetensors" in line
    assert "run `lutdeploy tune-steps` again" in line
    result = succeed("export", run.path)
    assert "was tuned for other weights: left out of the export" in result.stderr
    assert read_manifest(run.export_folder("step-fp32")).tuned == ()
    result = succeed("tune-steps", run.path, "--steps", "2", "--solver", "euler", *QUICK)
    assert "was tuned for other weights; it will be replaced" in result.stderr
    found = read_tuned_steps(run.tuned_steps)
    assert found.model_sha256 != known.model_sha256
    assert not {e.schedule for e in found.entries} & {e.schedule for e in known.entries}


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
    assert (solver, steps) == (best.solver, best.steps)
    assert f"schedule: {best.describe()}, the best that tune-steps found" in said
    assert made("--solver", "euler")[:2] == ("euler", 64)
    assert made("--steps", 2)[:2] == ("euler", 2)
    TunedSteps("other", (), None).write(run.tuned_steps)
    solver, steps, said = made()
    assert (solver, steps) == ("euler", 64)
    assert "warning: " in said and "was tuned for another model" in said


def test_tuning_again_adds(run: Run) -> None:
    before = {e.schedule.steps for e in read_tuned_steps(run.tuned_steps).entries}
    assert 5 not in before
    succeed("tune-steps", run.path, "--steps", "5", "--solver", "euler", *QUICK)
    after = {e.schedule.steps for e in read_tuned_steps(run.tuned_steps).entries}
    assert after == before | {5}


def test_what_another_process_found_meanwhile_is_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = files.sha256(run.model)
    schedule = tuned_schedule("dpmpp-3m", [0, 0.1, 0.2, 0.3, 0.5, 0.7, 1])
    theirs = Entry(schedule, Noise(0, 1), Noise(1, 1), "euler-256", 0.1, 0.2, 0.3, 2.0)

    def meanwhile(*arguments: object, **more: object) -> object:
        TunedSteps(model, (theirs,), None).write(run.tuned_steps)
        return search.tune(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(tune, "tune", meanwhile)
    succeed("tune-steps", run.path, "--steps", "5", "--solver", "euler", *QUICK)
    found = read_tuned_steps(run.tuned_steps)
    assert theirs in found.entries
    assert {entry.schedule.steps for entry in found.entries} == {5, 6}


def test_one_step_leaves_nothing_to_tune(run: Run) -> None:
    before = read_tuned_steps(run.tuned_steps).entries
    result = succeed("tune-steps", run.path, "--steps", "1", "--solver", "euler", *QUICK)
    assert "euler, 1 steps: RMS" in result.stderr
    assert "not better, not stored" in result.stderr
    assert read_tuned_steps(run.tuned_steps).entries == before


@pytest.mark.parametrize("moment", ["tune", "measure"])
def test_an_interruption_keeps_a_whole_file(
    run: Run, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run.tuned_steps.read_bytes()

    def press(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    where = {
        "tune": "lutdeploy.training.few_steps.tune.tune",
        "measure": "lutdeploy.training.few_steps.tune.measure",
    }
    monkeypatch.setattr(where[moment], press)
    result = invoke("tune-steps", run.path, "--steps", "2", "--solver", "euler", *QUICK)
    assert result.exit_code == 130
    if moment == "tune":
        assert run.tuned_steps.read_bytes() == before
    known = read_tuned_steps(run.tuned_steps)  # what was found before the schedule is kept
    assert {3, 4} <= {entry.schedule.steps for entry in known.entries}
    assert [p.name for p in run.path.glob(".*")] == []


def test_damage_stops_it_before_the_work(run: Run) -> None:
    run.tuned_steps.write_text('{"format": 1}')
    line = fail(1, "tune-steps", run.path, "--steps", "2", *QUICK)
    assert "steps.json is damaged" in line
    assert "delete it and run" in line
    assert "steps.json is damaged" in fail(1, "export", run.path)


def test_a_model_that_changes_meanwhile(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run.tuned_steps.read_bytes()

    def train_on(*arguments: object, **more: object) -> object:
        run.model.write_bytes(run.model.read_bytes() + b" ")
        return search.tune(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(tune, "tune", train_on)
    line = fail(1, "tune-steps", run.path, "--steps", "2", "--solver", "euler", *QUICK)
    assert "changed while it was tuned for; run again" in line
    assert run.tuned_steps.read_bytes() == before


def test_an_export_with_steps_of_its_own_cannot_be_tuned(run: Run) -> None:
    succeed("export", run.path, "--graph", "loop", "--steps", 2)
    options = ("--steps", "2", "--export", "loop-fp32-euler-2")
    line = fail(2, "tune-steps", run.path, *options)
    assert "holds euler-2 alone; name a step export" in line


def test_auto_takes_what_is_precise(run: Run) -> None:
    succeed("export", run.path, "--graph", "loop", "--steps", 2)  # newer, and of no use here
    quick = ("--steps", "2", "--solver", "euler", *QUICK[:-2])
    found = succeed("tune-steps", run.path, *quick)
    assert "backend: onnxruntime on CPUExecutionProvider, export step-fp32" in found.stderr
    shutil.rmtree(run.export_folder("step-fp32"))
    assert "backend: torch on cpu" in succeed("tune-steps", run.path, *quick).stderr


@pytest.mark.parametrize("steps", ["", "8,", "0", "8;10", "-3", "3,2000", "many"])
def test_steps_that_are_no_list(run: Run, steps: str) -> None:
    line = fail(2, "tune-steps", run.path, f"--steps={steps}")
    assert "is no list of steps from 1 to 1000 such as 8,10,16" in line


def test_seeds_and_runs_that_do_not_do(tmp_path: Path, run: Run) -> None:
    assert "--seed must leave a next one" in fail(
        2, "tune-steps", run.path, "--steps", 2, "--seed", 2**64 - 1
    )
    assert "no such run" in fail(2, "tune-steps", tmp_path / "none", "--steps", 2)


def test_without_matplotlib_there_is_no_plot_and_no_failure(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.steps_plot.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = succeed("tune-steps", run.path, "--steps", "2", "--solver", "euler", *QUICK)
    assert "no plot: matplotlib is not installed here" in result.stderr
    assert "pip install 'lutdeploy[bench]'" in result.stderr
    assert not run.steps_plot.exists()


def test_the_embedded_model_brings_its_grids(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go with it into the run that is made for it."""
    model = tmp_path / f"{shipped.DEFAULT}.safetensors"
    shutil.copy(run.model, model)
    shutil.copy(run.tuned_steps, tuned_steps_file(model))
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.chdir(tmp_path)
    succeed("tune-steps", "--steps", "2", "--solver", "euler", *QUICK)
    made = Run(tmp_path / "runs" / shipped.DEFAULT)
    known = read_tuned_steps(made.tuned_steps)
    assert {2, 3, 4} <= {entry.schedule.steps for entry in known.entries}
    find_run(model, print)
    assert read_tuned_steps(made.tuned_steps) == known, "found grids stay"
    made.model.write_bytes(b"of the release before")
    find_run(model, print)
    known = read_tuned_steps(made.tuned_steps)
    assert {entry.schedule.steps for entry in known.entries} == {3, 4}, "grids of other weights go"


def test_shipped_grids_belong_to_the_shipped_models() -> None:
    """The default has some; those of any model are of its very weights."""
    tuned = [name for name in shipped.names() if grids_of(name).is_file()]
    assert shipped.DEFAULT in tuned
    for name in tuned:
        known = read_tuned_steps(grids_of(name))
        assert known.model_sha256 == files.sha256(shipped.model_path(name))
        assert {10, 16} <= {entry.schedule.steps for entry in known.entries}


def grids_of(name: str) -> Path:
    return tuned_steps_file(shipped.model_path(name))


def test_a_metric_more_is_a_column_more() -> None:
    given = Problem(Gaussian(), lutdeploy.sampling.batch_noise(0, range(2), SHAPE))
    metrics = {**METRICS, "mean": lambda images, reference: float(images.mean())}
    schedules = [
        solver_schedule("euler", 4),
        tuned_schedule("euler", [0, 0.2, 1]),
        solver_schedule("euler", 4, 0.5),
    ]
    rows = list(measure(given, schedules, metrics))
    assert [row.grid for row in rows] == ["uniform", "tuned", "shift 0.5"]
    for row in rows:
        assert row.metrics["rms"] == pytest.approx(given.rms(row.schedule))
        assert row.metrics["mean"] == pytest.approx(given.end(row.schedule).mean())
        assert set(row.to_dict()["metrics"]) == {"rms", "psnr", "mean"}
    given.noise[0, 0, 0, 0] = np.nan
    (row,) = measure(given, schedules[:1])
    assert row.to_dict()["metrics"] == {"rms": "nan", "psnr": "nan"}
    assert plot([*rows, row], "euler-256").startswith(b"\x89PNG")


def test_entries_are_of_a_solver_and_steps() -> None:
    schedule = tuned_schedule("euler", [0, 0.3, 1])
    entry = Entry(schedule, Noise(0, 1), Noise(1, 1), "euler-256", 0.1, 0.2, 0.3, 2.0)
    assert TunedSteps("x", (entry,), None).schedules == (schedule,)
    assert Row(schedule, {}).to_dict() == {
        "steps": 2, "solver": "euler", "grid": "tuned", "metrics": {}
    }  # fmt: skip


def test_real_images_add_distances_to_the_table(run: Run) -> None:
    options = ("--solver", "euler", "--steps", 2, "--table", 2, "--images", 1, "--held-out", 1)
    budget = ("--evaluations", 10, "--data", "synthetic")
    succeed("tune-steps", run.path, *options, *budget, "--pictures", 16)
    comparison = read_tuned_steps(run.tuned_steps).comparison
    assert comparison is not None
    assert (comparison["pictures"], comparison["data"]) == (16, "synthetic")
    for row in comparison["rows"]:
        assert set(row["metrics"]) == {"rms", "psnr", "Fréchet", "kernel", "sliced"}
        assert row["metrics"]["Fréchet"] > 0
    line = fail(2, "tune-steps", run.path, *options, *budget, "--pictures", 10**6)
    assert "--pictures 1000000 needs as many" in line
