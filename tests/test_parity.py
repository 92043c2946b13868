"""The gate: green on every preset, graph and precision; red on every planted fault."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import MANIFEST, hash_files, read_manifest
from lutdeploy.artefacts.run import MODEL, Run
from lutdeploy.artefacts.verdicts import read_verdicts, store_verdict, verdict_of
from lutdeploy.config import PRESETS
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.parity import MIN_PSNR, Check, Report, compare, difference
from lutdeploy.reference import TorchDenoiser
from lutdeploy.sampling import Images, batch_noise
from lutdeploy.schedule import Step, solver_schedule
from tests.command import fail, invoke
from tests.conftest import golden_model

Exported = Callable[..., Path]


def judge(folder: Path, preset: str = "static-tanh-64") -> Report:
    """Parity of an export folder against the golden model."""
    model = golden_model(preset)
    noise = batch_noise(0, range(2), model.config.image_shape)
    with open_engine(EngineRequest(folder, "onnxruntime")) as engine:
        schedule = engine.schedule or solver_schedule("dpmpp-3m", 6)
        assert any(row.d for row in schedule.rows), "a step with two x0 from the past"
        return compare(model, engine, read_manifest(folder).precision, schedule, noise)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("preset", "graph"),
    [*((preset, "step") for preset in PRESETS), ("dynamic-64", "per-step"), ("dynamic-64", "loop")],
)
def test_every_export_passes(exported: Exported, preset: str, graph: str, precision: str) -> None:
    report = judge(exported(preset, graph, precision), preset)
    assert report.passed, report.failures()
    levels = {check.level for check in report.checks}
    assert levels == {"trajectory", "picture"} | ({"step"} if graph != "loop" else set())
    assert report.final.psnr >= MIN_PSNR[precision]
    assert len(report.drift) == (1 if graph == "loop" else report.schedule.steps)
    if precision == "fp16" and preset == "static-tanh-64":
        assert report.final.max_abs > 1e-4, "so it was float16 that ran"


def test_a_forgotten_x0_fails(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second history term is large enough to be missed."""
    monkeypatch.setattr("lutdeploy.sampling.history", lambda row, x0, before: x0)
    assert not judge(exported(graph="loop")).passed


@pytest.mark.parametrize("solver", ["euler", "dpmpp-3m"])
def test_a_trajectory_of_64_steps_passes(exported: Exported, solver: str) -> None:
    model = golden_model("static-tanh-64")
    with open_engine(EngineRequest(exported(), "onnxruntime")) as engine:
        noise = batch_noise(0, range(1), model.config.image_shape)
        report = compare(model, engine, "fp32", solver_schedule(solver, 64), noise)
    assert report.passed, report.failures()


def tamper(folder: Path, target: Path, graph: int, name: str, change: float) -> Path:
    """A copy of an export with one number of an initializer moved, and honest hashes."""
    shutil.copytree(folder, target)
    path = target / read_manifest(target).graphs[graph]
    model = onnx.load(path)
    tensor = next(i for i in model.graph.initializer if i.name == name)
    values = numpy_helper.to_array(tensor).copy()
    values.ravel()[0] += change
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    path.unlink()
    onnx.save(model, path)  # every weight inside: the copy needs no shared file
    manifest = files.read_json(target / MANIFEST)
    manifest["files"] = hash_files(target)
    files.write_json(target / MANIFEST, manifest)
    return target


@pytest.mark.parametrize(
    ("graph", "precision", "name", "change"),
    [
        ("step", "fp32", "blocks.1.qkv.bias", 0.5),
        ("step", "fp16", "lut", 0.2),
        ("loop", "fp32", "step_03/b", 0.05),
    ],
)
def test_a_perturbed_number_fails(
    exported: Exported, tmp_path: Path, graph: str, precision: str, name: str, change: float
) -> None:
    source = exported(graph=graph, precision=precision)
    report = judge(tamper(source, tmp_path / "bad", 0, name, change))
    failed = {check.level for check in report.checks if not check.passed}
    assert {"step", "trajectory"} - ({"step"} if graph == "loop" else set()) <= failed


def test_a_wrong_coefficient_at_a_late_step_fails(exported: Exported, tmp_path: Path) -> None:
    bad = tamper(exported(graph="per-step"), tmp_path / "bad", 3, "b", 0.01)
    report = judge(bad)
    failed = [check for check in report.checks if not check.passed]
    assert any(check.what == "drift after step 4" for check in failed)
    assert report.drift[2] < 1e-5 < report.drift[3]


