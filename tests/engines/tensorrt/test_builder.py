"""`lutdeploy build` on the double of TensorRT, both versions: keys, checks, faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import MANIFEST, read_manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.verdicts import read_verdicts
from lutdeploy.engines.tensorrt import plan
from tests.command import invoke, succeed
from tests.conftest import TensorRT, one_version
from tests.doubles import install
from tests.doubles.tensorrt_double import VERSIONS, Controls

ROOT = Path(__file__).parents[3]
BATCH = ("--batch", "1:2:4")
Runs = Callable[..., Run]


def told(*arguments: object, code: int = 1) -> str:
    """The last line of a command that fails with ``code``."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: "), result.stderr
    return last


def records(run: Run) -> list[plan.PlanRecord]:
    return [plan.read_record(path) for path in run.plan_records()]


def outcomes(run: Run) -> list[str]:
    return [state.outcome for state in plan.survey(run, None)]


@pytest.mark.parametrize("graph", ["step", "per-step", "loop"])
def test_an_engine_for_each_graph_with_all_its_verdicts(
    tensorrt: TensorRT, built_run: Runs, graph: str
) -> None:
    run = built_run(graph)
    manifest = read_manifest(run.exports()[0])
    found = records(run)
    assert {record.graph_file for record in found} == set(manifest.graphs)
    for record in found:
        verdict = plan.verdict_on(record, read_verdicts(run))
        assert verdict is not None and verdict.passed and verdict.check == "build"
        levels = {check.level for check in verdict.checks}
        assert levels >= {"trajectory", "picture"}
        assert ("step" in levels) == (graph != "loop")
        assert verdict.layers is not None
        passes = 5 if graph == "loop" else 1
        assert verdict.layers["float16_products"] > verdict.layers["float32_products"] > 0
        assert verdict.layers["fused_attention"] == 2 * passes
        assert record.fields["tensorrt"] == tensorrt.module.__version__
        assert "double" in record.fields["gpu"], "a double must be seen for what it is"
    assert run.timing_cache.is_file()


@one_version
def test_what_is_there_and_fits_is_used_again(tensorrt: TensorRT, built_run: Runs) -> None:
    run = built_run()
    before = {path: path.read_bytes() for path in run.engines.iterdir()}
    result = succeed("build", run.path, *BATCH)
    assert "1 engine(s) were there already and fit: reused" in result.stderr
    assert "their checks passed" in result.stderr
    assert result.stdout.split() == [str(records(run)[0].plan)]
    assert tensorrt.controls.builds == 0
    assert {path: path.read_bytes() for path in run.engines.iterdir()} == before
    succeed("build", run.path, *BATCH, "--force")
    assert tensorrt.controls.builds == 1
    assert len(records(run)) == 1


def test_another_option_is_another_engine(tensorrt: TensorRT, exported_run: Runs) -> None:
    run = exported_run()
    options = ("--hardware-compatible", "--version-compatible", "--refittable")
    workspace = ("--workspace", "64", "--opt-level", "1")
    succeed("build", run.path, *BATCH, "--batch", "2")
    succeed("build", run.path, "--batch", "2", *options, *workspace)
    assert tensorrt.controls.builds == 3
    found = {(record.fields["batch"], record.fields["refittable"]) for record in records(run)}
    assert found == {("1:2:4", False), ("2", False), ("2", True)}
    trt = tensorrt.module
    for record in records(run):
        runtime = trt.Runtime(trt.Logger())  # outlives the engine
        engine = runtime.deserialize_cuda_engine(record.read_plan())
        static, special = record.profile.static, record.fields["refittable"]
        assert tuple(engine.get_tensor_shape("x")) == (2 if static else -1, 3, 64, 64)
        assert engine.refittable == special
        level = trt.HardwareCompatibilityLevel
        assert engine.hardware_compatibility_level == (level.AMPERE_PLUS if special else level.NONE)
        assert engine.profiling_verbosity == trt.ProfilingVerbosity.DETAILED


