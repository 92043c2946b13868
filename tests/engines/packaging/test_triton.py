"""`lutdeploy package triton`: the repository, and the real server's answers from it.

The server is that of the nvidia-pytriton wheel, in an environment of its own, which the first run
makes from tests/data/triton/requirements.txt. It has Triton's Python backend and response cache,
and neither the ONNX Runtime nor the TensorRT backend.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import py_compile
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import types
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

import lutdeploy
from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.engines.packaging.model_config import Enum, InstanceGroup, ModelConfig, Tensor
from lutdeploy.errors import BackendError
from lutdeploy.images import Pixels, to_uint8
from lutdeploy.sampling import batch_noise, trajectory
from lutdeploy.schedule import solver_schedule
from tests.command import fail, succeed
from tests.conftest import TensorRT, one_version

ROOT = Path(__file__).parents[3]
DATA = ROOT / "tests" / "data" / "triton"
SEED, PICTURES, LOAD = 3, 64, 1500
CACHE = 2**22  # bytes, full of some 340 pictures
WITHIN = 2  # of 255: kernels may round otherwise in a batch
SCHEDULE = solver_schedule("dpmpp-3m", 5)  # one of its steps needs two x0 from the past
STEPS = ("--solver", "dpmpp-3m", "--steps", "5")


@pytest.fixture
def run(artefacts: Path, tmp_path: Path) -> Run:
    """A run of the test's own: step and loop exports, a verdict, a fitted schedule of 2 steps."""
    shutil.copytree(artefacts / "run", tmp_path / "cats")
    return Run(tmp_path / "cats")