class Faulty(TorchDenoiser):
    """A denoiser that goes wrong at one late step, in a chosen way."""

    fault: Callable[[Images], Images] = staticmethod(lambda x: x)

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        x_next, x0 = super().step(x, row, x0_prev)
        return (self.fault(x_next), x0) if row.t > 0.8 else (x_next, x0)


@pytest.mark.parametrize(
    "fault",
    [np.zeros_like, lambda x: x * np.float32(np.nan), lambda x: x * np.float32(np.inf)],
    ids=["black", "nan", "inf"],
)
def test_a_trajectory_gone_wrong_late_fails(fault: Callable[[Images], Images]) -> None:
    denoiser = Faulty(golden_model("static-tanh-64"))
    denoiser.fault = fault
    report = compare(golden_model("static-tanh-64"), denoiser, "fp32", solver_schedule("euler", 6))
    assert "trajectory" in {check.level for check in report.checks if not check.passed}
    assert not report.passed
    assert report.failures()


def test_the_reference_itself_passes_and_its_report_is_kept(tmp_path: Path) -> None:
    model, schedule = golden_model("static-tanh-64"), solver_schedule("euler", 4)
    report = compare(model, TorchDenoiser(golden_model("static-tanh-64")), "fp32", schedule)
    assert report.passed
    assert report.final.max_abs == 0
    assert math.isinf(report.final.psnr)
    identity = {"backend": "torch", "device": "cpu", "export": None, "engine_sha256": "s"}
    verdict = verdict_of(report, {**identity, "model_sha256": "m"}, "parity")
    assert verdict.passed
    assert verdict.solver == "euler-4"
    store_verdict(Run(tmp_path), verdict)
    assert read_verdicts(Run(tmp_path)) == [verdict]


def test_no_evidence_is_no_pass() -> None:
    """A limit is infinite when PyTorch's own half precision overflows."""
    assert not Check("step", "x0", "max abs", 0.0, math.inf).passed
    assert not Check("step", "x0", "max abs", math.nan, 1.0).passed
    assert not Report(
        "fp32", solver_schedule("euler", 1), 1, (), (), difference(*[np.ones(3)] * 2)
    ).passed


def test_difference_measures() -> None:
    reference = np.array([0.0, 0.5, -0.5, 3.0])
    found = difference(np.array([0.0, 0.5, -0.3, 2.0]), reference)
    assert found.max_abs == 1.0
    assert math.isclose(found.rms, math.sqrt((0.04 + 1) / 4))
    assert math.isclose(found.psnr, 10 * math.log10(4 / 0.01))  # clipped: 3 and 2 are both 1
    with pytest.raises(ValueError, match="shapes"):
        difference(reference, reference[:2])
    for bad in (np.nan, np.inf):
        broken = difference(np.array([bad]), np.array([1.0]))
        assert (broken.max_abs, broken.psnr) == (math.inf, -math.inf)


def test_model_is_left_as_it_was() -> None:
    model = golden_model("static-tanh-64")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    noise = batch_noise(0, range(1), model.config.image_shape)
    compare(model, TorchDenoiser(model), "fp16", solver_schedule("euler", 2), noise)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_all_judges_every_engine_and_goes_on_after_a_failure(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    for precision in ("fp32", "fp16"):
        source = exported(precision=precision)
        shutil.copytree(source, run.export_folder(source.name))
        shutil.copy(source.parent.parent / MODEL, run.model)
    monkeypatch.setitem(MIN_PSNR, "fp16", 1000.0)
    result = invoke("parity", run.path, "--all", "-n", 1, "--steps", 2)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: parity failed: onnxruntime-fp16"
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert {"onnxruntime-fp16", "onnxruntime-fp32", "openvino-fp32"} <= set(lines)
    assert lines.pop("onnxruntime-fp16").startswith("FAILED")
    passed = [line for line in lines.values() if line.startswith("passed, PSNR")]
    assert len(passed) + sum(line.startswith("not judged") for line in lines.values()) == len(lines)
    verdicts = read_verdicts(run)
    assert all(verdict.machine["cpu"] for verdict in verdicts)
    assert len([verdict for verdict in verdicts if verdict.passed]) == len(passed)
    failed = [(v.export, v.backend) for v in verdicts if not v.passed]
    assert failed == [("step-fp16", "onnxruntime")]


def test_all_needs_an_export_and_nothing_that_chooses(
    golden_runs: Callable[[str], Run], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    files.write_atomic(run.model, golden_runs("dynamic-64").model.read_bytes())
    assert "no export to judge" in fail(2, "parity", run.path, "--all")
    assert "leave out which" in fail(2, "parity", run.path, "--all", "--backend", "openvino")