@one_version
def test_a_float32_export_says_that_it_is_one(tensorrt: TensorRT, exported_run: Runs) -> None:
    run = exported_run(precision="fp32")
    result = succeed("build", run.path, *BATCH)
    assert "this export is float32" in result.stderr
    (record,) = records(run)
    (verdict,) = read_verdicts(run)
    assert verdict.layers is not None
    assert verdict.layers["float16_products"] == 0
    trt = tensorrt.module
    runtime = trt.Runtime(trt.Logger())  # outlives the engine
    engine = runtime.deserialize_cuda_engine(record.read_plan())
    layers = engine.create_engine_inspector().get_engine_information(
        trt.LayerInformationFormat.JSON
    )
    assert "gemm" in layers
    assert "tf32" not in layers, "a float32 reference must not round its products"


@one_version
def test_fp16_that_is_really_float32_fails_loudly(tensorrt: TensorRT, exported_run: Runs) -> None:
    run = exported_run()
    tensorrt.controls.inspector = "float32"
    said = told("build", run.path, *BATCH)
    assert "the engine is not what its export says: an fp16 export, but in another" in said
    assert outcomes(run) == ["FAILED"]


@one_version
def test_attention_that_is_not_fused_is_a_warning(tensorrt: TensorRT, exported_run: Runs) -> None:
    tensorrt.controls.inspector = "unfused"
    said = succeed("build", exported_run().path, *BATCH).stderr
    assert "warning: attention is fused in 0 of 2 places; apart run " in said


@one_version
@pytest.mark.parametrize("first", [0, 80])
def test_an_engine_that_computes_something_else_fails(
    tensorrt: TensorRT, exported_run: Runs, first: int
) -> None:
    """Wrong from the start, or only late in a trajectory, behind the single steps."""
    run = exported_run()
    tensorrt.controls.perturb, tensorrt.controls.perturb_from = 0.05, first
    said = told("build", run.path, *BATCH)
    assert "the engine failed parity" in said
    assert ("step, x_next" in said) == (first == 0)
    assert outcomes(run) == ["FAILED"]
    # Built again, what is there is judged once more and not built.
    tensorrt.controls.perturb, builds = 0.0, tensorrt.controls.builds
    succeed("build", run.path, *BATCH)
    assert tensorrt.controls.builds == builds
    assert outcomes(run) == ["passed"]


@one_version
def test_every_error_of_the_parser_is_told(tensorrt: TensorRT, exported_run: Runs) -> None:
    run = exported_run()
    tensorrt.controls.parser_errors = [
        ("blocks.0/MatMul_1", "MatMul", "no such layout"),
        ("head/Tanh_1", "Tanh", "no such type"),
    ]
    said = told("build", run.path, *BATCH)
    assert "node blocks.0/MatMul_1 (MatMul): no such layout" in said
    assert "node head/Tanh_1 (Tanh): no such type" in said
    assert not records(run)


@one_version
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"build_returns_none": True}, "TensorRT built no engine from"),
        ({"deserialize_returns_none": True}, "TensorRT refuses"),
        ({"input_shape_false": True}, "TensorRT refuses shape"),
        ({"tensor_address_false": True}, "TensorRT refuses the address"),
        ({"missing_output_shapes": True}, "TensorRT makes x_next"),
        ({"execute_false_at": 3}, "TensorRT did not start evaluation"),
    ],
)
def test_what_tensorrt_reports_without_an_exception_is_an_error(
    tensorrt: TensorRT, exported_run: Runs, fault: dict[str, Any], said: str
) -> None:
    run = exported_run()
    for name, value in fault.items():
        setattr(tensorrt.controls, name, value)
    assert said in told("build", run.path, *BATCH)
    assert set(outcomes(run)) <= {"not checked"}
    for name in fault:
        setattr(tensorrt.controls, name, getattr(Controls(), name))
    succeed("build", run.path, *BATCH)  # nothing stands in the way of the next one
    assert outcomes(run) == ["passed"]


