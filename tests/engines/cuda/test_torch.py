"""PyTorch's step on a device: the loop's numbers are those of the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch._inductor import compile_fx

import lutdeploy
from benchmarks import gpu
from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.verdicts import read_verdicts, store_verdict
from lutdeploy.cli import cli
from lutdeploy.engines import Engine
from lutdeploy.engines.benchmark import limits
from lutdeploy.engines.cuda.device import CudaDevice
from lutdeploy.engines.cuda.torch import TorchDeviceDenoiser
from lutdeploy.errors import UsageError
from lutdeploy.images import to_uint8
from lutdeploy.machine import this_machine
from lutdeploy.reference import TorchDenoiser
from tests.command import fail, succeed
from tests.conftest import golden_model
from tests.doubles.cpu_device import CpuDevice, on_cpu


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("fp16", 3e-2), ("bf16", 2.5e-1)])
def test_a_trajectory_on_the_device(preset: str, precision: str, limit: float) -> None:
    reference = TorchDenoiser(golden_model(preset))
    device = CpuDevice()
    with TorchDeviceDenoiser(golden_model(preset), device, precision) as denoiser:
        for solver in ("euler", "dpmpp-3m"):
            found = lutdeploy.sample(denoiser, 3, steps=5, solver=solver, batch=2)
            expected = lutdeploy.sample(reference, 3, steps=5, solver=solver)
            assert np.abs(found - expected).max() < limit
    assert device.captures == 2


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("fp16", 3e-2), ("bf16", 2.5e-1)])
def test_a_real_gpu_gives_the_numbers_of_the_cpu(
    preset: str, precision: str, limit: float, compile: bool
) -> None:
    reference = TorchDenoiser(golden_model(preset))
    expected = lutdeploy.sample(reference, 5, steps=8, solver="dpmpp-2m")
    model = golden_model(preset)
    with TorchDeviceDenoiser(model, CudaDevice(), precision, compile=compile) as denoiser:
        for batch in (5, 2):
            found = lutdeploy.sample(denoiser, 5, steps=8, solver="dpmpp-2m", batch=batch)
            assert np.abs(found - expected).max() < limit


GPU = ("--backend", "torch", "--device", "cuda")
SHORT = ("--solver", "euler", "--steps", 2)


@pytest.fixture
def run(golden_runs: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of the test's own, on a machine whose GPU is a CPU."""
    on_cpu(monkeypatch)
    run = Run(tmp_path / "run")
    files.write_atomic(run.model, golden_runs("static-tanh-64").model.read_bytes())
    return run


def test_sample_on_a_gpu_takes_the_captured_loop(run: Run, tmp_path: Path) -> None:
    pictures = {}
    for precision in (None, "fp32", "bf16"):
        out = tmp_path / str(precision)
        chosen = ("--precision", precision) if precision else ()
        command = ("sample", run.path, *GPU, *chosen, *SHORT, "-n", 2, "--no-grid", "--out", out)
        said = succeed(*command, "--format", "npz").stderr
        assert ("; --precision fp32 computes in float32" in said) == (precision is None)
        place = f"cuda:0 {precision or 'fp16'}"
        assert f"backend: torch on {place}" in said
        assert f"`lutdeploy parity` has not judged torch on {place} yet" in said
        line = json.loads((out / "manifest.jsonl").read_text().splitlines()[0])
        assert (line["backend"], line["device"]) == ("torch", place)
        with np.load(out / "pictures.npz") as file:
            pictures[precision] = file["images"].astype(int)
    reference = to_uint8(lutdeploy.sample(lutdeploy.load(run.path), 2, steps=2)).astype(int)
    errors = {name: np.abs(found - reference).max() for name, found in pictures.items()}
    assert errors["fp32"] <= 1
    assert 1 <= errors[None] < errors["bf16"]


