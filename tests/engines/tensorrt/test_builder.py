"""`lutdeploy build` with NVIDIA's compiler: TensorRT for RTX builds on a machine without a GPU."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.shipped import DEFAULT, model_path
from lutdeploy.engines.tensorrt import plan
from lutdeploy.engines.tensorrt.builder import BuildTarget, GraphBuild
from lutdeploy.engines.tensorrt.engine import this_machine
from lutdeploy.engines.tensorrt.library import RTX
from lutdeploy.errors import BackendError
from lutdeploy.signature import step_signature
from tests.command import invoke, succeed

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")

BUILD = ("build", "--backend", RTX)
ADA = ("--architecture", "8.9", "--batch", "1:2:4")
AMPERE_ON = ["8.0", "8.6", "8.9", "12.0", "12.1"]
TURING = ("--architecture", "7.5", "--batch", "1:2:4")
Exported = Callable[..., Path]
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


@pytest.mark.parametrize(
    ("preset", "graph", "precision", "architectures"),
    [
        ("static-tanh-64", "step", "fp16", [*AMPERE_ON, "7.5"]),
        ("static-tanh-64", "step", "fp32", AMPERE_ON),  # Turing has no float32 matmul
        ("static-tanh-64", "per-step", "fp16", ["7.5", "12.0"]),
        ("static-tanh-64", "loop", "fp32", ["8.9"]),
        ("static-softmax-512", "step", "fp32", ["8.9"]),
        ("static-softmax-512", "loop", "fp16", ["7.5", "12.0"]),
        ("dynamic-64", "step", "fp16", ["7.5", "12.0"]),
        ("dynamic-64", "per-step", "fp32", ["8.9"]),
        ("dynamic-64", "loop", "fp16", ["7.5", "12.0"]),
    ],
)
def test_every_preset_graph_and_precision_compiles(
    *,
    exported: Exported,
    exported_run: Runs,
    preset: str,
    graph: str,
    precision: str,
    architectures: list[str],
) -> None:
    run = exported_run(graph, preset=preset, precision=precision)
    export = exported(preset, graph, precision).name
    options = ("--architecture", ",".join(architectures), "--batch", "1:2:4")
    said = succeed(*BUILD, run.path, "--export", export, *options).stderr
    assert "compiled, not run" in said
    assert f"MATRIX_MULTIPLY float{precision[2:]}" in said
    manifest = read_manifest(run.export_folder(export))
    assert {record.graph_file for record in records(run)} == set(manifest.graphs)
    for record in records(run):
        assert record.fields["architectures"] == sorted(architectures, key=float)
        assert record.read_plan().startswith(b"vtrt")
    states = plan.survey(run, {RTX: this_machine(RTX)})
    assert {state.outcome for state in states} == {"compiled, not run"}
    assert not any(state.reasons for state in states)


@pytest.mark.slow
def test_the_default_model_compiles_at_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    succeed("export", model_path(DEFAULT), "--fp16")
    said = succeed(*BUILD, "--architecture", "7.5,12.0").stderr
    assert "float16" in said


def test_float32_does_not_compile_for_turing_and_says_why(exported_run: Runs) -> None:
    run = exported_run(precision="fp32")
    result = invoke(*BUILD, run.path, *TURING)
    assert result.exit_code == 1
    assert "this export is float32" in result.stderr
    line = result.stderr.splitlines()[-1]
    assert "Turing (SM75)" in line
    assert "FP32" in line
    assert records(run) == []


def test_what_is_there_and_fits_is_used_again(exported_run: Runs) -> None:
    run = exported_run()
    succeed(*BUILD, run.path, *ADA)
    before = {path: path.read_bytes() for path in run.engines.iterdir()}
    result = succeed(*BUILD, run.path, *ADA)
    assert "1 engine(s) were there already and fit: reused" in result.stderr
    assert result.stdout.split() == [str(records(run)[0].plan)]
    assert {path: path.read_bytes() for path in run.engines.iterdir()} == before
    dry = succeed(*BUILD, run.path, *ADA, "--dry-run").stdout
    assert f"would reuse {records(run)[0].plan}" in dry
    succeed(*BUILD, run.path, *ADA, "--opt-level", "0")
    assert len(records(run)) == 2, "another option is another engine"


@pytest.mark.parametrize("damage", ["plan", "record"])
def test_a_damaged_engine_is_built_again(exported_run: Runs, damage: str) -> None:
    run = exported_run()
    succeed(*BUILD, run.path, *ADA)
    (record,) = records(run)
    path = record.plan if damage == "plan" else record.path
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged: building it again" in succeed(*BUILD, run.path, *ADA).stderr
    (again,) = records(run)
    again.read_plan()


def test_several_profiles_are_in_one_engine(exported_run: Runs) -> None:
    run = exported_run()
    succeed(*BUILD, run.path, "--architecture", "8.9", "--batch", "1,8,64", "--batch", "16")
    profiles = sorted((record.profiles for record in records(run)), key=len)
    assert profiles == [
        (plan.BatchProfile(16, 16, 16),),
        (plan.BatchProfile(1, 1, 1), plan.BatchProfile(2, 8, 8), plan.BatchProfile(9, 64, 64)),
    ]


@pytest.mark.parametrize("command", [BUILD, ("build",)])
def test_a_dry_run_shows_types_and_builds_nothing(
    exported_run: Runs, command: tuple[str, ...]
) -> None:
    """Without --backend, by the TensorRT that works here."""
    run = exported_run()
    result = succeed(*command, run.path, *ADA, "--dry-run")
    types, plans = result.stdout.splitlines()
    assert types.startswith("step.onnx: ")
    assert "12 MATRIX_MULTIPLY float16" in types
    assert "2 SOFTMAX float16" in types
    assert plans.startswith(f"would build {run.engines}")
    assert not run.engines.exists()


@pytest.mark.parametrize(
    ("options", "code", "what"),
    [
        (("--architecture", "9.0"), 2, r"architecture 9.0: .* compiles for 7.5, 8.0, 8.6"),
        (("--batch", "4:2:1"), 2, "wanted 1 ≤ MIN ≤ OPT ≤ MAX"),
        (("--batch", "64,8"), 2, "ascending"),
        (("--batch", "1:2:4,8"), 2, "several profiles are single sizes"),
        (("--graph", "loop"), 2, "has no loop export"),
        (("--device", "cuda:7"), 1, "no CUDA device"),
    ],
)
def test_impossible_requests_are_one_line(
    exported_run: Runs, options: tuple[str, ...], code: int, what: str
) -> None:
    line = told(*BUILD, exported_run().path, *options, code=code)
    assert re.search(what, line), line


def test_each_backend_says_what_it_lacks(
    exported_run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = exported_run()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "docs/tensorrt.md" in told("build", run.path)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert "pip install 'lutdeploy[tensorrt-rtx]'" in told(*BUILD, run.path)


def test_a_profile_that_cannot_be_is_refused_by_tensorrt(
    exported: Exported, target: BuildTarget
) -> None:
    """An input of another shape than the graph's."""
    folder = exported(precision="fp16")
    signature = step_signature(read_manifest(folder).config)
    wrong = replace(
        signature,
        inputs=tuple(
            replace(spec, row=(7,)) if spec.name == "t" else spec for spec in signature.inputs
        ),
    )
    options = plan.BuildOptions(profiles=(plan.BatchProfile(1, 2, 4),))
    build = GraphBuild(folder / "step.onnx", options, target, print, print)
    with pytest.raises(BackendError, match=r"built no engine from .*: .+") as error:
        build.build("fp16", wrong, None)
    assert "\n" not in str(error.value)


