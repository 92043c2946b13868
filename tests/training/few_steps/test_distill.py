"""`lutdeploy distill`: targets, paths, what a student learns, and the commands that use it."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from lutdeploy.artefacts import files
from lutdeploy.artefacts.checkpoint import load_model, save_model
from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.metadata import read_metadata
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.tuned_steps import distilled_schedule
from lutdeploy.cli.distill import same_engine
from lutdeploy.config import model_config
from lutdeploy.engines import EngineRequest
from lutdeploy.engines.torch import TorchEngine
from lutdeploy.errors import ArtefactError, UsageError
from lutdeploy.model import LutTransformer
from lutdeploy.sampling import State, batch_noise, resume, trajectory
from lutdeploy.schedule import DISTILLED, Step, fitted_schedule, solver_schedule
from lutdeploy.training.data import batch_indices, draw_set
from lutdeploy.training.evaluation.data import Trained
from lutdeploy.training.few_steps import distill, fit
from lutdeploy.training.few_steps.distill import Distilling, Paths, student_schedule, target
from lutdeploy.training.few_steps.guidance import GuidedDenoiser
from lutdeploy.training.loop import Cadence, learn, train
from lutdeploy.training.processes import Processes
from lutdeploy.training.recipes import Guidance, TrainSettings, read_settings, train_settings
from tests.command import fail, invoke, succeed

CPU = torch.device("cpu")
STEPS, PATHS = 3, 96
SMALL = ("--paths", PATHS, "--batch", 12, "--train-steps", 50, "--device", "cpu")
QUICK = ("--optimizer", "muon", "--lr", 5e-3)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """A coarser reference, fewer images to fit on, fewer steps of the teacher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "REFERENCE", solver_schedule("euler", 32))
        patch.setattr(distill, "FIT_IMAGES", 2)
        patch.setattr(fit, "ITERATIONS", 2)
        patch.setattr(distill, "TEACHER_STEPS", 9)
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model that has learnt a little, of drawn images."""
    model = model_config("static-tanh-64", "tiny", width=16, heads=2, depth=1, image_size=16)
    settings = train_settings(
        model, data="synthetic", steps=40, batch=16, warmup=5, held_out=0.25, seed=7
    )
    run = Run(tmp_path_factory.mktemp("distill") / "teacher")
    for _ in train(settings, draw_set(16, count=64), run, cadence=Cadence(100, 100, 100, 100)):
        pass
    return run


@pytest.fixture(scope="module")
def student(teacher: Run) -> Run:
    """The teacher distilled by the command."""
    run = Run(teacher.path.parent / "student")
    options = ("--steps", STEPS, "--out", run.path, *SMALL, *QUICK)
    result = succeed("distill", teacher.path, *options)
    assert result.stdout.strip() == str(run.model)
    return run


@pytest.fixture
def settings(student: Run) -> TrainSettings:
    return read_settings(student)


class Requests(list[int]):
    """Signals that come when the question is asked for the nth time."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        super().__init__([signal.SIGINT])
        self._asked = asked

    def __bool__(self) -> bool:
        return self._asked()


def stopping(asked: Callable[[], bool]) -> Any:
    """In the place of session.stoppable: no signal, but answers."""

    @contextlib.contextmanager
    def stoppable(*_: object) -> Iterator[Requests]:
        yield Requests(asked)

    return stoppable


def stop(*arguments: object) -> str:
    """What a command that was stopped says last."""
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (130, ""), result.output
    return result.stderr.splitlines()[-1]


def rows_of(settings: TrainSettings) -> tuple[Any, ...]:
    assert settings.distilled is not None
    return settings.distilled.rows