def test_a_verdict_on_one_precision_says_nothing_of_another(run: Run, tmp_path: Path) -> None:
    judged = ("parity", run.path, *GPU, "-n", 1, *SHORT)
    succeed(*judged)
    succeed(*judged, "--precision", "fp32")
    verdicts = {verdict.device: verdict for verdict in read_verdicts(run)}
    assert {name: verdict.precision for name, verdict in verdicts.items()} == {
        "cuda:0 fp16": "fp16",
        "cuda:0 fp32": "fp32",
    }
    assert all(verdict.passed for verdict in verdicts.values())
    store_verdict(run, msgspec.structs.replace(verdicts["cuda:0 fp16"], passed=False))
    sampled = ("sample", run.path, *GPU, *SHORT, "-n", 1, "--no-grid", "--out", tmp_path / "out")
    assert "torch on cuda:0 fp16 failed parity" in fail(1, *sampled)
    assert "has not judged" not in succeed(*sampled, "--precision", "fp32").stderr
    assert "has not judged" in succeed(*sampled, "--precision", "bf16", "--overwrite").stderr


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_real_gpu_passes_parity(
    exported_run: Callable[..., Run], precision: str, tmp_path: Path
) -> None:
    run = exported_run(precision="fp32")
    succeed("parity", run.path, *GPU, "--precision", precision)
    sampled = ("sample", run.path, *GPU, "--precision", precision, "-n", 3, "--batch", 2)
    assert "one by one" not in succeed(*sampled, "--out", tmp_path / "out").stderr


@pytest.mark.gpu
def test_a_real_gpus_peak_is_that_of_large_products() -> None:
    small, large = (
        limits.rate("fp16", limits.measure({"fp16": limits._product("cuda", "fp16", n)})["fp16"], n)
        for n in (256, limits.GPU_SIDE)
    )
    assert limits.product_peak("cuda:0", "fp16") > 0.8 * large > small


