"""Sampling with TensorRT engines on the double: the pictures, the one graph, the faults."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

import lutdeploy
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.verdicts import read_verdicts, store_verdict
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.engines.cuda.denoiser import DeviceDenoiser
from lutdeploy.engines.cuda.onnxruntime import provider_options
from lutdeploy.engines.tensorrt import plan
from lutdeploy.errors import ArtefactError, BackendError, NonFiniteError, UsageError
from lutdeploy.sampling import batch_noise
from lutdeploy.schedule import solver_schedule
from tests.command import invoke, succeed
from tests.conftest import TensorRT, one_version
from tests.doubles.cpu_device import CpuDevice
from tests.engines.tensorrt.test_builder import Runs, told


def engine_of(run: Run) -> DeviceDenoiser:
    engine = lutdeploy.load(run.path, "tensorrt")
    assert isinstance(engine, DeviceDenoiser)
    return engine


def device_of(engine: DeviceDenoiser) -> CpuDevice:
    assert isinstance(engine.device, CpuDevice)
    return engine.device


@pytest.mark.parametrize("graph", ["step", "per-step", "loop"])
def test_the_pictures_are_those_of_onnxruntime(
    tensorrt: TensorRT, built_run: Runs, tmp_path: Path, graph: str
) -> None:
    run = built_run(graph)
    options: tuple[object, ...] = ("--export", run.exports()[0].name, "-n", 7, "--batch", 3)
    if graph == "step":
        options = (*options, "--solver", "dpmpp-2m", "--steps", 5)
    for backend in ("tensorrt", "onnxruntime"):
        succeed("sample", run.path, "--backend", backend, "--out", tmp_path / backend, *options)
    for index in range(7):
        ours, theirs = (
            np.asarray(Image.open(tmp_path / backend / f"{index:06d}.png"), np.int16)
            for backend in ("tensorrt", "onnxruntime")
        )
        assert np.abs(ours - theirs).max() <= 1
    line = json.loads((tmp_path / "tensorrt" / "manifest.jsonl").read_text().splitlines()[0])
    assert line["backend"] == "tensorrt" and "double" in line["device"]
    assert (tmp_path / "tensorrt" / "grid.png").is_file()


@one_version
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


@one_version
def test_of_several_builds_the_one_that_fits_the_batch_is_used(
    tensorrt: TensorRT, built_run: Runs
) -> None:
    run = built_run()
    succeed("build", run.path, "--batch", "2", "--batch", "8")
    for batch, profile in ((1, "1:2:4"), (2, "2"), (4, "1:2:4"), (8, "8"), (16, "8"), (None, "8")):
        with open_engine(EngineRequest(run.path, "tensorrt", batch=batch)) as engine:
            chosen = engine.records[0].profile  # type: ignore[attr-defined]  # of TensorRTDenoiser
            assert str(chosen) == profile or batch is None


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


@one_version
@pytest.mark.parametrize("call", [0, 9])
def test_a_launch_that_tensorrt_refuses_is_one_line(
    tensorrt: TensorRT, built_run: Runs, tmp_path: Path, call: int
) -> None:
    run = built_run()
    tensorrt.controls.execute_false_at = call
    options = ("-n", 4, "--steps", 4, "--batch", 2, "--out", tmp_path / "out")
    said = told("sample", run.path, "--backend", "tensorrt", *options)
    assert "TensorRT did not start evaluation" in said


@one_version
def test_nan_names_step_and_image(tensorrt: TensorRT, built_run: Runs, tmp_path: Path) -> None:
    run = built_run()
    tensorrt.controls.perturb = float("nan")
    options = ("-n", 6, "--steps", 4, "--batch", 2, "--out", tmp_path / "out")
    said = told("sample", run.path, "--backend", "tensorrt", *options)
    assert "NaN or Inf after step 1 in image 0" in said
    with pytest.raises(NonFiniteError):
        lutdeploy.sample(engine_of(run), 2, steps=3)


@one_version
def test_inf_in_a_loop_export_names_the_image(tensorrt: TensorRT, built_run: Runs) -> None:
    with engine_of(built_run("loop")) as engine:
        tensorrt.controls.perturb = float("inf")
        with pytest.raises(NonFiniteError, match="after step 5 in image 0"):
            lutdeploy.sample(engine, 2)


@one_version
def test_what_never_passed_is_refused_unless_told(
    tensorrt: TensorRT, built_run: Runs, tmp_path: Path
) -> None:
    run = built_run()
    (verdict,) = read_verdicts(run)
    failed = msgspec.structs.replace(verdict, passed=False, failures=("picture, images",))
    options = ("--backend", "tensorrt", "-n", 1, "--steps", 2)
    for word in ("was not checked", "FAILED"):
        shutil.rmtree(run.verdicts, ignore_errors=True)
        if word == "FAILED":
            store_verdict(run, failed)
        said = told("sample", run.path, *options, "--out", tmp_path / word[:3])
        assert word in said and "--unverified" in said
        succeed("sample", run.path, *options, "--unverified", "--out", tmp_path / word[:3])


@one_version
def test_parity_judges_engines_too(tensorrt: TensorRT, built_run: Runs) -> None:
    run = built_run()
    assert succeed("parity", run.path, "--backend", "tensorrt").stdout == "parity: passed\n"
    judged = [verdict for verdict in read_verdicts(run) if verdict.check == "parity"]
    assert [verdict.backend for verdict in judged] == ["tensorrt"]
    tensorrt.controls.perturb, tensorrt.controls.perturb_from = 0.1, 150
    tensorrt.controls.executions = 0
    assert "parity failed" in told("parity", run.path, "--backend", "tensorrt")
    assert "failed parity" in told("sample", run.path, "--backend", "tensorrt", "-n", 1)


@one_version
def test_another_plan_of_the_right_hash_is_caught_by_its_tensors(
    tensorrt: TensorRT, built_run: Runs
) -> None:
    """A record that vouches for a plan of other inputs: names and shapes are checked as well."""
    run = built_run()
    succeed("build", run.path, "--batch", "2")
    first, second = (plan.read_record(path) for path in run.plan_records())
    first.plan.write_bytes(second.plan.read_bytes())
    msgspec.structs.replace(
        first, plan_bytes=second.plan_bytes, plan_sha256=second.plan_sha256
    ).write()
    batch = first.profile.opt + (not first.profile.static)
    with pytest.raises(ArtefactError, match=r"expected|profile"):
        open_engine(EngineRequest(run.path, "tensorrt", batch=batch))


@one_version
def test_engine_and_runtime_are_freed(tensorrt: TensorRT, built_run: Runs) -> None:
    engine = engine_of(built_run("per-step"))
    lutdeploy.sample(engine, 2)
    engine.close()
    gc.collect()
    with pytest.raises((IndexError, BackendError, ValueError)):
        lutdeploy.sample(engine, 2)
    errors = [text for severity, text in tensorrt.controls.log if severity == "ERROR"]
    assert errors == []


def test_load_refuses_a_cpu_for_tensorrt_on_real_hardware() -> None:
    from lutdeploy.engines.cuda.device import CudaDevice

    with pytest.raises(BackendError, match="no CUDA device 'cpu'"):
        CudaDevice("cpu")


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