def test_the_timing_cache_is_kept_and_a_foreign_one_reported(
    tensorrt: TensorRT, exported_run: Runs, tmp_path: Path
) -> None:
    run, controls = exported_run(), tensorrt.controls
    succeed("build", run.path, *BATCH)
    first = run.timing_cache.read_bytes()
    assert first
    succeed("build", run.path, *BATCH, "--force")
    assert controls.timing_cache_loaded == first
    controls.gpu_name = "another GPU"
    tensorrt.again(gpu="another GPU")
    result = succeed("build", run.path, *BATCH)
    assert f"timing cache {run.timing_cache} was measured by another TensorRT" in result.stderr
    own = tmp_path / "own.cache"
    own.write_bytes(b"no cache at all")
    result = succeed("build", run.path, *BATCH, "--force", "--timing-cache", own)
    assert f"timing cache {own}" in result.stderr
    assert own.read_bytes() != b"no cache at all"
    result = succeed("build", run.path, "--batch", "3", "--opt-level", "0", "--timing-cache", own)
    assert "ignores the timing cache" in result.stderr


@one_version
@pytest.mark.parametrize("damage", ["plan", "record"])
def test_a_damaged_engine_is_built_again(tensorrt: TensorRT, built_run: Runs, damage: str) -> None:
    run = built_run()
    (record,) = records(run)
    if damage == "plan":
        data = bytearray(record.plan.read_bytes())
        data[len(data) // 2] ^= 1
        record.plan.write_bytes(data)
    else:
        text = record.path.read_bytes()
        record.path.write_bytes(text[: len(text) // 2])
    refused = told("sample", run.path, "--backend", "tensorrt", "--out", run.path / "out")
    assert record.plan.stem in refused
    assert "STALE: " in succeed("inspect", run.path).stdout
    assert tensorrt.controls.deserialized == 0
    result = succeed("build", run.path, *BATCH)
    assert "damaged: building it again" in result.stderr
    assert outcomes(run) == ["passed"]


@one_version
def test_a_stale_engine_is_named_field_by_field(
    tensorrt: TensorRT, built_run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built_run()
    (record,) = records(run)
    tensorrt.controls.gpu_name = "another GPU"
    tensorrt.again(gpu="another GPU", compute_capability="8.6")
    tensorrt.controls.deserialized = 0
    refused = told("sample", run.path, "--backend", "tensorrt", "--out", run.path / "out")
    assert f"{record.plan.name}: gpu: built with TensorRT double" in refused
    assert "compute_capability: built with 9.0, here 8.6" in refused
    shown = succeed("inspect", run.path).stdout
    assert "STALE: compute_capability: built with 9.0, here 8.6" in shown
    assert json.loads(succeed("inspect", run.path, "--json").stdout)["engines"][0]["stale"]
    monkeypatch.setattr("lutdeploy.artefacts.run.RUNS", run.path.parent)
    lines = succeed("doctor").stdout.splitlines()
    (line,) = [line for line in lines if record.plan.stem in line]
    assert line.startswith("-") and "here another GPU" in line
    assert tensorrt.controls.deserialized == 0, "stale engines are recognised unopened"


@one_version
def test_an_engine_of_another_export_is_stale(tensorrt: TensorRT, built_run: Runs) -> None:
    run = built_run()
    succeed("export", run.path, "--fp16")  # the same weights: the same hashes
    assert "STALE" not in succeed("inspect", run.path).stdout
    manifest = run.exports()[0] / MANIFEST
    values = files.read_json(manifest)
    values["files"]["step.onnx"]["sha256"] = "0" * 64
    files.write_json(manifest, values)
    refused = told("sample", run.path, "--backend", "tensorrt", "--out", run.path / "out")
    assert "graph_sha256: built with" in refused


@one_version
def test_a_dry_run_builds_nothing(tensorrt: TensorRT, exported_run: Runs) -> None:
    run = exported_run("step", "per-step")
    result = succeed("build", run.path, "--graph", "per-step", "--dry-run", *BATCH, "--batch", "8")
    assert "5 graph(s): operators, types, axes and islands suit TensorRT" in result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 10
    assert all(line.startswith("would build ") for line in lines)
    assert tensorrt.controls.builds == 0
    assert not run.engines.exists()
    succeed("build", run.path, "--graph", "per-step", *BATCH)
    result = succeed("build", run.path, "--graph", "per-step", "--dry-run", *BATCH)
    assert all(line.startswith("would reuse ") for line in result.stdout.splitlines())


def test_a_dry_run_needs_no_tensorrt(exported_run: Runs) -> None:
    result = succeed("build", exported_run().path, "--dry-run")
    assert "suit TensorRT" in result.stderr
    assert "TensorRT or the GPU is missing here" in result.stdout


def test_without_tensorrt_there_is_one_line(exported_run: Runs) -> None:
    run = exported_run()
    for command in (("build", run.path), ("sample", run.path, "--backend", "tensorrt")):
        assert "TensorRT does not load here" in told(*command)


@one_version
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--batch", "0"), "wanted 1 ≤ MIN ≤ OPT ≤ MAX"),
        (("--batch", "some"), "write N or MIN:OPT:MAX"),
        (("--opt-level", "6"), "--opt-level"),
        (("--workspace", "0"), "--workspace"),
        (("--graph", "loop"), "has no loop export"),
        (("--export", "step-int8"), "has no export 'step-int8'"),
    ],
)
def test_impossible_requests_are_one_line(
    tensorrt: TensorRT, exported_run: Runs, arguments: tuple[str, ...], said: str
) -> None:
    result = invoke("build", exported_run().path, *arguments)
    assert result.exit_code == 2
    assert said in result.stderr.splitlines()[-1]


@one_version
def test_a_graph_that_does_not_suit_tensorrt_is_not_built(
    tensorrt: TensorRT, exported_run: Runs
) -> None:
    run = exported_run(precision="fp32")
    manifest = run.exports()[0] / MANIFEST
    values = files.read_json(manifest)
    files.write_json(manifest, {**values, "precision": "fp16"})
    assert "does not suit TensorRT: " in told("build", run.path)
    assert tensorrt.controls.builds == 0


# In processes of their own.


def start(run: Run, step_seconds: float = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.doubles", VERSIONS[-1], "build", run.path, *BATCH]
    return subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "DOUBLE_STEP_SECONDS": str(step_seconds),
            "DOUBLE_BUILDING": str(run.path / "building"),
            "OMP_NUM_THREADS": "1",
        },
    )


def wait_for_build(run: Run, process: subprocess.Popen[str]) -> None:
    """Until TensorRT is at work, whose parser lets no exception through its log."""
    deadline = time.monotonic() + 60
    while not (run.path / "building").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_cancels_the_build(exported_run: Runs) -> None:
    run = exported_run()
    process = start(run, step_seconds=1.5)
    wait_for_build(run, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in stderr
    assert not records(run)


def test_a_killed_build_leaves_nothing_in_the_way(exported_run: Runs) -> None:
    run = exported_run()
    process = start(run, step_seconds=1.5)
    wait_for_build(run, process)
    process.kill()
    process.communicate(timeout=60)
    (run.engines / ".abc.plan.leftover").write_bytes(b"half a plan")
    process = start(run)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert outcomes(run) == ["passed"]
    assert not list(run.engines.glob(".*leftover"))


def test_a_kill_between_plan_and_record_is_harmless(
    exported_run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = exported_run()
    install(monkeypatch, VERSIONS[-1], Controls())

    def write(self: plan.PlanRecord) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(plan.PlanRecord, "write", write)
        assert invoke("build", run.path, *BATCH).exit_code == 9
    assert list(run.engines.glob("*.plan"))
    assert not records(run)
    succeed("build", run.path, *BATCH)
    assert outcomes(run) == ["passed"]


def test_two_builds_at_once_end_with_one_engine(exported_run: Runs) -> None:
    run = exported_run()
    first = start(run, step_seconds=0.2)
    wait_for_build(run, first)
    second = start(run)
    said = [process.communicate(timeout=180)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], said
    assert "waiting for it" in said[1]
    assert "reused" in said[1]
    assert outcomes(run) == ["passed"]