@pytest.fixture
def target() -> BuildTarget:
    return BuildTarget(this_machine(RTX), ("8.9",))


def test_a_damaged_timing_cache_stops_no_build(
    exported: Exported, target: BuildTarget, tmp_path: Path
) -> None:
    """TensorRT for RTX has no use for a timing cache; TensorRT takes none that is foreign."""
    folder, cache, said = exported(precision="fp16"), tmp_path / "timing.cache", list[str]()
    cache.write_bytes(b"no timing cache")
    options = plan.BuildOptions(profiles=(plan.BatchProfile(1, 2, 4),))
    build = GraphBuild(folder / "step.onnx", options, target, print, said.append)
    _, data = build.build("fp16", step_signature(read_manifest(folder).config), cache)
    assert data.startswith(b"vtrt")
    assert said == []

    class Config:
        """What TensorRT answers to bytes that are no timing cache of this machine."""

        def create_timing_cache(self, data: bytes) -> bytes | None:
            return None if data else data

        def set_timing_cache(self, cache: bytes | None, ignore_mismatch: bool) -> bool:
            return cache is not None

    cache.write_bytes(b"no timing cache")
    assert build._load_timing_cache(Config(), cache) == b""
    assert said == [
        f"timing cache {cache} was measured by another TensorRT, on another device, or is "
        "damaged: measuring anew"
    ]


@pytest.fixture
def building(exported_run: Runs) -> Iterator[tuple[Run, Callable[[], subprocess.Popen[str]]]]:
    """A run, and what begins to build a loop of it in a process of its own."""
    run = exported_run("loop")
    started = []

    def begin() -> subprocess.Popen[str]:
        command = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from lutdeploy.cli import cli; cli()"
        )
        export = next(e.name for e in run.exports() if e.name.startswith("loop"))
        arguments = (*BUILD, run.path, "--export", export, "--batch", "1:2:4")
        process = subprocess.Popen(
            [sys.executable, "-c", command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            if "architectures" in line:
                break
        return process

    yield run, begin
    for process in started:
        process.kill()
        process.communicate()


def test_ctrl_c_and_kill_leave_nothing_in_the_way(
    building: tuple[Run, Callable[[], subprocess.Popen[str]]],
) -> None:
    run, begin = building
    process = begin()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert not list(run.engines.glob("*.plan"))
    process = begin()
    time.sleep(1)
    process.kill()
    process.communicate()
    process = begin()
    assert process.wait(timeout=120) == 0
    (record,) = records(run)
    record.read_plan()
    assert {path.suffix for path in run.engines.iterdir()} <= {".plan", ".json", ".lock", ""}


def test_two_builds_at_once_end_with_one_engine(
    building: tuple[Run, Callable[[], subprocess.Popen[str]]],
) -> None:
    run, begin = building
    first, second = begin(), begin()
    assert (first.wait(timeout=120), second.wait(timeout=120)) == (0, 0)
    assert len(records(run)) == 1
