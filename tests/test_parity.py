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
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.model import LutTransformer
from lutdeploy.parity import MIN_PSNR, Check, Report, compare, difference
from lutdeploy.reference import TorchDenoiser
from lutdeploy.sampling import Images, batch_noise
from lutdeploy.schedule import Step, solver_schedule
from tests.command import fail, invoke, succeed
from tests.conftest import golden_model

Exported = Callable[..., Path]


def judge(folder: Path, preset: str = "static-tanh-64", steps: int = 6) -> Report:
    """Parity of an export folder against the golden model."""
    model = golden_model(preset)
    noise = batch_noise(0, range(2), model.config.image_shape)
    with open_engine(EngineRequest(folder, "onnxruntime")) as engine:
        schedule = engine.schedule or solver_schedule("dpmpp-2m", steps)
        precision = read_manifest(folder).precision
        return compare(model, engine, precision, schedule, noise)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", ["step", "per-step", "loop"])
def test_every_export_passes(exported: Exported, preset: str, graph: str, precision: str) -> None:
    report = judge(exported(preset, graph, precision), preset)
    assert report.passed, report.failures()
    levels = {check.level for check in report.checks}
    assert levels == {"trajectory", "picture"} | ({"step"} if graph != "loop" else set())
    assert report.final.psnr >= MIN_PSNR[precision]
    assert len(report.drift) == (1 if graph == "loop" else report.schedule.steps)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", ["step", "per-step", "loop"])
def test_third_order_passes_in_every_graph(exported: Exported, graph: str, precision: str) -> None:
    """Six steps, of which two take two x0 from the past."""
    model = golden_model("static-tanh-64")
    noise = batch_noise(0, range(2), model.config.image_shape)
    schedule = solver_schedule("dpmpp-3m", 6)
    assert sum(row.d != 0 for row in schedule.rows) == 2
    folder = exported("static-tanh-64", graph, precision, "dpmpp-3m", 6)
    with open_engine(EngineRequest(folder, "onnxruntime")) as engine:
        report = compare(model, engine, precision, schedule, noise)
    assert report.passed, report.failures()