def test_a_student_that_paints_its_targets_walks_its_teachers_path(
    teacher: Run, settings: TrainSettings
) -> None:
    """At every segment's end; and the teacher goes on from there as if it had come there itself."""
    engine, rows = TorchEngine(teacher.model), rows_of(settings)
    per = len(rows) // STEPS
    for k, row in enumerate(rows):
        assert (k % per > 0 or row.c == 0) and (k % per > 1 or row.d == 0)
    noise = batch_noise(3, range(4), engine.config.image_shape)
    states = list(trajectory(engine, noise, fitted_schedule(rows)))
    ends = [state.x for state in states[::per]]
    schedule = student_schedule(rows, STEPS)
    assert schedule.rows[-1].a == 0, "the last step is the prediction"
    z = noise
    for k, row in enumerate(schedule.rows):
        assert row.t == rows[k * per].t and row.b == 1 - row.a and row.c == row.d == 0
        x = target(row, ends[k], ends[k + 1])
        within = states[k * per + 1 : (k + 1) * per + 1]
        predicted: Any = np.stack([np.ravel(s.x0) for s in within if s.x0 is not None], 1)
        mixture = np.linalg.lstsq(predicted, x.ravel().astype(float), rcond=None)[0]
        np.testing.assert_allclose(predicted @ mixture, x.ravel(), atol=1e-3)
        z = np.float32(row.a) * z + np.float32(row.b) * x
        np.testing.assert_allclose(z, ends[k + 1], atol=1e-5)
        from_there = State(k * per, ends[k], None)
        *_, last = resume(engine, from_there, fitted_schedule(rows[: (k + 1) * per]), range(4))
        np.testing.assert_array_equal(last.x, ends[k + 1])