def package(run: Run | Path, out: Path, *arguments: object) -> list[str]:
    """The files of a repository."""
    path = run.path if isinstance(run, Run) else run
    done = succeed("package", "triton", path, "--out", out, "--export", "step-fp32", *arguments)
    assert done.stdout == f"{out}\n"
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def test_the_repository(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "models"
    written = package(run, out)
    export = ("manifest.json", "step.onnx", "weights.bin")
    expected = ["README.md", "package.json"]
    for model in ("cats", "cats_png", "cats_stream"):
        expected += [
            f"{model}/{name}" for name in ("config.pbtxt", "1/model.py", "1/schedule.json")
        ]
    for model in ("cats", "cats_stream"):
        expected += [f"{model}/1/step-fp32/{name}" for name in export]
    assert written == sorted(expected)
    config = (out / "cats" / "config.pbtxt").read_text()
    for fact in (files.sha256(run.model), "fitted-2", lutdeploy.__version__):
        assert f'string_value: "{fact}"' in config
    assert "max_batch_size: 64\n" in config
    assert list(tmp_path.glob(".*")) == [], "nothing is left beside it"


def test_the_same_bytes_again(run: Run, tmp_path: Path) -> None:
    out, other = tmp_path / "models", tmp_path / "other"
    written = package(run, out, "--batch", 8)
    (out / "cats" / "config.pbtxt").write_text("changed")
    py_compile.compile(str(out / "cats" / "1" / "model.py"))  # as a server does
    assert package(run, out) == written == package(run, other)
    for name in written:
        assert (out / name).read_bytes() == (other / name).read_bytes()


def test_on_a_gpu_the_steps_are_a_model_of_their_own(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "models"
    written = package(run, out, "--device", "cuda:1", "--name", "faces", "--batch", 16)
    assert {"faces_denoiser/1/step.onnx", "faces_denoiser/1/weights.bin"} <= set(written)
    assert not any(name.startswith("faces/1/step-fp32") for name in written)
    config = (out / "faces_denoiser" / "config.pbtxt").read_text()
    for line in ('platform: "onnxruntime_onnx"', "max_batch_size: 16", "  gpus: 1"):
        assert f"{line}\n" in config
    for model in ("faces", "faces_stream"):
        assert "faces_denoiser" in (out / model / "config.pbtxt").read_text()


@one_version
def test_a_tensorrt_engine(
    tensorrt: TensorRT, built_run: Callable[..., Run], tmp_path: Path
) -> None:
    run, out = built_run(), tmp_path / "models"
    succeed("parity", run.path, "--backend", "onnxruntime", "--export", "step-fp16", *STEPS)
    arguments = ("package", "triton", run.path, "--backend", "tensorrt", "--out", out)
    succeed(*arguments, "--export", "step-fp16", "--name", "cats")
    (plan,) = run.engines.glob("*.plan")
    assert (out / "cats_denoiser" / "1" / "model.plan").read_bytes() == plan.read_bytes()
    config = (out / "cats_denoiser" / "config.pbtxt").read_text()
    assert 'platform: "tensorrt_plan"\nmax_batch_size: 4\n' in config
    assert "max_batch_size: 4\n" in (out / "cats" / "config.pbtxt").read_text()
    assert tensorrt.module.__version__ in (out / "README.md").read_text()
    plan.unlink()
    assert "no checked TensorRT engine" in fail(2, *arguments, "--export", "step-fp16")


def test_what_is_not_packaged(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "models"

    def refused(code: int, *arguments: object) -> str:
        return fail(code, "package", "triton", run.path, "--out", out, *arguments)

    assert "is a loop export" in refused(2, "--export", "loop-fp32-dpmpp-3m-5")
    assert "is no name for a model" in refused(2, "--name", "my cats")
    assert "no fitted schedule of 7 steps" in refused(2, "--solver", "fitted", "--steps", 7)
    assert "on cpu or cuda" in refused(2, "--device", "mps")
    assert "is no device" in refused(2, "--device", "banana")
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "holds mine.txt, which this command did not make" in refused(2)
    assert (out / "mine.txt").read_text() == "mine"


def test_a_file_that_somebody_added_keeps_its_folder(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "models"
    package(run, out)
    (out / "cats" / "__pycache__").mkdir()
    (out / "cats" / "__pycache__" / "mine.pyc").write_text("mine")
    line = fail(2, "package", "triton", run.path, "--export", "step-fp32", "--out", out)
    assert "holds cats/__pycache__/mine.pyc, which this command did not make" in line


def test_an_export_without_a_passed_verdict_is_refused(run: Run, tmp_path: Path) -> None:
    arguments = ("package", "triton", run.path, "--export", "step-fp32", "--out", tmp_path / "out")
    (verdict,) = run.verdicts.iterdir()
    files.write_json(verdict, {**files.read_json(verdict), "passed": False})
    assert "export step-fp32 failed parity" in fail(1, *arguments)
    verdict.unlink()
    assert "export step-fp32 has no verdict" in fail(1, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_download_from_the_hub_gives_its_name(run: Run, tmp_path: Path) -> None:
    """Not that of the commit, after which the cache names its folder."""
    snapshot = tmp_path / "hub" / "models--me--faces" / "snapshots" / "0123abcd"
    shutil.copytree(run.path, snapshot)
    assert "faces_png/config.pbtxt" in package(snapshot, tmp_path / "models")


def test_a_run_without_a_step_export_is_refused(run: Run, tmp_path: Path) -> None:
    shutil.rmtree(run.export_folder("step-fp32"))
    line = fail(2, "package", "triton", run.path, "--out", tmp_path / "out")
    assert f"has no step export; run `lutdeploy export {run.path}` first" in line
    loop = run.export_folder("loop-fp32-dpmpp-3m-5")
    assert "lies in no run folder" in fail(
        2, "package", "triton", shutil.copytree(loop, tmp_path / "loop"), "--out", tmp_path / "out"
    )


def test_a_damaged_export_is_refused(run: Run, tmp_path: Path) -> None:
    weights = run.export_folder("step-fp32") / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    line = fail(1, "package", "triton", run.path, "--export", "step-fp32", "--out", tmp_path / "o")
    assert "hash mismatch" in line
    assert not (tmp_path / "o").exists()


def test_the_text_format() -> None:
    config = ModelConfig(
        name='a"\\b',
        backend="python",
        max_batch_size=2,
        inputs=[Tensor("x", "FP32", (3, 4)), Tensor("t", "FP32", (1,), scalar=True)],
        outputs=[],
        instances=InstanceGroup("GPU", (1,)),
        parameters={"b": "2", "a": "1"},
    )
    assert config.text().startswith('name: "a\\"\\\\b"\nmax_batch_size: 2\ninput {\n')
    assert '  name: "t"\n  data_type: TYPE_FP32\n  dims: 1\n  reshape {\n  }\n}\n' in config.text()
    assert isinstance(Enum("KIND_GPU"), str)


def test_numpy_2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = "triton_python_backend_utils"
    monkeypatch.setitem(sys.modules, backend, types.ModuleType(backend))
    monkeypatch.setattr("numpy.__version__", "2.1.0")
    module = importlib.import_module("lutdeploy.engines.packaging.triton_model")
    with pytest.raises(BackendError, match=r"numpy 2\.1\.0; pip install 'numpy<2'"):
        module.TritonPythonModel().initialize({})


# The real server.


@pytest.fixture(scope="module")
def environment(pytestconfig: pytest.Config) -> Path:
    """The server's virtual environment, made once for each state of requirements.txt."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("nvidia-pytriton has wheels for Linux on x86-64 alone")
    if sys.version_info >= (3, 13):
        pytest.skip("nvidia-pytriton's backend needs numpy < 2, which has no wheels for 3.13")
    pins = DATA / "requirements.txt"
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("triton")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    place = folder / f"{version}-{hashlib.sha256(pins.read_bytes()).hexdigest()[:12]}"
    with filelock.FileLock(folder / "lock"):
        if not (place / "made").is_file():
            shutil.rmtree(place, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", place], check=True)
            pip = (place / "bin" / "python", "-m", "pip", "install", "--no-deps", "-r", pins)
            done = subprocess.run(pip, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"pip cannot install Triton here: {done.stderr.splitlines()[-1:]}")
            # The backend hides PYTHONPATH from the models.
            (site_packages(place) / "lutdeploy.pth").write_text(f"{ROOT}\n")
            install_backend(place, version)
            (place / "made").touch()
    stub = place / "backends" / "python" / "triton_python_backend_stub"
    needs = subprocess.run(
        ["ldd", stub], env=server_environment(place), capture_output=True, text=True
    )
    if "not found" in needs.stdout:
        pytest.skip(f"this Python has no shared library for the backend: {needs.stdout}")
    return place


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python3.*/site-packages")
    return found


def install_backend(environment: Path, version: str) -> None:
    """Put the Python backend beside the program that runs its models, of this Python's version."""
    server = site_packages(environment) / "pytriton" / "tritonserver"
    backend = environment / "backends" / "python"
    shutil.copytree(server / "backends" / "python", backend)
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backend)


def server_environment(environment: Path) -> dict[str, str]:
    libraries = (
        site_packages(environment) / "nvidia_pytriton.libs",
        sysconfig.get_config_var("LIBDIR"),
    )
    return {
        **os.environ,
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def answers(environment: Path, artefacts: Path, shared_folder: Path) -> dict[str, Any]:
    """What one server answered, whose answers all processes of pytest-xdist share."""
    folder = shared_folder / "triton"
    with filelock.FileLock(shared_folder / "triton.lock"):
        if not (folder / "answers.json").is_file():
            files.write_json(folder / "answers.json", ask_server(environment, artefacts, folder))
    found: dict[str, Any] = files.read_json(folder / "answers.json")
    return found


def ask_server(environment: Path, artefacts: Path, folder: Path) -> dict[str, Any]:
    """What tests/data/triton/client.py and the README's commands were answered.

    Models "cats" compute within the Python backend. Models "gpu" ask "gpu_denoiser", in which
    tests/data/triton/denoiser.py stands for Triton's ONNX Runtime backend, and a CPU for the GPU.
    """
    package(artefacts / "run", folder / "cats", "--name", "cats", *STEPS)
    package(artefacts / "run", folder / "gpu", "--name", "gpu", "--device", "cuda", *STEPS)
    asked = folder / "gpu" / "gpu_denoiser"
    config = (asked / "config.pbtxt").read_text()
    config = config.replace('platform: "onnxruntime_onnx"', 'backend: "python"')
    config = config.replace('default_model_filename: "step.onnx"\n', "")
    (asked / "config.pbtxt").write_text(
        config.replace("  gpus: 0\n  kind: KIND_GPU", "  kind: KIND_CPU")
    )
    shutil.copy(DATA / "denoiser.py", asked / "1" / "model.py")
    http, grpc = free_port(), free_port()
    server = site_packages(environment) / "pytriton" / "tritonserver"
    command: list[str | Path] = [
        server / "bin" / "tritonserver",
        f"--model-repository={folder / 'cats'}",
        f"--model-repository={folder / 'gpu'}",
        f"--backend-directory={environment / 'backends'}",
        f"--cache-directory={server / 'caches'}",
        f"--cache-config=local,size={CACHE}",
        "--disable-auto-complete-config",
        *("--http-address=127.0.0.1", f"--http-port={http}"),
        *("--grpc-address=127.0.0.1", f"--grpc-port={grpc}"),
        "--allow-metrics=false",
    ]
    log = folder / "server.log"
    with log.open("wb") as stream:
        started = subprocess.Popen(
            command,
            env=server_environment(environment),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        wait_until_ready(started, f"http://127.0.0.1:{http}/v2/health/ready", log)
        told = [str(value) for value in (http, grpc, PICTURES, LOAD, started.pid)]
        client: list[str | Path] = [environment / "bin" / "python", DATA / "client.py", *told]
        done = subprocess.run(client, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr + log.read_text()[-3000:]
        assert started.poll() is None, "the server lives"
        readme = (folder / "cats" / "README.md").read_text()
        return {**json.loads(done.stdout), "readme": follow(readme, http, folder)}
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)


def follow(readme: str, port: int, folder: Path) -> str:
    """The picture, in hexadecimal, that the README's curl command gets."""
    *_, curl = readme.split("```sh\n")
    script = curl.partition("```")[0].replace("localhost:8000", f"localhost:{port}")
    subprocess.run(["sh", "-e", "-c", script], cwd=folder, check=True, timeout=60)
    return (folder / "picture.png").read_bytes().hex()


def wait_until_ready(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the server is not ready:\n{log.read_text()[-5000:]}")


@pytest.fixture(scope="module")
def expected(artefacts: Path) -> Callable[..., list[Pixels]]:
    """The pictures (seed, index), each sampled alone from the export that was packaged."""
    engine = lutdeploy.load(artefacts / "run" / "onnx" / "step-fp32", "onnxruntime")
    shape = engine.config.image_shape

    def sample(*pictures: tuple[int, int]) -> list[Pixels]:
        noises = [batch_noise(seed, [index], shape) for seed, index in pictures]
        return [
            to_uint8(lutdeploy.sample(engine, 1, noise=noise, schedule=SCHEDULE))[0]
            for noise in noises
        ]

    return sample


def largest_difference(found: list[str], wanted: list[Pixels]) -> int:
    """Over all pixels, in steps of 255."""
    pictures = [np.frombuffer(bytes.fromhex(data), np.uint8) for data in found]
    return max(
        int(np.abs(picture.reshape(right.shape).astype(int) - right).max())
        for picture, right in zip(pictures, wanted, strict=True)
    )


@pytest.mark.slow
def test_http(answers: dict[str, Any], expected: Callable[..., list[Pixels]]) -> None:
    assert largest_difference(answers["http"], expected((SEED, 0), (SEED, 1))) == 0


@pytest.mark.slow
def test_grpc_and_batches(answers: dict[str, Any], expected: Callable[..., list[Pixels]]) -> None:
    pictures = [(SEED, 100 + index) for index in range(PICTURES)]
    assert largest_difference(answers["at_once"], expected(*pictures)) <= WITHIN
    before, after = answers["at_once_statistics"]
    assert after["pictures"] - before["pictures"] == PICTURES
    assert after["batches"] - before["batches"] <= PICTURES // 4
    pictures = [(SEED, 200), (2**64 - 1, 2**64 - 1)]
    assert largest_difference(answers["batch"], expected(*pictures)) <= WITHIN


@pytest.mark.slow
def test_a_repeated_request_is_answered_from_the_cache(answers: dict[str, Any]) -> None:
    assert answers["again"] == answers["http"]
    before, after = answers["again_statistics"]
    assert after["hits"] - before["hits"] == 2
    assert after["batches"] == before["batches"]


def sampled(artefacts: Path, out: Path, seed: int, count: int) -> list[bytes]:
    """The files of `lutdeploy sample`, each picture made alone."""
    options = ("--backend", "onnxruntime", "--export", "step-fp32", "--batch", 1, "--no-grid")
    run = ("sample", artefacts / "run", *options, *STEPS)
    succeed(*run, "-n", count, "--seed", seed, "--out", out)
    return [(out / f"{index:06d}.png").read_bytes() for index in range(count)]


@pytest.mark.slow
def test_png(answers: dict[str, Any], artefacts: Path, tmp_path: Path) -> None:
    """The very files of `sample`; also of a picture that the cache holds as IMAGE."""
    first, _, third = sampled(artefacts, tmp_path / "samples", SEED, 3)
    assert [bytes.fromhex(data) for data in answers["png"]] == [first, third]


@pytest.mark.slow
def test_the_commands_of_the_readme(
    answers: dict[str, Any], artefacts: Path, tmp_path: Path
) -> None:
    (first,) = sampled(artefacts, tmp_path / "samples", 0, 1)
    assert bytes.fromhex(answers["readme"]) == first


@pytest.mark.slow
def test_bad_input_is_refused_and_the_others_are_answered(
    answers: dict[str, Any], expected: Callable[..., list[Pixels]]
) -> None:
    for what, (status, answer) in answers["bad"].items():
        assert status >= 400 and answer["error"], what
    mixed = answers["mixed"]
    assert all(status >= 400 for status in mixed[1::2])
    pictures = [(SEED, 1000 + index) for index in range(0, len(mixed), 2)]
    assert largest_difference(mixed[::2], expected(*pictures)) <= WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("model", ["stream", "asked_stream"])
def test_the_stream_shows_every_step(answers: dict[str, Any], model: str, artefacts: Path) -> None:
    engine = lutdeploy.load(artefacts / "run" / "onnx" / "step-fp32", "onnxruntime")
    noise = batch_noise(SEED, [0], engine.config.image_shape)
    _, *states = trajectory(engine, noise, SCHEDULE)
    shown = [state.x0 for state in states[:-1]] + [states[-1].x]
    assert [step for step, _ in answers[model]] == [1, 2, 3, 4, 5]
    wanted = [to_uint8(x)[0] for x in shown if x is not None]
    assert largest_difference([picture for _, picture in answers[model]], wanted) == 0


@pytest.mark.slow
def test_a_denoiser_that_is_a_model_of_its_own(
    answers: dict[str, Any], expected: Callable[..., list[Pixels]]
) -> None:
    assert largest_difference(answers["asked"], expected((SEED, 0))) == 0
    assert answers["asked_statistics"]["batches"] == SCHEDULE.steps


@pytest.mark.slow
def test_a_denoiser_that_fails_is_an_error_and_not_the_end(
    answers: dict[str, Any], expected: Callable[..., list[Pixels]]
) -> None:
    assert answers["failures"] == [
        "gpu_denoiser: unlucky",
        "gpu_denoiser: unlucky",  # again, and no answer without outputs from the cache
        "gpu: gpu_denoiser: unlucky",
        "gpu_denoiser: unlucky",
    ]
    assert largest_difference(answers["asked_after"], expected((SEED, 1))) == 0


@pytest.mark.slow
def test_memory_is_flat(answers: dict[str, Any]) -> None:
    before, after = answers["memory"]
    assert answers["different"] == LOAD, "every request was for another picture"
    assert after - before < 2**23
    assert (answers["ready"], answers["ready_at_the_end"]) == (200, 200)


@pytest.mark.slow
def test_the_configs_are_what_protobuf_prints(environment: Path, run: Run, tmp_path: Path) -> None:
    package(run, tmp_path / "cpu")
    package(run, tmp_path / "gpu", "--device", "cuda")
    check = (
        "import sys; from pathlib import Path; from google.protobuf import text_format;"
        "from tritonclient.grpc.model_config_pb2 import ModelConfig\n"
        "for path in Path(sys.argv[1]).rglob('config.pbtxt'):\n"
        "    text = path.read_text()\n"
        "    message = text_format.Parse(text, ModelConfig())\n"
        "    assert message.name == path.parent.name\n"
        "    assert text_format.MessageToString(message) == text, path\n"
        "    print(path.parent.name)\n"
    )
    done = subprocess.run(
        [environment / "bin" / "python", "-c", check, tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 7
