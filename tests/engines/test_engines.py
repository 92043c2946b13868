"""One conformance test over every backend, and what each refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

import lutdeploy
from lutdeploy import images
from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import hash_files, read_manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.engines import BACKENDS as EVERY_BACKEND
from lutdeploy.engines import Engine, EngineRequest, open_engine
from lutdeploy.engines.cuda.device import CudaDevice
from lutdeploy.engines.cuda.onnxruntime import OnnxRuntimeDeviceDenoiser
from lutdeploy.engines.onnxruntime import (
    CUDA,
    SESSION_OVERHEAD,
    OnnxRuntimeDenoiser,
    misplaced_matmuls,
    open_session,
)
from lutdeploy.engines.tensorrt.library import RTX, TENSORRT
from lutdeploy.errors import ArtefactError, BackendError, UsageError
from lutdeploy.sampling import batch_noise
from lutdeploy.schedule import Step, solver_schedule
from tests.conftest import read_golden
from tests.doubles import install, write_plans
from tests.doubles.cpu_device import CpuDevice, on_cpu
from tests.doubles.tensorrt_double import VERSIONS, Controls

Exported = Callable[..., Path]
RunOf = Callable[[str], Run]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
BACKENDS = (
    "torch",
    "onnxruntime",
    "openvino",
    *(f"double {version}" for version in VERSIONS),  # of both TensorRTs
    "onnxruntime device",  # the code of its GPU providers, on the CPU
    "torch device",  # its GPU code, on the CPU
    pytest.param("torch cuda", marks=pytest.mark.gpu),
    pytest.param("onnxruntime cuda", marks=pytest.mark.gpu),
)


@pytest.fixture(params=BACKENDS)
def engine(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    golden_runs: RunOf,
    exported: Exported,
    exported_run: Callable[..., Run],
) -> Iterator[Engine]:
    """Every backend on every preset."""
    backend, _, detail = str(request.param).partition(" ")
    if backend == "double":
        install(monkeypatch, detail, Controls())
        backend = RTX if detail.startswith("rtx") else TENSORRT
        run = exported_run("step", preset=preset, precision="fp32")
        write_plans(run, backend, "2:3:4")
        opened = lutdeploy.load(run.path, backend)  # judged first
    elif backend == "torch" and detail:
        if detail == "device":
            on_cpu(monkeypatch)
        model = golden_runs(preset).model
        opened = lutdeploy.load(model, backend, "cuda", precision="fp32")
    elif detail == "device":
        manifest = read_manifest(exported(preset))
        opened = OnnxRuntimeDeviceDenoiser(manifest, "cpu", CpuDevice())
    else:
        path = golden_runs(preset).model if backend == "torch" else exported(preset)
        opened = lutdeploy.load(path, backend, detail or "cpu")
    with opened:
        yield opened


def test_conformance(engine: Engine, preset: str) -> None:
    """The public contract, in one go."""
    golden = read_golden(preset)
    x, t, expected = (golden.arrays[name] for name in ("x", "t", "x0"))
    assert engine.config == golden.config
    assert engine.identity["backend"] in EVERY_BACKEND

    first = engine.predict_x0(x, t)  # timesteps differ within the batch
    assert first.dtype == np.float32
    assert first.shape == x.shape
    assert np.abs(first - expected).max() <= 1e-4 * max(1, expected.std())

    kept, inputs = first.copy(), x.copy()
    second = engine.predict_x0(x[::-1].copy(), t[::-1].copy())
    assert np.array_equal(first, kept), "a second call changed the first result"
    assert np.array_equal(x, inputs), "a call changed its input"
    assert np.abs(second[::-1] - first).max() < 1e-5

    row = Step(0.25, 0.7, 0.6, -0.3)
    x_next, x0 = engine.step(x, row, first)
    alone = engine.predict_x0(x, np.full(len(x), row.t, np.float32))
    np.testing.assert_allclose(x0, alone, atol=1e-5)
    np.testing.assert_allclose(x_next, 0.7 * x + 0.6 * x0 - 0.3 * first, atol=1e-5)

    noise = batch_noise(0, range(5), engine.config.image_shape)
    by_batch = [lutdeploy.sample(engine, 5, steps=3, batch=batch) for batch in (1, 2, 5)]
    given = lutdeploy.sample(engine, 5, steps=3, noise=noise)
    for other in (*by_batch[1:], given):
        difference = images.to_uint8(by_batch[0]).astype(int) - images.to_uint8(other)
        assert np.abs(difference).max() <= 1
    golden_steps = int(golden.arrays["euler_steps"])
    final = lutdeploy.sample(engine, 3, steps=golden_steps, noise=x)
    assert np.abs(final - golden.arrays["euler_x"][-1]).max() < 1e-4 * max(1, expected.std())


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("graph", ["step", "per-step", "loop"])
def test_every_graph_follows_a_third_order_schedule(
    exported: Exported, golden_runs: RunOf, graph: str, on_device: bool
) -> None:
    """The second x0 from the past is composed on the host, on the device, or in the loop."""
    schedule = solver_schedule("dpmpp-3m", 5)
    reference = lutdeploy.load(golden_runs("static-tanh-64").model)
    folder, device = exported(graph=graph), CpuDevice()
    with (
        OnnxRuntimeDeviceDenoiser(read_manifest(folder), "cpu", device)
        if on_device
        else lutdeploy.load(folder, "onnxruntime")
    ) as engine:
        assert engine.schedule == (None if graph == "step" else schedule)
        found = lutdeploy.sample(engine, 3, seed=2, batch=2, steps=5, solver="dpmpp-3m")
        if graph != "step":
            with pytest.raises(UsageError, match="holds the steps of dpmpp-3m-5, not dpmpp-3m-6"):
                lutdeploy.sample(engine, 3, steps=6)
    assert np.abs(found - lutdeploy.sample(reference, 3, seed=2, schedule=schedule)).max() < 1e-4
    assert device.captures == 0, "the provider captures by itself"


def test_per_step_export_predicts_at_its_own_timesteps(exported: Exported) -> None:
    engine = lutdeploy.load(exported(graph="per-step"), "onnxruntime")
    reference = lutdeploy.load(exported(), "onnxruntime")
    x = batch_noise(0, range(3), engine.config.image_shape)
    t = np.array([0.6, 0.0, 0.6], np.float32)
    assert np.abs(engine.predict_x0(x, t) - reference.predict_x0(x, t)).max() < 1e-5
    with pytest.raises(UsageError, match=r"no timestep 0\.5"):
        engine.predict_x0(x, np.full(3, 0.5, np.float32))
    with pytest.raises(UsageError, match="holds no step"):
        engine.step(x, Step(0.1, 0.5, 0.5, 0.0), None)
    with pytest.raises(UsageError, match="whole trajectories"):
        lutdeploy.load(exported(graph="loop"), "onnxruntime").predict_x0(x, t)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 3, 32, 32), np.float32), r"got shape \(2, 3, 32, 32\)"),
        (np.zeros((2, 3, 64, 64), np.float64), "got float64, expected float32"),
        (np.zeros((0, 3, 64, 64), np.float32), "at least 1"),
    ],
)
def test_wrong_feed_says_got_and_expected(exported: Exported, x: np.ndarray, message: str) -> None:
    engine = lutdeploy.load(exported(), "onnxruntime")
    with pytest.raises(UsageError, match=message):
        engine.predict_x0(x, np.zeros(len(x), np.float32))


def test_a_run_opens_its_newest_export_unless_told(
    tmp_path: Path, golden_runs: RunOf, exported: Exported
) -> None:
    run = Run(tmp_path / "run")
    source = golden_runs("static-tanh-64")
    files.write_atomic(run.model, source.model.read_bytes())
    with pytest.raises(UsageError, match="has no export"):
        open_engine(EngineRequest(run.path, "onnxruntime"))
    assert open_engine(EngineRequest(run.path)).identity["backend"] == "torch"
    for export in (exported(), exported(precision="fp16")):
        shutil.copytree(export, run.export_folder(export.name))
    newest = run.exports()[0].name
    other = run.exports()[1].name
    assert open_engine(EngineRequest(run.path)).identity["export"] == newest
    assert open_engine(EngineRequest(run.path, export=other)).identity["export"] == other
    assert lutdeploy.load(run.path).identity["backend"] == "torch"
    with pytest.raises(UsageError, match=f"no export 'step-int8'; it has {newest}, {other}"):
        open_engine(EngineRequest(run.path, export="step-int8"))


def test_an_export_of_another_model_is_refused(
    tmp_path: Path, golden_runs: RunOf, exported: Exported
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(exported(), run.export_folder("step-fp32"))
    files.write_atomic(run.model, golden_runs("dynamic-64").model.read_bytes())
    for path in (run.path, run.export_folder("step-fp32")):
        for backend in ("onnxruntime", "auto"):
            with pytest.raises(ArtefactError, match="exported from another"):
                open_engine(EngineRequest(path, backend))
    with pytest.raises(ArtefactError, match="exported from another"):
        open_engine(EngineRequest(run.export_folder("step-fp32"), "torch"))
    assert open_engine(EngineRequest(run.path, "torch")).config.lut == "dynamic"


def test_an_export_folder_works_alone(tmp_path: Path, exported: Exported) -> None:
    alone = tmp_path / "carried" / "away"
    shutil.copytree(exported(), alone)
    assert open_engine(EngineRequest(alone)).identity["backend"] == "onnxruntime"
    with pytest.raises(UsageError, match="backend torch"):
        open_engine(EngineRequest(alone, "torch"))


def test_a_graph_of_another_signature_is_refused(tmp_path: Path, exported: Exported) -> None:
    """An attacker, or a mix-up, that also updated the hashes."""
    mixed = tmp_path / "mixed"
    shutil.copytree(exported(), mixed)
    loop = exported(graph="loop")
    shutil.copy(loop / "loop.onnx", mixed / "step.onnx")
    values = files.read_json(mixed / "manifest.json")
    values["files"] = hash_files(mixed)
    files.write_json(mixed / "manifest.json", values)
    with pytest.raises(ArtefactError, match=r"got inputs \['noise'\]"):
        open_engine(EngineRequest(mixed))


FOR_TENSORRT = r"use --backend tensorrt \(`lutdeploy build`\)"


@pytest.mark.parametrize(
    ("backend", "device", "error", "message"),
    [
        ("tvm", "cpu", BackendError, "there are auto, torch, onnxruntime, openvino, tensorrt"),
        ("onnxruntime", "npu", BackendError, "there are .*CPUExecutionProvider"),
        pytest.param("onnxruntime", "cuda", BackendError, "CPUExecutionProvider", marks=no_gpu),
        ("onnxruntime", "tensorrt", UsageError, FOR_TENSORRT),
        ("onnxruntime", "TensorrtExecutionProvider", UsageError, FOR_TENSORRT),
        pytest.param("torch", "cuda", BackendError, "no CUDA device 'cuda'.*none", marks=no_gpu),
        ("torch", "mps", BackendError, "no MPS device 'mps' here; torch sees none"),
        ("torch", "meta", UsageError, "'meta' is no device; write cpu, cuda, cuda:N or mps"),
        ("auto", "npu", UsageError, "'npu' is no device"),
    ],
)
def test_what_is_not_there_is_an_error_and_no_fallback(
    exported: Exported, backend: str, device: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        lutdeploy.load(exported(), backend, device)


def test_matmuls_that_run_elsewhere_are_named(exported: Exported) -> None:
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    graph = str(exported() / "step.onnx")
    session = ort.InferenceSession(graph, options, providers=[cpu])
    assert misplaced_matmuls(session, cpu) == []
    strays = misplaced_matmuls(session, cuda)
    assert len(strays) >= 14
    assert f"head/MatMul_1 on {cpu}" in strays


def test_a_session_that_fell_back_is_an_error(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ONNX Runtime does with a log line: asked for one provider, it runs on another."""
    real = ort.InferenceSession
    monkeypatch.setattr(
        ort,
        "InferenceSession",
        lambda source, options, **_: real(source, options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(BackendError, match="would run on CPUExecutionProvider"):
        open_session(exported() / "step.onnx", "CUDAExecutionProvider")


def test_threads_are_passed_on(exported: Exported) -> None:
    with OnnxRuntimeDenoiser(read_manifest(exported()), threads=2) as engine:
        assert engine.session(0).get_session_options().intra_op_num_threads == 2


@pytest.mark.parametrize(("room", "again"), [(5, range(0)), (2, range(2, 5))])
def test_sessions_that_do_not_fit_are_opened_again(
    room: int, again: range, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def count(graph: Path, *more: Any, **options: Any) -> ort.InferenceSession:
        opened.append(graph.name)
        return open_session(graph, *more, **options)

    monkeypatch.setattr("lutdeploy.engines.onnxruntime.open_session", count)
    with open_engine(EngineRequest(exported(graph="per-step"), "onnxruntime")) as engine:
        expected = lutdeploy.sample(engine, 2)
    opened.clear()
    monkeypatch.setattr("lutdeploy.engines.onnxruntime.sessions_that_fit", lambda *a, **b: room)
    with open_engine(EngineRequest(exported(graph="per-step"), "onnxruntime")) as engine:
        for _ in range(2):
            assert np.array_equal(lutdeploy.sample(engine, 2), expected)
    assert opened == [f"step-{k:03d}.onnx" for k in (*range(5), *again)]


@pytest.mark.parametrize(("room", "again"), [(5, range(0)), (2, range(2, 5))])
def test_a_gpu_keeps_the_sessions_that_its_memory_holds(
    room: int, again: range, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are opened again, each with bindings of its own."""
    opened: list[str] = []

    def count(graph: Path, *more: Any, **options: Any) -> ort.InferenceSession:
        opened.append(graph.name)
        return open_session(graph, *more, **options)

    manifest = read_manifest(exported(graph="per-step", precision="fp16"))
    weights = sum(f.bytes for n, f in manifest.files.items() if n not in manifest.graphs)
    memory = int((room + 0.5) * 2 * SESSION_OVERHEAD * weights)
    with open_engine(EngineRequest(manifest.folder, "onnxruntime")) as host:
        expected = lutdeploy.sample(host, 2)
    monkeypatch.setattr("lutdeploy.engines.onnxruntime.open_session", count)
    device = CpuDevice(free_memory=memory)
    with OnnxRuntimeDeviceDenoiser(manifest, "cpu", device) as engine:
        for _ in range(2):
            assert np.abs(lutdeploy.sample(engine, 2) - expected).max() < 1e-3
    names = list(manifest.graphs)
    assert opened[:5] == names
    # The loop runs once more while it warms up.
    assert opened[5:] == [names[k] for k in again] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["step", "per-step", "loop"])
@pytest.mark.parametrize("room", [0, 2**40])
def test_a_real_gpu_follows_every_graph(
    exported: Exported, graph: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sessions for all steps and for one: bindings, captured graphs, the end of a session."""
    folder = exported(graph=graph)
    reference = lutdeploy.sample(lutdeploy.load(folder, "onnxruntime"), 3, batch=2)
    monkeypatch.setattr(CudaDevice, "free_memory", room)
    with lutdeploy.load(folder, "onnxruntime", "cuda") as engine:
        for _ in range(2):
            assert np.abs(lutdeploy.sample(engine, 3, batch=2) - reference).max() < 1e-4


@pytest.mark.gpu
def test_doctor_finds_the_gpus_providers_in_a_process_of_its_own() -> None:
    """Nothing has loaded CUDA's libraries there yet."""
    command = [sys.executable, "-m", "lutdeploy.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert found["torch cuda"]["works"]
    assert found["onnxruntime CUDAExecutionProvider"]["works"], found


@pytest.mark.parametrize(("device", "number"), [("cuda", "0"), ("cuda:1", "1"), (CUDA, "0")])
def test_the_provider_is_told_which_gpu(
    device: str, number: str, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}

    def no_gpu(graph: Path, provider: str, *more: Any, **options: Any) -> None:
        told.update(provider=provider, **dict(more[-1] or {}))
        raise BackendError("no GPU")

    devices = on_cpu(monkeypatch)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr("lutdeploy.engines.onnxruntime.open_session", no_gpu)
    with pytest.raises(BackendError, match="no GPU"):
        lutdeploy.load(exported(), "onnxruntime", device)
    assert (told["provider"], told["device_id"]) == (CUDA, number)
    assert [opened.word for opened in devices] == [f"cuda:{number}"]


@no_gpu
def test_torch_is_loaded_for_the_cuda_provider_and_no_other(exported: Exported) -> None:
    """CUDA's libraries come with torch's wheels; sampling on the CPU does without."""
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from lutdeploy.artefacts.manifest import read_manifest\n"
        "import lutdeploy\nfrom lutdeploy.errors import BackendError\n"
        "from lutdeploy.engines.onnxruntime import open_session\n"
        "with lutdeploy.load(sys.argv[1], 'onnxruntime') as engine:\n"
        "    lutdeploy.sample(engine, 1, steps=1)\n"
        "print('torch' in sys.modules)\n"
        "try:\n    open_session(Path(sys.argv[1]) / 'step.onnx', 'CUDAExecutionProvider')\n"
        "except BackendError: pass\n"
        "print('torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(exported())]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"], "and nothing else is printed"


def test_sessions_of_a_per_step_export_share_their_arena(exported: Exported) -> None:
    """Measured in a process of its own, whose memory nobody else has grown."""
    pytest.importorskip("resource")
    program = (
        "import resource, sys, numpy as np\n"
        "from pathlib import Path\nfrom lutdeploy.artefacts.manifest import read_manifest\n"
        "from lutdeploy.engines.onnxruntime import OnnxRuntimeDenoiser\n"
        "manifest = read_manifest(Path(sys.argv[1]))\n"
        "with OnnxRuntimeDenoiser(manifest, threads=1) as engine:\n"
        "    sessions = [engine.session(k) for k in range(len(manifest.graphs))]\n"
        "    x = np.zeros((512, *engine.config.image_shape), np.float32)\n"
        "    peaks = []\n"
        "    for k, session in enumerate(sessions):\n"
        "        feed = {spec.name: x for spec in session.get_inputs()}\n"
        "        session.run(None, feed)\n"
        "        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "print(*peaks)\n"
    )
    command = [sys.executable, "-c", program, str(exported(graph="per-step"))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    first, *_, last = (int(peak) for peak in run.stdout.split())
    assert last - first < 0.1 * first, "five sessions take what one takes"