def test_paths_are_drawn_once_and_completed(
    teacher: Run, student: Run, settings: TrainSettings, tmp_path: Path
) -> None:
    engine, run = TorchEngine(teacher.model), Run(tmp_path)
    whole = student.paths.read_bytes()
    paths = Paths(student, settings)
    assert len(whole) == (PATHS + PATHS // 8) * STEPS * 3 * 16 * 16 * 2
    assert list(paths.draw(engine)) == [paths.total], "nothing is missing"
    run.paths.write_bytes(whole[: len(whole) * 3 // 4 + 1])  # a kill left half a row
    assert list(Paths(run, settings).draw(engine)) == [64, paths.total]
    assert run.paths.read_bytes() == whole
    task = Distilling(settings, paths, engine, CPU)
    z, t, x = next(task.batches(load_model(teacher.model), 0))
    index = next(batch_indices(PATHS, settings.batch, settings.seed, 0))
    noise = batch_noise(paths.seed, index.tolist(), engine.config.image_shape)
    states = list(trajectory(engine, noise, fitted_schedule(rows_of(settings)), index.tolist()))
    for i in range(settings.batch):  # each segment in its turn
        row, step = task.schedule.rows[i % STEPS], i % STEPS * (len(states) // STEPS)
        begin, end = states[step].x[i], states[step + len(states) // STEPS].x[i]
        assert t[i] == np.float32(row.t)
        np.testing.assert_allclose(z[i], begin, atol=2e-3)
        np.testing.assert_allclose(x[i], target(row, begin, end), atol=2e-3)


def test_a_disk_that_is_too_small_is_told_before(
    settings: TrainSettings, teacher: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UsageError, match=r"108 paths need 0\.0 GB, .* choose fewer --paths"):
        next(Paths(Run(tmp_path), settings).draw(TorchEngine(teacher.model)))


def test_it_comes_nearer_to_its_teacher_on_unseen_noise(
    teacher: Run, student: Run, settings: TrainSettings
) -> None:
    """Also than the teacher's weights on the same schedule; on noise of another seed as well."""
    engine = TorchEngine(teacher.model)
    paths = Paths(student, settings)
    task = Distilling(settings, paths, engine, CPU)
    before, after = (
        task.held_out(load_model(teacher.model)),
        task.held_out(load_model(student.model)),
    )
    assert after < 0.8 * before
    logged = [json.loads(line) for line in student.log.read_text().splitlines()]
    assert logged[-1]["held_out_loss"] == pytest.approx(after, rel=1e-5)
    noise = batch_noise(0, range(32), engine.config.image_shape)
    *_, end = trajectory(engine, noise, fitted_schedule(rows_of(settings)))
    far = []
    for run in (teacher, student):
        *_, found = trajectory(TorchEngine(run.model), noise, task.schedule)
        far.append(np.sqrt(np.square(found.x - end.x).mean()))
    assert far[1] < 0.8 * far[0]


def test_resumed_equals_unbroken_bit_for_bit(
    teacher: Run, student: Run, settings: TrainSettings, tmp_path: Path
) -> None:
    """Killed in the second half, in which the student's own states are learnt from."""
    settings = msgspec.structs.replace(settings, steps=8)
    engine = TorchEngine(teacher.model)

    def steps(name: str, resume: bool = False) -> Iterator[Any]:
        task = Distilling(settings, Paths(student, settings), engine, CPU)
        return learn(
            settings,
            task,
            Run(tmp_path / name),
            processes=Processes("cpu"),
            resume=resume,
            cadence=Cadence(3, 100, 4, 1),
            should_stop=lambda: False,
        )

    assert len(list(steps("whole"))) == 8
    running = steps("broken")
    for progress in running:
        if progress.step == 7:
            break
    running.close()  # type: ignore[attr-defined]
    assert [progress.step for progress in steps("broken", resume=True)] == [7, 8]
    whole, broken = (load_model(Run(tmp_path / n).model).state_dict() for n in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    before = load_model(teacher.model).state_dict()
    assert not all(torch.equal(whole[name], before[name]) for name in whole)


def test_the_command_stops_and_continues(
    teacher: Run, student: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it draws paths, and while it trains; the end is that of an unbroken run."""
    out = tmp_path / "stopped"
    files.write_json(Run(out).settings, read_settings(student))  # after the fit, that is
    asked = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr("lutdeploy.training.session.stoppable", stopping(lambda: next(asked)))
        line = stop("distill", "--resume", "--out", out)
    assert f"`lutdeploy distill --resume --out {out}` continues" in line
    assert Run(out).paths.stat().st_size < student.paths.stat().st_size
    answers = iter([False] * 40)
    with monkeypatch.context() as patch:
        patch.setattr("lutdeploy.training.session.stoppable", stopping(lambda: next(answers, True)))
        stop("distill", "--resume", "--out", out)
    succeed("distill", "--resume", "--out", out, teacher.path)
    assert Run(out).paths.read_bytes() == student.paths.read_bytes()
    one, other = (load_model(run.model).state_dict() for run in (Run(out), student))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_student_is_a_run_that_knows_its_schedule(
    student: Run, teacher: Run, tmp_path: Path
) -> None:
    schedule = distilled_schedule(student.path)
    assert schedule is not None
    assert (schedule.describe(), schedule.steps) == ("distilled-3", STEPS)
    _, about = read_metadata(student.model)
    assert about["origin"] == "lutdeploy distill"
    sha256 = files.sha256(teacher.model)
    assert about["distilled"]["teacher_sha256"] == sha256
    said = succeed("inspect", student.path).stdout
    assert f"distilled to 3 steps from teacher (9 steps), sha256 {sha256[:12]}…" in said
    result = succeed("sample", student.path, "-n", 1, "--out", tmp_path / "s")
    assert "schedule: distilled-3, which this model was distilled to" in result.stderr
    line = json.loads((tmp_path / "s" / "manifest.jsonl").read_text())
    assert (line["solver"], line["steps"]) == (DISTILLED, STEPS)
    succeed("sample", student.path, "-n", 2, "--steps", STEPS, "--out", tmp_path / "s")
    alone = tmp_path / "alone.safetensors"
    shutil.copy(student.model, alone)
    assert distilled_schedule(alone) == schedule


def test_its_exports_carry_the_schedule(student: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.path.mkdir()
    shutil.copy(student.model, run.model)
    succeed("export", run.path, "--graph", "loop")
    folder = run.export_folder("loop-fp32-distilled-3")
    schedule = distilled_schedule(run.path)
    assert read_manifest(folder).schedule == schedule
    succeed("parity", run.path, "-n", 1)
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone)
    assert distilled_schedule(alone) == schedule
    succeed("sample", alone, "-n", 1, "--out", tmp_path / "s", "--no-grid")


@pytest.mark.parametrize(
    "options", [("--steps", 8), ("--solver", "euler"), ("--solver", "fitted"), ("--shift", 1)]
)
def test_other_schedules_are_refused(
    student: Run, tmp_path: Path, options: tuple[object, ...]
) -> None:
    for command in (
        ("sample", "--out", tmp_path / "s"),
        ("parity", "--backend", "torch"),
        ("export", "--graph", "loop"),
    ):
        line = fail(2, command[0], student.path, *command[1:], *options)
        assert "was distilled to 3 steps and has learnt no other times" in line
    assert not (tmp_path / "s").exists()


def test_what_makes_no_sense_is_refused(student: Run, teacher: Run, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "new")
    assert "is distilled itself" in fail(2, "distill", student.path, *out)
    assert "has a schedule of its own" in fail(2, "tune-steps", student.path)
    assert "--resume needs --out" in fail(2, "distill", "--resume")
    assert "already holds a run" in fail(2, "distill", teacher.path, "--out", student.path)
    line = fail(2, "train", "--resume", "--out", student.path)
    assert "was distilled; `lutdeploy distill --resume` continues it" in line
    line = fail(2, "distill", "--resume", "--out", teacher.path)
    assert "was not distilled; `lutdeploy train --resume` continues it" in line
    for option, value, held in (("seed", 3, 0), ("paths", 5, PATHS), ("steps", 2, STEPS)):
        line = fail(2, "distill", "--resume", "--out", student.path, f"--{option}", value)
        assert f"--{option} {value}: {student.path} was started with {held}" in line
    line = fail(2, "distill", teacher.path, *out, "--batch", 3)
    assert "--batch 3 holds no image for some of the --steps" in line
    other = tmp_path / "other.safetensors"
    save_model(load_model(teacher.model), other, about={"another": 1})
    line = fail(2, "distill", "--resume", "--out", student.path, other)
    assert f"{other} is not the teacher of {student.path}" in line
    assert not (tmp_path / "new").exists()


def test_another_engine_does_not_continue_the_paths(student: Run, settings: TrainSettings) -> None:
    assert settings.distilled is not None
    engine = settings.distilled.engine
    distill.require_same_engine(student, settings, engine)
    with pytest.raises(UsageError, match=r"by another engine: backend torch, not openvino\. Name"):
        distill.require_same_engine(student, settings, {**engine, "backend": "openvino"})


@pytest.fixture(scope="module")
def guide(teacher: Run) -> Path:
    """The teacher with a little noise in its weights."""
    model, generator = load_model(teacher.model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    path = teacher.path.parent / "guide.safetensors"
    save_model(model, path, about={})
    return path


def test_guidance_goes_on_from_the_guide_to_the_model(teacher: Run, guide: Path) -> None:
    """Inside the interval; outside of it, and in what is not predicted, nothing changes."""
    model, weaker = TorchEngine(teacher.model), TorchEngine(guide)
    how = Guidance(guide="", weight=3.0, interval=(0.2, 0.6))
    guided = GuidedDenoiser(model, weaker, how)
    x = batch_noise(0, range(5), model.config.image_shape)
    t = np.array([0.1, 0.2, 0.4, 0.6, 0.7], np.float32)
    ours, theirs, found = (d.predict_x0(x, t) for d in (model, weaker, guided))
    expected = ours.copy()
    expected[1:4] += 2 * (ours - theirs)[1:4]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - ours)[1:4].max() > 1e-3
    row = Step(0.7, 0.5, 0.25, 0.125)
    at, prev = x[:2], x[2:4]
    np.testing.assert_allclose(guided.step(at, row, prev), model.step(at, row, prev), atol=1e-6)
    assert guided.identity["guide"]["model_sha256"] == files.sha256(guide)
    with pytest.raises(UsageError, match="the guide is the model itself"):
        GuidedDenoiser(model, model, how)
    other = guide.parent / "other.safetensors"
    save_model(LutTransformer(model_config("static-tanh-64", "tiny", depth=1)), other, about={})
    with pytest.raises(UsageError, match="the guide makes images"):
        GuidedDenoiser(model, TorchEngine(other), how)


def test_a_student_learns_from_a_guided_teacher(
    teacher: Run, guide: Path, settings: TrainSettings, tmp_path: Path
) -> None:
    """And goes on with the guide that its paths were drawn with."""
    run = Run(tmp_path / "guided")
    options = ("--out", run.path, *SMALL, *QUICK, "--guide", guide)
    succeed("distill", teacher.path, "--steps", STEPS, *options, "--train-steps", 2)
    of = read_settings(run).distilled
    assert of is not None and settings.distilled is not None
    assert of.guidance == Guidance(guide=str(guide), weight=2.0, interval=(0.1, 0.9))
    assert of.rows != settings.distilled.rows, "the schedule is fitted to the guided teacher"
    assert "guided with weight 2" in succeed("inspect", run.path).stdout
    resumed = ("distill", "--resume", "--out", run.path)
    succeed(*resumed, "--train-steps", 3, "--guide", guide)
    line = fail(2, *resumed, "--guidance", 3)
    assert f"--guidance 3.0: {run.path} was started with 2.0" in line
    assert "nothing lies between" in fail(2, "distill", teacher.path, "--guidance-interval", 1, 1)
    assert "it is no run" in fail(2, "distill", teacher.path, "--guide", tmp_path)


def test_resume_takes_the_engine_of_the_paths(
    student: Run, teacher: Run, settings: TrainSettings, tmp_path: Path
) -> None:
    """Though the teacher has an export by now, which others would take; another is refused."""
    owner, run = Run(tmp_path / "teacher"), Run(tmp_path / "student")
    shutil.copytree(teacher.path, owner.path)
    shutil.copytree(student.path, run.path)
    files.write_json(run.settings, settings.changed(init=str(owner.model)))
    succeed("export", owner.path)
    said = succeed("distill", "--resume", "--out", run.path).stderr
    assert "backend: torch on cpu" in said
    line = fail(2, "distill", "--resume", "--out", run.path, "--backend", "onnxruntime")
    assert "by another engine: backend torch, not onnxruntime" in line


@pytest.mark.parametrize(
    ("device", "precision", "asked"),
    [
        ("cpu", None, "cpu"),
        ("CPUExecutionProvider", None, "cpu"),
        ("CPU fp32", "fp32", None),
        ("CPU int8", None, None),
        ("CPU int8-bf16", "bf16", None),
        ("cuda:0 fp16", "fp16", None),
    ],
)
def test_an_engine_is_asked_for_by_its_identity(
    device: str, precision: str | None, asked: str | None
) -> None:
    identity = {"backend": "openvino", "device": device, "export": "step-fp32"}
    found = same_engine(EngineRequest(Path("run"), threads=2), identity)
    assert (found.backend, found.export, found.threads) == ("openvino", "step-fp32", 2)
    assert (found.precision, found.device) == (precision, asked)


def test_evaluate_knows_the_teachers_images(student: Run, teacher: Run) -> None:
    found = Trained.of_model(student.path)
    assert found == Trained.of_model(teacher.path)
    assert found is not None
    assert (found.data, found.seed, found.held_out, found.images) == ("synthetic", 7, 0.25, 48)


def test_damaged_metadata_is_told_in_one_line(student: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(load_model(student.model), path, about={"distilled": {"teacher": "x"}})
    with pytest.raises(ArtefactError, match=r"unreadable metadata of a distilled model: .*missing"):
        distilled_schedule(path)