def test_a_forgotten_x0_fails(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second history term is large enough to be missed."""
    model = golden_model("static-tanh-64")
    noise = batch_noise(0, range(2), model.config.image_shape)
    with open_engine(
        EngineRequest(exported("static-tanh-64", "loop", "fp32", "dpmpp-3m", 6))
    ) as engine:
        monkeypatch.setattr("lutdeploy.sampling.history", lambda row, x0, before: x0)
        assert not compare(model, engine, "fp32", engine.schedule, noise).passed


@pytest.mark.parametrize("solver", ["euler", "dpmpp-2m", "dpmpp-3m"])
def test_reference_trajectory_of_64_steps_passes(exported: Exported, solver: str) -> None:
    model = golden_model("static-tanh-64")
    with open_engine(EngineRequest(exported(), "onnxruntime")) as engine:
        noise = batch_noise(0, range(1), model.config.image_shape)
        report = compare(model, engine, "fp32", solver_schedule(solver, 64), noise)
    assert report.passed, report.failures()


def test_fp16_really_is_fp16(exported: Exported) -> None:
    """It must err more than float32 may: else the limit was never tested."""
    report = judge(exported(precision="fp16"))
    assert report.final.max_abs > 1e-4


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


def test_a_perturbed_weight_fails(exported: Exported, tmp_path: Path) -> None:
    bad = tamper(exported(), tmp_path / "bad", 0, "blocks.1.qkv.bias", 0.5)
    report = judge(bad)
    assert not report.passed
    assert {"step", "trajectory"} <= {c.level for c in report.checks if not c.passed}


def test_a_perturbed_lut_entry_fails_in_fp16(exported: Exported, tmp_path: Path) -> None:
    bad = tamper(exported(precision="fp16"), tmp_path / "bad", 0, "lut", 0.2)
    assert not judge(bad).passed


def test_a_wrong_coefficient_at_a_late_step_fails(exported: Exported, tmp_path: Path) -> None:
    bad = tamper(exported(graph="per-step"), tmp_path / "bad", 3, "b", 0.01)
    report = judge(bad)
    failed = {c.level for c in report.checks if not c.passed}
    assert "trajectory" in failed
    assert any("drift after step 4" in c.what for c in report.checks if not c.passed)
    assert report.drift[2] < 1e-5 < report.drift[3]


def test_a_wrong_coefficient_inside_a_loop_fails(exported: Exported, tmp_path: Path) -> None:
    bad = tamper(exported(graph="loop"), tmp_path / "bad", 0, "step_03/b", 0.05)
    assert not judge(bad).passed


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
    report = compare(golden_model("static-tanh-64"), denoiser, "fp32", solver_schedule("euler", 8))
    failed = {c.level for c in report.checks if not c.passed}
    assert "trajectory" in failed
    assert not report.passed
    assert report.failures()


def test_the_gate_passes_the_reference_itself(preset: str) -> None:
    model = golden_model(preset)
    report = compare(
        model, TorchDenoiser(golden_model(preset)), "fp32", solver_schedule("euler", 4)
    )
    assert report.passed
    assert report.final.max_abs == 0
    assert math.isinf(report.final.psnr)


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


def test_a_report_is_kept_as_a_verdict(exported: Exported, tmp_path: Path) -> None:
    identity = {"backend": "onnxruntime", "device": "cpu", "export": "e", "engine_sha256": "s"}
    verdict = verdict_of(judge(exported()), {**identity, "model_sha256": "m"}, "parity")
    assert verdict.passed
    assert verdict.solver == "dpmpp-2m-6"
    store_verdict(Run(tmp_path), verdict)
    assert read_verdicts(Run(tmp_path)) == [verdict]


def test_model_is_left_as_it_was() -> None:
    model: LutTransformer = golden_model("static-tanh-64")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compare(model, TorchDenoiser(model), "fp16", solver_schedule("euler", 2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_all_judges_every_engine_and_goes_on_after_a_failure(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    for precision in ("fp32", "fp16"):
        source = exported(precision=precision)
        shutil.copytree(source, run.export_folder(source.name))
        shutil.copy(source.parent.parent / MODEL, run.model)
    options = ("parity", run.path, "--all", "-n", 1, "--steps", 2)
    lines = succeed(*options).stdout.splitlines()
    names = [line.partition(":")[0] for line in lines]
    assert {"onnxruntime-fp16", "onnxruntime-fp32", "openvino-fp32"} <= set(names)
    assert all("passed, PSNR" in line or "not judged" in line for line in lines)
    passed = [line for line in lines if "passed" in line]
    assert len(read_verdicts(run)) == len(passed)
    assert all(verdict.machine["cpu"] for verdict in read_verdicts(run))

    monkeypatch.setitem(MIN_PSNR, "fp16", 1000.0)
    result = invoke(*options)
    assert result.exit_code == 1
    assert "onnxruntime-fp16: FAILED" in result.stdout
    assert len(result.stdout.splitlines()) == len(lines), "the others were judged all the same"
    assert result.stderr.splitlines()[-1] == "error: parity failed: onnxruntime-fp16"
    failed = [verdict for verdict in read_verdicts(run) if not verdict.passed]
    assert [(v.export, v.backend) for v in failed] == [("step-fp16", "onnxruntime")]


def test_all_needs_an_export_and_nothing_that_chooses(
    golden_runs: Callable[[str], Run], tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    files.write_atomic(run.model, golden_runs("dynamic-64").model.read_bytes())
    assert "no export to judge" in fail(2, "parity", run.path, "--all")
    assert "leave out which" in fail(2, "parity", run.path, "--all", "--backend", "openvino")
