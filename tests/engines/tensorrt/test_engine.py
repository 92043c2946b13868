"""Engines of both TensorRTs on the double: pictures, captured graphs, first runs, faults."""

from __future__ import annotations

import gc
import json
import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

import lutdeploy
from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.verdicts import read_verdicts, store_verdict
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.engines.cuda.onnxruntime import provider_options
from lutdeploy.engines.tensorrt import job, plan
from lutdeploy.engines.tensorrt.engine import TensorRTDenoiser
from lutdeploy.errors import (
    ArtefactError,
    BackendError,
    NonFiniteError,
    ParityError,
    UsageError,
)
from lutdeploy.sampling import batch_noise
from lutdeploy.schedule import solver_schedule
from tests.command import invoke, succeed
from tests.conftest import TensorRT, one_version, rtx_only
from tests.doubles import write_plans
from tests.doubles.cpu_device import CpuDevice
from tests.doubles.tensorrt_double import Controls

Runs = Callable[..., Run]
FIRST_RUN = "this engine was compiled and has never run: parity first, once"
FEW = ("-n", 2, "--steps", 2, "--no-grid")


def told(*arguments: object) -> str:
    """The last line of a command that fails."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: "), result.stderr
    return last


def engine_of(run: Run, batch: int | None = None) -> TensorRTDenoiser:
    backend = plan.read_record(run.plan_records()[0]).backend
    engine = open_engine(EngineRequest(run.path, backend, batch=batch))
    assert isinstance(engine, TensorRTDenoiser)
    return engine


def device_of(engine: TensorRTDenoiser) -> CpuDevice:
    assert isinstance(engine.device, CpuDevice)
    return engine.device


def outcomes(run: Run) -> list[str]:
    return [state.outcome for state in plan.survey(run, {})]


def set_faults(controls: Controls, **faults: Any) -> None:
    for name, value in faults.items():
        setattr(controls, name, value)


# Pictures, and the graph that makes them.


@pytest.mark.parametrize(
    ("tensorrt", "graph"),
    [
        *(("10.13", "step"), ("11.4", "per-step"), ("11.4", "loop")),
        *(("rtx-1.7", "step"), ("rtx-1.7", "per-step")),
    ],
    indirect=["tensorrt"],
)
def test_the_pictures_are_those_of_onnxruntime(
    tensorrt: TensorRT, built_run: Runs, tmp_path: Path, graph: str
) -> None:
    run, ours = built_run(graph), tensorrt.backend
    options: tuple[object, ...] = ("--export", run.exports()[0].name, "-n", 7, "--batch", 3)
    if graph == "step":
        options = (*options, "--solver", "dpmpp-2m", "--steps", 5)
    for backend in (ours, "onnxruntime"):
        succeed("sample", run.path, "--backend", backend, "--out", tmp_path / backend, *options)
    for index in range(7):
        one, other = (
            np.asarray(Image.open(tmp_path / backend / f"{index:06d}.png"), np.int16)
            for backend in (ours, "onnxruntime")
        )
        assert np.abs(one - other).max() <= 1
    line = json.loads((tmp_path / ours / "manifest.jsonl").read_text().splitlines()[0])
    assert line["backend"] == ours and "double" in line["device"]


@pytest.mark.parametrize("tensorrt", ["11.4", "rtx-1.7"], indirect=True)
def test_the_whole_trajectory_is_one_graph_per_batch_size(
    tensorrt: TensorRT, built_run: Runs
) -> None:
    with engine_of(built_run()) as engine:
        device = device_of(engine)
        lutdeploy.sample(engine, 10, steps=6, batch=4)
        assert (device.captures, device.replays) == (1, 3), "4, 4, and 2 padded to 4"
        lutdeploy.sample(engine, 4, steps=6, batch=4, seed=1)
        assert (device.captures, device.replays) == (1, 4)
        lutdeploy.sample(engine, 1, steps=6)
        assert device.captures == 2
        calls = tensorrt.controls.executions
        assert calls == 2 * 2 * 6, "each size enqueued once to warm up, once for the capture"
        lutdeploy.sample(engine, 4, steps=5)
        assert device.captures == 3, "another schedule is another graph"


@one_version
@pytest.mark.parametrize("graph", ["step", "per-step"])
def test_batches_of_any_size_run(tensorrt: TensorRT, built_run: Runs, graph: str) -> None:
    with engine_of(built_run(graph)) as engine:
        whole = lutdeploy.sample(engine, 9, solver="dpmpp-3m", steps=5, batch=9)
        for batch in (1, 4, 5):
            again = lutdeploy.sample(engine, 9, solver="dpmpp-3m", steps=5, batch=batch)
            assert np.abs(again - whole).max() < 1e-2
        x = batch_noise(0, range(9), engine.config.image_shape)
        t = np.full(9, solver_schedule("dpmpp-3m", 5).rows[2].t, np.float32)
        assert np.abs(engine.predict_x0(x, t)[:2] - engine.predict_x0(x[:2], t[:2])).max() < 1e-2


@one_version
def test_a_static_engine_pads_and_splits(tensorrt: TensorRT, exported_run: Runs) -> None:
    run = exported_run()
    succeed("build", run.path, "--batch", "3")
    with engine_of(run) as engine:
        reference = lutdeploy.load(run.exports()[0], "onnxruntime")
        for count, batch in ((1, 1), (7, 64)):
            found = lutdeploy.sample(engine, count, steps=3, batch=batch)
            assert found.shape[0] == count
            assert np.abs(found - lutdeploy.sample(reference, count, steps=3)).max() < 1e-2
        with pytest.raises(UsageError, match="got shape"):
            engine.predict_x0(np.zeros((2, 3, 32, 32), np.float32), np.zeros(2, np.float32))
        with pytest.raises(UsageError, match="at least 1"):
            engine.predict_x0(np.zeros((0, 3, 64, 64), np.float32), np.zeros(0, np.float32))


@pytest.mark.parametrize("tensorrt", ["11.4", "rtx-1.7"], indirect=True)
def test_one_engine_has_a_profile_for_each_size(tensorrt: TensorRT, exported_run: Runs) -> None:
    run = exported_run()
    (record,) = write_plans(run, tensorrt.backend, "1,3,6")
    assert list(map(str, record.profiles)) == ["1", "2:3:3", "4:6:6"]
    with engine_of(run) as engine:
        memory = []
        for batch, profile in ((1, 0), (2, 1), (3, 1), (4, 2), (6, 2)):
            program = engine.make_program(batch, 1, alone=True)
            (context,) = program.contexts
            assert context.active_optimization_profile == profile
            memory.append(context.update_device_memory_size_for_shapes())
        assert memory == sorted(set(memory)), "contexts are sized for what they run"
        reference = lutdeploy.load(run.exports()[0], "onnxruntime")
        expected = lutdeploy.sample(reference, 9, steps=2)
        for batch in (1, 3, 9):
            assert np.abs(lutdeploy.sample(engine, 9, steps=2, batch=batch) - expected).max() < 1e-2
    assert tensorrt.controls.errors == []


@one_version
def test_contexts_share_their_activation_memory(tensorrt: TensorRT, built_run: Runs) -> None:
    with engine_of(built_run("per-step")) as engine:
        contexts = engine.make_program(2, 1, alone=True).contexts
        assert len(contexts) == 5
        addresses = {address for address, _ in (context._memory for context in contexts)}
        assert len(addresses) == 1


@one_version
def test_a_failed_capture_is_said_once_and_changes_nothing(
    tensorrt: TensorRT, built_run: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    run = built_run()
    with engine_of(run) as engine:
        expected = lutdeploy.sample(engine, 6, steps=4, batch=4)
    tensorrt.again(capture_fails=True)
    with caplog.at_level(logging.WARNING), engine_of(run) as engine:
        found = lutdeploy.sample(engine, 6, steps=4, batch=4)
        found = lutdeploy.sample(engine, 6, steps=4, batch=1)
        assert device_of(engine).captures == 0
    assert caplog.text.count("no CUDA graph") == 1
    assert np.abs(found - expected).max() < 1e-2


@rtx_only
def test_a_stream_that_rtx_cannot_capture_is_not(tensorrt: TensorRT, built_run: Runs) -> None:
    run = built_run()
    with engine_of(run) as engine:
        expected = lutdeploy.sample(engine, 4, steps=3, batch=4)
        assert device_of(engine).captures == 1, "kernels are compiled before the first run"
        tensorrt.controls.stream_capturable = False
        found = lutdeploy.sample(engine, 4, steps=3, batch=1)
        assert device_of(engine).captures == 1
        tensorrt.controls.stream_capturable = True
        lutdeploy.sample(engine, 3, steps=4, batch=3)
        assert device_of(engine).captures == 2, "of other shapes it can"
    assert np.abs(found - expected).max() < 1e-2


# Which engine is used, and what is found out of it first.


@one_version
def test_of_several_builds_the_one_that_fits_the_batch_is_used(
    tensorrt: TensorRT, built_run: Runs
) -> None:
    run = built_run()
    (first,) = [plan.read_record(path) for path in run.plan_records()]
    succeed("build", run.path, "--batch", "2", "--batch", "8", "--batch", "16,32")
    several = "1:16:16,17:32:32"
    wanted: dict[int | None, str] = {1: "1:2:4", 2: "2", 3: "1:2:4", 4: "1:2:4", 8: "8"}
    wanted |= {9: several, 16: several, 64: several, None: "8"}  # the newest of a size it is for
    for batch, profiles in wanted.items():
        with engine_of(run, batch) as engine:
            assert engine.records[0].fields["batch"] == profiles, batch
    assert outcomes(run) == ["passed"] * 4
    # What failed comes last, however well it fits.
    (verdict,) = (v for v in read_verdicts(run) if v.engine_sha256 == first.plan_sha256)
    store_verdict(run, msgspec.structs.replace(verdict, passed=False, failures=("picture",)))
    with engine_of(run, 3) as engine:
        assert engine.records[0].fields["batch"] == several


@pytest.mark.parametrize("tensorrt", ["10.13", "rtx-1.7"], indirect=True)
def test_an_engine_that_never_ran_is_judged_at_its_first_opening_once(
    tensorrt: TensorRT, exported_run: Runs, tmp_path: Path
) -> None:
    run = exported_run()
    write_plans(run, tensorrt.backend)
    assert outcomes(run) == ["compiled, not run"]
    command = ("sample", run.path, "--backend", tensorrt.backend, *FEW)
    succeed(*command, "--unverified", "--out", tmp_path / "unjudged")
    assert read_verdicts(run) == []
    assert FIRST_RUN in succeed(*command, "--out", tmp_path / "a").stderr
    (verdict,) = read_verdicts(run)
    assert verdict.passed and verdict.backend == tensorrt.backend and verdict.layers
    assert verdict.layers["float16"] > 0 and verdict.layers["fused_attention"] == 2
    assert verdict.layers["unknown"] == 3, "signal, wait and shape_call have no type"
    assert FIRST_RUN not in succeed(*command, "--out", tmp_path / "b").stderr
    assert len(read_verdicts(run)) == 1 and outcomes(run) == ["passed"]


@pytest.mark.parametrize("tensorrt", ["11.4", "rtx-1.7"], indirect=True)
def test_an_engine_that_fails_its_first_run_is_refused_unless_told(
    tensorrt: TensorRT, exported_run: Runs, tmp_path: Path
) -> None:
    run = exported_run()
    write_plans(run, tensorrt.backend)
    tensorrt.controls.perturb = 0.05
    command = ("sample", run.path, "--backend", tensorrt.backend, *FEW)
    for _ in range(2):  # once judged, once read
        said = told(*command, "--out", tmp_path / "a")
        assert "FAILED its checks" in said and "--unverified" in said
    assert outcomes(run) == ["FAILED"] and len(read_verdicts(run)) == 1
    succeed(*command, "--unverified", "--out", tmp_path / "b")
    with pytest.raises(ParityError, match="FAILED"):
        lutdeploy.load(run.path, tensorrt.backend)


@one_version
def test_a_first_run_whose_verdict_cannot_be_kept(
    tensorrt: TensorRT,
    exported_run: Runs,
    read_only: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    run = exported_run()
    write_plans(run, tensorrt.backend)
    read_only(run.path)
    command = ("sample", run.path, "--backend", tensorrt.backend, *FEW)
    said = succeed(*command, "--out", tmp_path / "a").stderr
    assert said.count(FIRST_RUN) == 1 and "warning: this verdict is not kept: " in said
    tensorrt.controls.perturb = 0.05
    assert "the engine failed parity" in told(*command, "--out", tmp_path / "b")
    line = invoke("build", run.path, "--backend", tensorrt.backend).stderr.splitlines()[-1]
    assert line == f"error: {run.engines} is not writable; work on a copy of it elsewhere"


@one_version
def test_an_engine_that_fails_gives_way_to_the_next_which_is_judged_too(
    tensorrt: TensorRT, exported_run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = exported_run()
    for batch in ("1:2:4", "2"):
        write_plans(run, "tensorrt", batch)
    tensorrt.controls.perturb = 0.05
    judge = job.judge_plans

    def judge_the_first_as_wrong(*arguments: Any) -> Any:
        report = judge(*arguments)
        tensorrt.controls.perturb = 0.0
        return report

    monkeypatch.setattr(job, "judge_plans", judge_the_first_as_wrong)
    with engine_of(run, 2) as engine:
        assert engine.records[0].fields["batch"] == "1:2:4"
    assert sorted(outcomes(run)) == ["FAILED", "passed"]


@pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)
def test_a_build_here_is_judged_here(tensorrt: TensorRT, exported_run: Runs) -> None:
    """Wrong from the start, or only late in a trajectory, behind the single steps."""
    run = exported_run()
    command = ("build", run.path, "--backend", tensorrt.backend, "--batch", "1:2:4")
    for first in (0, 80):
        set_faults(tensorrt.controls, perturb=0.05, perturb_from=first, evaluations=0)
        said = told(*command)
        assert "the engine failed parity" in said
        assert ("step, x_next" in said) == (first == 0)
        assert outcomes(run) == ["FAILED"]
    tensorrt.controls.perturb = 0.0
    assert "reused" in succeed(*command).stderr, "judged once more, not built"
    assert outcomes(run) == ["passed"] and tensorrt.controls.builds == 1
    assert "their checks passed before" in succeed(*command).stderr


@rtx_only
def test_a_build_for_other_gpus_is_compiled_and_not_run(
    tensorrt: TensorRT, exported_run: Runs, tmp_path: Path
) -> None:
    run = exported_run()
    options = ("--backend", "tensorrt-rtx", "--architecture", "12.0", "--batch", "2")
    assert "compiled, not run" in succeed("build", run.path, *options).stderr
    assert outcomes(run) == ["compiled, not run"]
    said = told("sample", run.path, "--backend", "tensorrt-rtx", "--out", tmp_path / "out")
    assert "architectures: built with 12.0, here 8.9" in said
    tensorrt.again(compute_capability="12.0")
    said = succeed("sample", run.path, *options[:2], *FEW, "--out", tmp_path / "out").stderr
    assert FIRST_RUN in said and outcomes(run) == ["passed"]


@pytest.mark.parametrize("tensorrt", ["11.4", "rtx-1.7"], indirect=True)
def test_a_stale_engine_is_named_field_by_field_unopened(
    tensorrt: TensorRT, exported_run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = exported_run()
    (record,) = write_plans(run, tensorrt.backend)
    tensorrt.again(gpu="another GPU", compute_capability="8.6")
    reasons = ["architectures: built with 8.9, here 8.6"]
    if tensorrt.backend == "tensorrt":
        reasons = ["gpu: built with TensorRT double", "compute_capability: built with 8.9, here 8."]
    refused = told("sample", run.path, "--backend", tensorrt.backend, "--out", run.path / "out")
    shown = succeed("inspect", run.path).stdout
    monkeypatch.setattr("lutdeploy.artefacts.run.RUNS", run.path.parent)
    lines = [line for line in succeed("doctor").stdout.splitlines() if record.plan.stem in line]
    for reason in reasons:
        assert reason in refused and reason in " ".join(shown.split()) and reason in lines[0]
    assert record.plan.name in refused and "STALE: " in shown
    assert tensorrt.controls.deserialized == 0


@one_version
def test_parity_judges_engines_too(tensorrt: TensorRT, built_run: Runs) -> None:
    run = built_run()
    assert succeed("parity", run.path, "--backend", "tensorrt").stdout == "parity: passed\n"
    judged = [verdict for verdict in read_verdicts(run) if verdict.check == "parity"]
    assert [verdict.backend for verdict in judged] == ["tensorrt"]
    set_faults(tensorrt.controls, perturb=0.1, perturb_from=80, evaluations=0)
    assert "parity failed" in told("parity", run.path, "--backend", "tensorrt")
    assert "failed parity" in told("sample", run.path, "--backend", "tensorrt", "-n", 1)


# Faults.


@pytest.mark.parametrize("tensorrt", ["11.4", "rtx-1.7"], indirect=True)
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"deserialize_returns_none": True}, "refuses"),
        ({"context_is_none": True}, "TensorRT made no execution context"),
        ({"profile_false": True}, "TensorRT refuses optimization profile 1"),
        ({"input_shape_false": True}, "TensorRT refuses shape"),
        ({"tensor_address_false": True}, "TensorRT refuses the address"),
        ({"missing_output_shapes": True}, "TensorRT makes x_next (-1, 3, 64, 64), expected (2"),
        ({"execute_false_at": 0}, "TensorRT did not start evaluation 0"),
    ],
)
def test_what_tensorrt_reports_without_an_exception_is_one_line(
    tensorrt: TensorRT, exported_run: Runs, tmp_path: Path, fault: dict[str, Any], said: str
) -> None:
    run = exported_run()
    write_plans(run, tensorrt.backend, "1,4")
    set_faults(tensorrt.controls, **fault)
    options = ("--backend", tensorrt.backend, "--unverified", "--out", tmp_path / "out")
    assert said in told("sample", run.path, *FEW, *options)


@one_version
@pytest.mark.parametrize(("graph", "step"), [("step", 1), ("loop", 5)])
def test_what_is_not_finite_names_step_and_image(
    tensorrt: TensorRT, built_run: Runs, graph: str, step: int
) -> None:
    with engine_of(built_run(graph)) as engine:
        tensorrt.controls.perturb = float("nan")
        with pytest.raises(NonFiniteError, match=f"after step {step} in image 0"):
            lutdeploy.sample(engine, 3, batch=2)


@one_version
def test_another_plan_of_the_right_hash_is_caught_by_its_tensors(
    tensorrt: TensorRT, exported_run: Runs
) -> None:
    """A record that vouches for a plan of other profiles: names and shapes are checked as well."""
    run = exported_run()
    for wanted, actual in (("1:2:4", "2"), ("2", "1:2:4"), ("1,2", "2,4")):
        (record,) = write_plans(run, "tensorrt", wanted)
        (other,) = write_plans(run, "tensorrt", actual)
        record.plan.write_bytes(other.plan.read_bytes())
        changed = {name: getattr(other, name) for name in ("plan_bytes", "plan_sha256")}
        for path in run.plan_records():
            path.unlink()
        msgspec.structs.replace(record, **changed).write()
        with pytest.raises(ArtefactError, match=r"expected|profile"):
            engine_of(run)
        record.path.unlink()


@pytest.mark.parametrize("tensorrt", ["11.4", "rtx-1.7"], indirect=True)
def test_a_plan_of_another_version_under_this_ones_record_is_refused(
    tensorrt: TensorRT, exported_run: Runs
) -> None:
    run = exported_run()
    (record,) = write_plans(run, tensorrt.backend)
    version = record.fields["tensorrt"].encode()
    data = record.plan.read_bytes().replace(version, b"9" + version[1:], 1)
    record.plan.write_bytes(data)
    msgspec.structs.replace(record, plan_sha256=files.sha256(record.plan)).write()
    with pytest.raises(ArtefactError, match=r"refuses .*VERSION_MISMATCH.*; build again"):
        engine_of(run)
    assert tensorrt.controls.deserialized == 0


@one_version
def test_an_engine_of_an_earlier_lutdeploy_is_one_line(
    tensorrt: TensorRT, exported_run: Runs, tmp_path: Path
) -> None:
    """Records before format 3 were of one TensorRT, with one profile."""
    run = exported_run()
    (record,) = write_plans(run, "tensorrt")
    files.write_json(record.path, {**files.read_json(record.path), "format": 2})
    said = told("sample", run.path, "--backend", "tensorrt", "--out", tmp_path / "out")
    assert f"{record.path} was written by another version; build again" in said


@rtx_only
def test_the_diagnosis_of_rtx_is_the_message(
    tensorrt: TensorRT, built_run: Runs, tmp_path: Path
) -> None:
    run = built_run()
    tensorrt.controls.invalid = ("OLD_CUDA_DRIVER", "UNSUPPORTED_CC")
    said = told("sample", run.path, "--backend", "tensorrt-rtx", "--out", tmp_path / "out")
    assert said.startswith("error: TensorRT for RTX refuses ")
    assert "UNSUPPORTED_CC, OLD_CUDA_DRIVER; build again" in said
    assert tensorrt.controls.deserialized == 0, "asked before it is deserialised"


@one_version
def test_engine_and_runtime_are_freed(tensorrt: TensorRT, built_run: Runs) -> None:
    engine = engine_of(built_run("per-step"))
    lutdeploy.sample(engine, 2)
    held = [weakref.ref(each) for each in (engine._runtime, *engine.engines)]
    engine.close()
    gc.collect()
    assert [each() for each in held] == [None] * 6
    with pytest.raises((IndexError, BackendError, ValueError)):
        lutdeploy.sample(engine, 2)
    assert tensorrt.controls.errors == []


# The runtime cache of TensorRT for RTX.


def sample_two(run: Run) -> None:
    with engine_of(run) as engine:
        lutdeploy.sample(engine, 2, steps=2)


@rtx_only
def test_kernels_are_compiled_once_per_gpu(tensorrt: TensorRT, built_run: Runs) -> None:
    run, controls = built_run(), tensorrt.controls
    cache = plan.read_record(run.plan_records()[0]).runtime_cache("8.9")
    before = cache.read_bytes()  # of the parity check
    sample_two(run)
    assert controls.compiled == 0 and cache.read_bytes() == before
    with engine_of(run) as engine:
        lutdeploy.sample(engine, 3, steps=2)
    assert controls.compiled == 1 and len(cache.read_bytes()) > len(before)
    for damaged in (b"of another GPU", b"", None):
        cache.unlink()
        if damaged is not None:
            cache.write_bytes(damaged)
        controls.compiled = 0
        sample_two(run)
        assert controls.compiled == 1, "a cache of something else is left out and replaced"
        sample_two(run)
        assert controls.compiled == 1
    assert not list(run.engines.glob("*.tmp*")) and cache.parent == run.engines


@rtx_only
def test_where_a_cache_cannot_be_kept_or_read_pictures_are_made_all_the_same(
    tensorrt: TensorRT, built_run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built_run()
    cache = plan.read_record(run.plan_records()[0]).runtime_cache("8.9")
    kept, read = cache.read_bytes(), Path.read_bytes

    def refuse(path: Path, *_: Any, **__: Any) -> Any:
        if path == cache:
            raise PermissionError(13, os.strerror(13))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(files, "write_atomic", refuse)
    sample_two(run)
    assert tensorrt.controls.compiled == 1 and read(cache) == kept


# ONNX Runtime's providers.


def test_the_cuda_provider_captures_on_our_stream() -> None:
    device = CpuDevice()
    options = provider_options("CUDAExecutionProvider", device)
    assert options["enable_cuda_graph"] == "1"
    assert options["use_tf32"] == "0"
    assert options["user_compute_stream"] == str(device.stream_handle)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--provider", "cuda", "--device", "cuda"), "leave out --device"),
        (("--provider", "cuda", "--backend", "torch"), "belongs to --backend onnxruntime"),
        (("--provider", "npu"), "there are"),
        (("--provider", "tensorrt"), "use --backend tensorrt (`lutdeploy build`)"),
    ],
)
def test_provider_is_for_onnxruntime_alone(
    exported: Callable[..., Path], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    result = invoke("sample", exported(), "--out", tmp_path / "out", *arguments)
    assert result.exit_code in (1, 2)
    assert said in result.stderr.splitlines()[-1]


def test_provider_cpu_is_the_cpu(exported: Callable[..., Path], tmp_path: Path) -> None:
    options = ("--provider", "cpu", "--out", tmp_path / "out", "-n", 1, "--steps", 2)
    succeed("sample", exported(), *options)
    line = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[0])
    assert line["device"] == "CPUExecutionProvider"