def test_schedules_are_tuned_in_float32(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision would put noise in the search."""
    opened: list[Engine] = []

    def stop(*arguments: Any) -> None:
        opened.append(arguments[1])
        raise UsageError("enough")

    monkeypatch.setattr("lutdeploy.training.few_steps.tune.tune_schedules", stop)
    fail(2, "tune-steps", run.path, "--device", "cuda", "--steps", 4)
    assert [engine.identity["device"] for engine in opened] == ["cuda:0 fp32"]


def test_parity_of_everything_includes_the_gpus_pytorch(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = dataclasses.replace(this_machine(), gpus=("a GPU",))
    monkeypatch.setattr("lutdeploy.engines.judge.this_machine", lambda: machine)
    said = succeed("parity", run.path, "--all", "-n", 1, *SHORT).stdout
    names = [line.partition(":")[0] for line in said.splitlines() if ": passed" in line]
    assert names == ["torch-cuda-fp16", "torch-cuda-bf16", "torch-cuda-fp32"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backend", "torch", "--precision", "fp16"), "backend torch has it on cuda alone"),
        (("--backend", "auto", "--precision", "fp16"), "is for backends torch and openvino"),
        (("--backend", "openvino", "--precision", "fp16"), "openvino computes in fp32 or bf16"),
        (("--backend", "torch", "--device", "cuda:x"), "write cpu, cuda, cuda:N or mps"),
    ],
)
def test_a_precision_or_device_that_is_not_there_is_one_line(
    options: tuple[str, ...],
    message: str,
    exported_run: Callable[..., Run],
    tmp_path: Path,
) -> None:
    run = exported_run(precision="fp32")
    assert message in fail(2, "sample", run.path, *options, "--out", tmp_path / "out")


def test_inductors_advice_to_use_tf32_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given where there is an Ampere GPU; a warning is an error here."""
    advise = compile_fx._warn_tf32_disabled.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    with pytest.raises(UserWarning, match="TensorFloat32"):
        advise()

    def compile(module: Any, **options: Any) -> Any:
        def compiled(*tensors: Any) -> Any:
            advise()
            return module(*tensors)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    model = golden_model("static-tanh-64")
    with TorchDeviceDenoiser(model, CpuDevice(), "fp32", compile=True) as engine:
        assert np.isfinite(lutdeploy.sample(engine, 1, steps=1)).all()
    with pytest.raises(UserWarning, match="TensorFloat32"):
        advise()


def test_the_gpu_report_needs_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result = CliRunner().invoke(gpu.main, ["--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "no CUDA device" in result.output


Report = Callable[..., tuple[Result, dict[str, Any], str]]


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """The report of a preset on a double, with the exit codes that its commands are to have.

    They are not run, so `bench` measured what ``benched`` says. Every figure is the double's.
    """
    on_cpu(monkeypatch)
    monkeypatch.setattr(gpu, "peak_flops", lambda: 1e12)
    monkeypatch.setattr(gpu, "STEPS", 2)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    monkeypatch.setattr(gpu, "PRESETS", {"dynamic-64": {}})

    def make(
        *backends: str, benched: str = "measured", **exit_codes: int
    ) -> tuple[Result, dict[str, Any], str]:
        def command(arguments: tuple[object, ...]) -> dict[str, Any]:
            name = str(arguments[0])
            if name == "bench":
                path = f"{backends[0]}-cuda-fp16"
                about = {"path": path, "backend": backends[0], "device": "cuda"}
                found = [{**about, "status": benched, "reason": "no memory"}]
                files.write_json(Run(Path(str(arguments[1]))).bench, {"contenders": found})
            code = exit_codes.get(name, 0)
            return {"command": name, "exit_code": code, "seconds": 1.0, "said": "x|y"}

        monkeypatch.setattr(gpu, "run_command", command)
        named = [word for backend in backends for word in ("--backend", backend)]
        options = ("--size", "tiny", "--batch", "2", "--seconds", "0", "--out", str(tmp_path))
        result = CliRunner().invoke(gpu.main, [*named, *options])
        (found,) = files.read_json(tmp_path / "report.json")["presets"].values()
        return result, found, (tmp_path / "report.md").read_text()

    return make


def test_the_gpu_report_says_whose_figures_these_are(report: Report) -> None:
    result, found, text = report("torch", parity=1)
    assert result.exit_code == 1
    assert 'failed: ["parity"' in result.output
    assert text.startswith("# TensorRT double")
    assert [done["command"] for done in found["commands"]] == ["export", "parity"]
    timed = found["speed"][0]
    assert timed["contender"] == "PyTorch fp16, eager"
    assert timed["images_per_second"] == pytest.approx(2 / timed["seconds"])


def test_the_gpu_report_goes_on_after_any_failure(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory, the compiler, a missing C compiler, a missing backend; the others are timed."""
    errors = {
        "fp16, compiled, CUDA graph": RuntimeError("Failed to find C compiler."),
        "bf16, CUDA graph": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        "fp32, CUDA graph": ValueError(),
    }
    every = gpu.contenders

    def some_fail(run: Run, backend: str, batch: int) -> dict[str, Callable[[], Any]]:
        def fails(error: Exception) -> Any:
            raise error

        found = every(run, backend, batch)
        broken = {f"PyTorch {name}": partial(fails, error) for name, error in errors.items()}
        return found | broken if backend == "torch" else found

    monkeypatch.setattr(gpu, "contenders", some_fail)
    result, found, text = report("torch", "onnxruntime")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    failed = {row["contender"]: row["failed"] for row in found["speed"] if "failed" in row}
    assert "has no export" in failed.pop("onnxruntime fp16")
    assert failed == {
        "PyTorch fp16, compiled, CUDA graph": "RuntimeError: Failed to find C compiler.",
        "PyTorch bf16, CUDA graph": "OutOfMemoryError: CUDA out of memory. Tried to allocate",
        "PyTorch fp32, CUDA graph": "ValueError: ValueError",
    }
    assert [row["contender"] for row in found["speed"] if "seconds" in row] == [
        "PyTorch fp16, eager",
        "PyTorch fp16, CUDA graph",
    ]
    assert "failed: OutOfMemoryError: CUDA out of memory" in text
    assert "dynamic-64: PyTorch fp32, CUDA graph, batch 2" in result.output


def test_the_gpu_report_without_a_peak(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory() -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gpu, "peak_flops", no_memory)
    result, found, text = report("torch")
    assert result.exit_code == 1 and "the float16 matrix product" in result.output
    assert "matrix product: failed: OutOfMemoryError: CUDA out of memory." in text
    assert {row.get("share_of_peak") for row in found["speed"]} == {None}


def test_a_contender_that_bench_left_out_fails_the_gpu_report(report: Report) -> None:
    result, found, _ = report("torch", benched="failed")
    (bench,) = [done for done in found["commands"] if done["said"].startswith("torch-cuda")]
    assert bench["exit_code"] == 1 and bench["said"] == "torch-cuda-fp16: no memory"
    assert result.exit_code == 1
    _, found, _ = report("torch")
    assert found["commands"][-1]["said"] == "measured: torch-cuda-fp16"


def test_commands_of_the_gpu_report(tmp_path: Path) -> None:
    """Every word of them is one that the command line knows."""
    for backend in ("torch", "onnxruntime", "tensorrt"):
        commands = list(gpu.daily_commands(Run(tmp_path), backend, (1, 64), 8))
        names = [str(command[0]) for command in commands]
        assert names[0] == ("build" if backend == "tensorrt" else "parity")
        assert names[-2:] == ["sample", "bench"]
        for name, *words in commands:
            if backend == "tensorrt" and name == "build":
                assert words == [tmp_path, "--backend", "tensorrt", "--batch", 1, "--batch", 64]
                continue
            command = cli.get_command(click.Context(cli), str(name))
            assert command is not None
            command.make_context(str(name), [str(word) for word in words])
